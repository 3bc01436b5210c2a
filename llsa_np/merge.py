"""Merging attentions over disjoint sets of keys into the attention over all of them (spec.md, More than the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llsa_np.adapters import common_adapter, type_name
from llsa_np.adapters.dlpack_arrays import through_dlpack
from llsa_np.checks import check_devices, check_dtype, check_floats, check_shape, lse_dtype, sizes
from llsa_np.options import Layout, check_layout


@through_dlpack
def merge(*pairs: tuple[Any, Any], layout: Layout = "bhnd") -> tuple[Any, Any]:
    """lse = log sum_i exp(lse_i) and out = sum_i exp(lse_i - lse) out_i.

    pairs: one or more (out, lse) over disjoint keys, as `attention(..., return_lse=True)` and `attend` return them: out
    (batch, heads, M, Dv), or (batch, M, heads, Dv) with layout "bnhd", of one dtype; lse (batch, heads, M) in both
    layouts, float32 (float64 for float64).
    Returns (out, lse) in the same dtypes; sums in float32 (float64). A row with lse -inf in one pair changes nothing,
    bit for bit; with -inf in all it has out 0 and lse -inf.
    Built of the framework's own array operations, so differentiable where the framework is, a row with lse -inf in all
    pairs having no gradient.
    Raises ValueError without pairs or for shapes that differ, TypeError for mixed dtypes, for arrays of different
    frameworks, or of one without array operations. Source: spec.md, More than the paper.
    """
    who = "merge"
    layout = check_layout(who, layout)
    if not pairs:
        raise ValueError(f"{who}: got no pairs; allowed is one or more (out, lse)")
    for i, pair in enumerate(pairs):
        if not isinstance(pair, (tuple, list)):
            raise TypeError(f"{who}: pair {i} is a {type_name(pair)}; allowed is a tuple (out, lse)")
        if pair and all(isinstance(x, tuple) for x in pair):
            raise TypeError(f"{who}: pair {i} holds tuples; allowed is a tuple (out, lse). Call merge(*pairs)")
        if len(pair) != 2:
            raise TypeError(f"{who}: pair {i} is a {type_name(pair)} of {len(pair)}; allowed is a tuple (out, lse)")
    outs = {f"out of pair {i}": pair[0] for i, pair in enumerate(pairs)}
    lses = {f"lse of pair {i}": pair[1] for i, pair in enumerate(pairs)}
    adapter = common_adapter(who, outs | lses)
    out_views = {name: adapter.view(out, layout) for name, out in outs.items()}
    lse_views = {name: adapter.view(lse) for name, lse in lses.items()}
    dtype = check_floats(who, out_views)
    check_devices(who, out_views | lse_views)
    first = out_views["out of pair 0"]
    of = sizes(who, "out of pair 0", first, layout)
    for name, view in out_views.items():
        check_shape(who, name, view, first.shape, "the shape of pair 0's out")
    for name, view in lse_views.items():
        check_shape(
            who, name, view, (of.batch, of.heads, of.tokens), "(batch, heads, queries) of its out, in both layouts"
        )
        check_dtype(who, name, view, lse_dtype(dtype))

    xp = adapter.namespace(pairs[0][0])
    if xp is None:
        raise TypeError(f"{who}: arrays of {adapter.name} have no operations to merge them with; convert them first")
    with np.errstate(all="ignore"):  # NaN and infinity are results here, not warnings
        return merge_arrays(xp, pairs, layout)


def merge_arrays(xp: Any, pairs: Sequence[tuple[Any, Any]], layout: Layout) -> tuple[Any, Any]:
    """The computation of `merge` in functions of the Python array API, on checked arrays."""
    top = pairs[0][1]
    for _, lse in pairs[1:]:
        top = xp.maximum(top, lse)
    zero = xp.zeros_like(top)
    shift = xp.where(xp.isinf(top), zero, top)  # a row that is empty in all pairs: exp(-inf - 0) = 0
    empty = [lse == -xp.inf for _, lse in pairs]
    # Nothing of an empty row may reach the sums, nor a gradient: not even 0 times NaN, so what goes in is replaced too.
    weights = [xp.where(none, zero, xp.exp(xp.where(none, zero, lse - shift))) for none, (_, lse) in zip(empty, pairs)]
    total = weights[0]
    for weight in weights[1:]:
        total = total + weight
    safe = xp.where(total == 0, xp.ones_like(total), total)
    merged: Any = None
    seen = xp.zeros_like(empty[0])  # rows that hold something already
    for (out, lse), none, weight in zip(pairs, empty, weights):
        part = xp.astype(out, lse.dtype, copy=False)
        part = xp.where(column(xp, none, layout), xp.zeros_like(part), part) * column(xp, weight / safe, layout)
        if merged is None:
            merged = part
        else:  # neither adding to nothing nor adding nothing may touch a bit, and -0 + 0 would
            both = xp.where(column(xp, seen, layout), merged + part, part)
            merged = xp.where(column(xp, none, layout), merged, both)
        seen = seen | ~none
    return xp.astype(merged, pairs[0][0].dtype, copy=False), xp.where(total == 0, top, shift + xp.log(safe))


def column(xp: Any, x: Any, layout: Layout) -> Any:
    """(batch, heads, M) -> the shape that broadcasts over out, (batch, heads, M, 1) or (batch, M, heads, 1)."""
    return xp.expand_dims(x if layout == "bhnd" else xp.permute_dims(x, (0, 2, 1)), axis=-1)
