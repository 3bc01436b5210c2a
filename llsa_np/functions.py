"""The public functions: each checks its arguments once, chooses a backend, has results allocated and filled."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal, TypeVar, overload

from llsa_np.adapters import common_adapter
from llsa_np.backends import BackendName, Case, Work, check_backend, choose, choose_compiler, serves_gpu
from llsa_np.call import chosen, empty_levels, lend, prepare
from llsa_np.checks import check_dtype_name, check_floats, sizes
from llsa_np.hierarchy import default_levels, hierarchy_of
from llsa_np.options import (
    MAX_LEVELS,
    Layout,
    Precision,
    TopK,
    as_tuple,
    check_attend_options,
    check_block_size,
    check_flag,
    check_integer,
    check_layout,
    check_levels,
    check_needs,
    check_topk,
)
from llsa_np.plans import planned
from llsa_np.selection import Selection
from llsa_np.wrapping import wrapped_by_frameworks

Array = TypeVar("Array")
"""An array of any supported framework: results are of the kind of the arguments."""


@overload
def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    block_size: int = 16,
    levels: int | None = None,
    topk: TopK = 8,
    enrich: Iterable[int] | None = None,
    reweight: bool = True,
    scale: float | None = None,
    layout: Layout = "bhnd",
    return_lse: Literal[False] = False,
    backend: BackendName = "auto",
    precision: Precision = "full",
) -> Array: ...


@overload
def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    block_size: int = 16,
    levels: int | None = None,
    topk: TopK = 8,
    enrich: Iterable[int] | None = None,
    reweight: bool = True,
    scale: float | None = None,
    layout: Layout = "bhnd",
    return_lse: Literal[True],
    backend: BackendName = "auto",
    precision: Precision = "full",
) -> tuple[Array, Array]: ...


@wrapped_by_frameworks
@planned
def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    block_size: int = 16,
    levels: int | None = None,
    topk: TopK = 8,
    enrich: Iterable[int] | None = None,
    reweight: bool = True,
    scale: float | None = None,
    layout: Layout = "bhnd",
    return_lse: bool = False,
    backend: BackendName = "auto",
    precision: Precision = "full",
) -> Any:
    """Log-linear sparse attention: select, then attend, pooling q, k and v once each.

    out_t = sum_l sum_{j in C_l(t)} c_l[j] exp(scale <q_t, k_l[j]>) v_l[j] / Z_t,  Z_t the same sum without v_l.

    q: (batch, heads, M, D). k: (batch, kv_heads, N, D). v: (batch, kv_heads, N, Dv); heads a multiple of kv_heads, head
    h reading kv head h // (heads // kv_heads). All of one dtype, float16, bfloat16, float32 or float64, and of one
    framework and device; any strides. Any M, N >= 1.

    block_size: b, how many tokens of a level a token of the next stands for; at least 2. levels: L, 1..16; None:
    `default_levels(N, block_size)`. topk: how many tokens of each level a query keeps, one int or one per level 1..L.
    enrich: which coarse levels take part in attention; None: all; (): none. reweight: whether a coarse token weighs as
    many tokens as it stands for. scale: of the logits; None: 1 / sqrt(D).
    layout: "bhnd", or "bnhd" for arrays (batch, tokens, heads, dim). backend: "auto" goes by where the arrays are and
    never moves them; "numpy"; "cupy_raw" or "numba_cuda", which copy NumPy arrays to the GPU and the results back.
    precision: "tf32" permits float32 products on matrix units in reduced precision; "full" does not.

    Returns out, in q's dtype and layout, (batch, heads, M, Dv); with return_lse (out, lse), lse = log Z_t, natural
    logarithm, (batch, heads, M) in both layouts, float32 (float64 for float64). Differentiable where the framework
    differentiates; no gradient flows through selection.

    Raises TypeError for dtypes or array types that do not fit, ValueError for shapes, devices and options,
    RuntimeError for a named backend that cannot run here, NotImplementedError for a case it does not serve.
    Work O(N log N), no array of M x N; sums in float32 (float64); errors: spec.md, Rounding; same bits on every run.
    Source: spec.md; arXiv 2512.16615.
    """
    return_lse = check_flag("attention", "return_lse", return_lse)
    out, lse, *_ = attend_selected(
        q,
        k,
        v,
        block_size=block_size,
        levels=levels,
        topk=topk,
        enrich=enrich,
        reweight=reweight,
        scale=scale,
        layout=layout,
        backend=backend,
        precision=precision,
    )
    return (out, lse) if return_lse else out


def attend_selected(
    q: Array,
    k: Array,
    v: Array,
    *,
    block_size: Any = 16,
    levels: Any = None,
    topk: Any = 8,
    enrich: Any = None,
    reweight: Any = True,
    scale: Any = None,
    layout: Any = "bhnd",
    backend: Any = "auto",
    precision: Any = "full",
) -> tuple[Any, ...]:
    """`attention` for those who need its selection too, for gradients: out, lse, S_1 .. S_L."""
    who = "attention"
    call = prepare(who, backend, layout, {"q": q, "k": k, "v": v})
    block_size, levels, topks = pyramid(who, block_size, levels, topk, call.sizes["k"].tokens)
    options = check_attend_options(who, enrich, reweight, scale, precision, levels=levels, dim=call.sizes["q"].dim)
    kernels = call.choose(block_size, topks)
    key_hierarchy = hierarchy_of(call.sizes["k"].tokens, block_size, levels)
    k_levels = call.levels(kernels, "k", key_hierarchy)
    selection = call.select(kernels, k_levels, key_hierarchy, topks)
    v_levels = call.levels(kernels, "v", key_hierarchy)
    out, lse = call.attend(kernels, k_levels, v_levels, selection, options)
    return out, lse, *selection


@wrapped_by_frameworks
@planned
def select(
    q: Array,
    k: Array,
    *,
    block_size: int = 16,
    levels: int | None = None,
    topk: TopK = 8,
    layout: Layout = "bhnd",
    backend: BackendName = "auto",
) -> Selection:
    """S_l(i) = the min(K_l, |C_l(i)|) candidates with the largest <Q_l[i], K_l[j]>, from the coarsest level down.

    Candidates C_L are all tokens of level L; C_l the children of the tokens that query i's parent kept one level up.
    Scores order as +inf > finite > -inf > NaN; -0 equals +0; equal scores go to the lower index.

    q: (batch, heads, M, D). k: (batch, kv_heads, N, D). Arguments as in `attention`.
    Returns a Selection: per level int32 (batch, heads, ceil(M / b**l), K_l), ascending, -1 at the end, in both layouts.
    Not differentiable. Raises as `attention`. Scores accumulate in float32 (float64 for float64).
    Source: spec.md, Selection; arXiv 2512.16615, section 3.
    """
    who = "select"
    call = prepare(who, backend, layout, {"q": q, "k": k})
    block_size, levels, topks = pyramid(who, block_size, levels, topk, call.sizes["k"].tokens)
    kernels = call.choose(block_size, topks)
    key_hierarchy = hierarchy_of(call.sizes["k"].tokens, block_size, levels)
    return call.select(kernels, call.levels(kernels, "k", key_hierarchy), key_hierarchy, topks)


@wrapped_by_frameworks
@planned
def attend(
    q: Array,
    k: Array,
    v: Array,
    selection: Selection,
    *,
    enrich: Iterable[int] | None = None,
    reweight: bool = True,
    scale: float | None = None,
    layout: Layout = "bhnd",
    backend: BackendName = "auto",
    precision: Precision = "full",
) -> tuple[Array, Array]:
    """Attention under a given selection: out_t as in `attention` and lse_t = log Z_t.

    q: (batch, heads, M, D). k: (batch, kv_heads, N, D). v: (batch, kv_heads, N, Dv). selection: made for these sizes by
    `select` or from outside. Other arguments as in `attention`. A row without candidates has out 0 and lse -inf.
    Returns (out, lse): out in q's dtype and layout, lse (batch, heads, M) in both, float32 (float64 for float64).
    Differentiable in both results where the framework differentiates. Raises as `attention`, and TypeError for a
    selection that is not one or is of another framework, ValueError for one made for other shapes.
    Source: spec.md, Attention.
    """
    who = "attend"
    call = prepare(who, backend, layout, {"q": q, "k": k, "v": v}, selection)
    options = check_attend_options(
        who, enrich, reweight, scale, precision, levels=selection.levels, dim=call.sizes["q"].dim
    )
    kernels = call.choose(selection.block_size, selection.topk)
    k_levels = call.levels(kernels, "k", selection.key_hierarchy)
    v_levels = call.levels(kernels, "v", selection.key_hierarchy)
    return call.attend(kernels, k_levels, v_levels, selection, options)


@wrapped_by_frameworks
@planned
def attend_backward(
    dout: Array,
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    selection: Selection,
    *,
    dlse: Array | None = None,
    needs: Iterable[str] = ("q", "k", "v"),
    enrich: Iterable[int] | None = None,
    reweight: bool = True,
    scale: float | None = None,
    layout: Layout = "bhnd",
    backend: BackendName = "auto",
    precision: Precision = "full",
) -> tuple[Any, Any, Any]:
    """Gradients of `attend`: dS = P (dO v^T - <dO, out> + dlse), dq_t = scale sum dS k_l[j].

    dk_l[j] = scale sum_t dS q_t and dv_l[j] = sum_t P dO_t go down through pooling: each token receives dk_l / c_l and
    dv_l / c_l of its ancestor on every level that takes part.

    dout: gradient of out, its shape and dtype. dlse: gradient of lse, or None for zero. out, lse: as `attend` returned
    them, under the same selection and options. needs: which of "q", "k", "v" to compute.
    Returns (dq, dk, dv) in the dtypes, shapes and layout of q, k, v; None for one not in needs.
    Raises as `attend`. Sums in float32 (float64), in a fixed order: the same inputs give the same bits on every run.
    Source: spec.md, Gradients.
    """
    who = "attend_backward"
    arrays = {"q": q, "k": k, "v": v, "dout": dout, "out": out, "lse": lse}
    if dlse is not None:
        arrays["dlse"] = dlse
    call = prepare(who, backend, layout, arrays, selection)
    needed = check_needs(who, needs)
    options = check_attend_options(
        who, enrich, reweight, scale, precision, levels=selection.levels, dim=call.sizes["q"].dim
    )
    kernels = call.choose(selection.block_size, selection.topk)
    gradients = {name: call.empty_like(name) if name in needed else (None, None) for name in ("q", "k", "v")}
    if needed:
        view = {name: v.array for name, v in call.views.items()}
        work = call.work(who, selection.query_hierarchy, selection.key_hierarchy, selection.topk, options, needed)
        kernels.attend_backward(
            view["dout"],
            view["q"],
            call.levels(kernels, "k", selection.key_hierarchy),
            call.levels(kernels, "v", selection.key_hierarchy),
            view["out"],
            view["lse"],
            view.get("dlse"),
            call.seen(selection),
            options,
            gradients["q"][1],
            gradients["k"][1],
            gradients["v"][1],
            lend(kernels, call.adapter, call.views["q"], work),
        )
    return gradients["q"][0], gradients["k"][0], gradients["v"][0]


@wrapped_by_frameworks
@planned
def pool(
    x: Array, *, block_size: int = 16, levels: int = 1, layout: Layout = "bhnd", backend: BackendName = "auto"
) -> tuple[Array, ...]:
    """Means of every level: token j of level l is the mean of x over [j b**l, min((j + 1) b**l, N)).

    x: (batch, heads, N, D) of float16, bfloat16, float32 or float64, any strides. block_size: b, at least 2.
    levels: how many levels, 1..16.
    Returns levels 1..levels, (batch, heads, ceil(N / b**l), D), in x's dtype and layout. Differentiable where the
    framework differentiates. Sums in float32 (float64), each level rounded once. Raises as `attention`.
    Source: spec.md, Pooling.
    """
    who = "pool"
    name = check_backend(who, backend)
    layout = check_layout(who, layout)
    adapter = common_adapter(who, {"x": x})
    view = adapter.view(x, layout)
    of = sizes(who, "x", view, layout)
    dtype = check_floats(who, {"x": view})
    block_size = check_block_size(who, block_size)
    hierarchy = hierarchy_of(of.tokens, block_size, check_levels(who, levels, block_size))
    kernels = chosen(name, adapter, view, Case(who, dtype, of.dim, of.dim, block_size, ()))
    results = empty_levels(adapter, view, of, hierarchy, layout)
    work = Work(who, dtype, of.batch, of.heads, of.heads, of.dim, of.dim, hierarchy, hierarchy)
    kernels.pool(view.array, hierarchy, [level.array for _, level in results], lend(kernels, adapter, view, work))
    return tuple(array for array, _ in results)


def precompile(
    dtype: Any,
    dim: int,
    value_dim: int | None = None,
    *,
    block_size: int = 16,
    levels: int | None = None,
    topk: TopK = 8,
    enrich: Iterable[int] | None = None,
    reweight: bool = True,
    precision: Precision = "full",
    backward: bool = True,
    arch: str | None = None,
    backend: BackendName = "auto",
) -> None:
    """Compile ahead what calls with this dtype, these head dims and options will need, in every layout and alignment,
    for gradients of all inputs and of each alone.

    dtype: a NumPy or ml_dtypes element type or its name. dim: D. value_dim: Dv, D if None. levels=None: any L.
    arch: which GPU to compile for, e.g. "sm_90a", on any machine, by the CUDA C++ kernels ("auto" or "cupy_raw"), into
    their cache on disk; None: the GPU that is here. The NumPy backend compiles nothing, and with it, as with "auto" and
    no arch where there is no GPU, this only checks its arguments, which raise as in `attention`.
    """
    who = "precompile"
    ahead = arch is not None and backend in ("auto", "cupy_raw")  # for a GPU that need not be here
    backend_name = check_backend(who, "auto" if ahead else backend)
    dtype_name = check_dtype_name(who, dtype)
    dim = check_integer(who, "dim", dim, 1, None)
    value_dim = dim if value_dim is None else check_integer(who, "value_dim", value_dim, 1, None)
    block_size = check_block_size(who, block_size)
    if levels is None:  # any number of levels, or as many as topk has entries
        per_level = as_tuple(topk)
        levels = 1 if per_level is None else len(per_level)
        enrichable = MAX_LEVELS if per_level is None else levels
    else:
        enrichable = levels
    topks = check_topk(who, topk, check_levels(who, levels, block_size))
    check_attend_options(who, enrich, reweight, None, precision, levels=enrichable, dim=dim)
    backward = check_flag(who, "backward", backward)
    if arch is not None and not (isinstance(arch, str) and re.fullmatch(r"sm_\d{2,3}[af]?", arch)):
        raise ValueError(f"{who}: arch is {arch!r}; allowed is None or a name such as 'sm_90a'")
    # The host's backend, or that of a GPU if one was named or is here.
    on_host = not serves_gpu() if backend_name == "auto" else backend_name == "numpy"
    case = Case(who, dtype_name, dim, value_dim, block_size, topks)
    if ahead:
        choose_compiler(case).precompile(case, backward, arch)
        return
    choose(backend_name, "cpu" if on_host else "cuda", case).precompile(case, backward, arch)


def pyramid(who: str, block_size: Any, levels: Any, topk: Any, key_tokens: int) -> tuple[int, int, tuple[int, ...]]:
    """(block_size, levels, topk per level 1..L), levels chosen from the number of keys where it is None."""
    block_size = check_block_size(who, block_size)
    levels = check_levels(who, default_levels(key_tokens, block_size) if levels is None else levels, block_size)
    return block_size, levels, check_topk(who, topk, levels)
