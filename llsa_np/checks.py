"""What arrays may be, checked once for every backend (spec.md, Bad input)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from llsa_np.adapters import View, type_name
from llsa_np.options import Layout
from llsa_np.selection import Selection

FLOATS = ("float16", "bfloat16", "float32", "float64")
ORDER = {
    "bhnd": ("batch", "heads", "tokens", "dim"),
    "bnhd": ("batch", "tokens", "heads", "dim"),
}


class Sizes(NamedTuple):
    """Sizes of an array of four axes, whatever its layout."""

    batch: int
    heads: int
    tokens: int
    dim: int


def lse_dtype(dtype: str) -> str:
    """The type of lse, and of every sum: float64 for float64, else float32."""
    return "float64" if dtype == "float64" else "float32"


def sizes(who: str, name: str, view: View, layout: Layout) -> Sizes:
    """The sizes of q, k, v, dout, out or x, which have four axes and at least one token and one dim."""
    axes = ORDER[layout]
    if len(view.shape) != 4:
        raise ValueError(
            f"{who}: {name} has shape {view.shape}; with layout {layout!r} it has four axes ({', '.join(axes)}). "
            "Add axes of size 1 for a missing batch or head"
        )
    named = dict(zip(axes, view.shape, strict=True))
    result = Sizes(**named)
    if result.tokens == 0 or result.dim == 0:
        raise ValueError(f"{who}: {name} has shape {view.shape}, ({', '.join(axes)}); tokens and dim are 1 or more")
    return result


def check_floats(who: str, views: dict[str, View]) -> str:
    """The one dtype that all arrays have."""
    (first_name, first), *others = views.items()
    for name, view in views.items():
        if view.dtype not in FLOATS:
            raise TypeError(f"{who}: {name} has dtype {view.dtype}; allowed are {', '.join(FLOATS)}. Convert it first")
    for name, view in others:
        if view.dtype != first.dtype:
            raise TypeError(
                f"{who}: {first_name} has dtype {first.dtype} and {name} {view.dtype}; they must be the same. "
                "Convert one of them"
            )
    return first.dtype


def check_dtype_name(who: str, dtype: Any) -> str:
    """The name of an element type given as a name or as anything that NumPy takes for one."""
    try:
        name = dtype if isinstance(dtype, str) or dtype is None else np.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in FLOATS:
        raise TypeError(f"{who}: dtype is {name}; allowed are {', '.join(FLOATS)}")
    return name


def check_devices(who: str, views: dict[str, View]) -> None:
    """That all arrays lie on one device, as far as that is known already."""
    known = [(name, view) for name, view in views.items() if view.device]
    for name, view in known[1:]:
        first_name, first = known[0]
        if view.device != first.device:
            raise ValueError(
                f"{who}: {first_name} is on {first.device} and {name} on {view.device}; "
                "all arrays of one call lie on one device. Move one of them"
            )


def check_equal(who: str, what: str, a_name: str, a: View, a_size: int, b_name: str, b: View, b_size: int) -> None:
    """That two arrays agree on one size."""
    if a_size != b_size:
        raise ValueError(
            f"{who}: {a_name} has shape {a.shape} and {b_name} {b.shape}; "
            f"their {what} are {a_size} and {b_size} and must be equal"
        )


def check_queries_keys(who: str, views: dict[str, View], layout: Layout) -> dict[str, Sizes]:
    """Sizes of q, k and, where given, v, which fit together: same batch; q and k the same dim; k and v the same heads
    and tokens; q's heads a multiple of k's."""
    of = {name: sizes(who, name, view, layout) for name, view in views.items()}
    q, k = views["q"], views["k"]
    check_equal(who, "batch sizes", "q", q, of["q"].batch, "k", k, of["k"].batch)
    check_equal(who, "head dims", "q", q, of["q"].dim, "k", k, of["k"].dim)
    heads, kv_heads = of["q"].heads, of["k"].heads
    if (kv_heads == 0 and heads > 0) or (kv_heads > 0 and heads % kv_heads):
        raise ValueError(
            f"{who}: q has shape {q.shape} and k {k.shape}; q's {heads} heads must be a multiple of k's {kv_heads}. "
            "Repeat or drop heads"
        )
    if "v" in views:
        v = views["v"]
        check_equal(who, "batch sizes", "k", k, of["k"].batch, "v", v, of["v"].batch)
        check_equal(who, "heads", "k", k, of["k"].heads, "v", v, of["v"].heads)
        check_equal(who, "tokens", "k", k, of["k"].tokens, "v", v, of["v"].tokens)
    return of


def check_is_selection(who: str, selection: Any) -> Selection:
    """The argument, if it is a Selection."""
    if not isinstance(selection, Selection):
        raise TypeError(
            f"{who}: selection is a {type_name(selection)}; allowed is a llsa_np.Selection, "
            "from select() or Selection(arrays, ...)"
        )
    return selection


def check_selection(who: str, selection: Selection, of: dict[str, Sizes], views: dict[str, View]) -> None:
    """That a Selection was made for these sizes, and that its arrays, whose views these are, are still as they were:
    a framework's tools may have put others in their place."""
    q, k = of["q"], of["k"]
    made_for = (selection.batch, selection.heads, selection.query_tokens, selection.key_tokens)
    got = (q.batch, q.heads, q.tokens, k.tokens)
    if made_for != got:
        raise ValueError(
            f"{who}: the Selection was made for (batch, heads, queries, keys) = {made_for}, and q and k have {got}; "
            "select again for these arrays"
        )
    rows = selection.query_hierarchy.lengths[1:]
    for (name, view), length, topk in zip(views.items(), rows, selection.topk, strict=True):
        shape = (selection.batch, selection.heads, length, topk)
        check_shape(who, name, view, shape, "as when the Selection was made")
        check_dtype(who, name, view, "int32")


def check_shape(who: str, name: str, view: View, shape: tuple[int, ...], meaning: str) -> None:
    """That an array has exactly this shape."""
    if tuple(view.shape) != shape:
        raise ValueError(f"{who}: {name} has shape {view.shape}; it must be {shape}, {meaning}")


def check_dtype(who: str, name: str, view: View, dtype: str) -> None:
    """That an array has exactly this dtype."""
    if view.dtype != dtype:
        raise TypeError(f"{who}: {name} has dtype {view.dtype}; it must be {dtype} here. Convert it first")
