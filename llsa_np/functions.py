"""The public functions: each checks its arguments once, chooses a backend, has results allocated and filled."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from llsa_np.adapters import Adapter, View, common_adapter, type_name
from llsa_np.backends import Backend, BackendName, Case, Room, Work, check_backend, choose, serves_gpu
from llsa_np.checks import (
    Sizes,
    check_devices,
    check_dtype,
    check_dtype_name,
    check_floats,
    check_queries_keys,
    check_selection,
    check_shape,
    lse_dtype,
    sizes,
)
from llsa_np.copies import copied_to_the_device
from llsa_np.hierarchy import MAX_LEVELS, Hierarchy
from llsa_np.options import (
    AttendOptions,
    Layout,
    Precision,
    TopK,
    check_attend_options,
    check_block_size,
    check_integer,
    check_layout,
    check_levels,
    check_needs,
    check_pyramid,
    check_topk,
)
from llsa_np.selection import Selection


@copied_to_the_device
def attention(
    q: Any,
    k: Any,
    v: Any,
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
    never moves them; NumPy arrays with a GPU backend named are copied to the GPU, and the results back.
    precision: "tf32" permits float32 products on matrix units in reduced precision; "full" does not.

    Returns out, in q's dtype and layout, (batch, heads, M, Dv); with return_lse (out, lse), lse = log Z_t, natural
    logarithm, (batch, heads, M) in both layouts, float32 (float64 for float64). Differentiable where the framework
    differentiates; no gradient flows through selection.

    Raises TypeError for dtypes or array types that do not fit, ValueError for shapes, devices and options,
    RuntimeError for a named backend that cannot run here, NotImplementedError for a case it does not serve.
    Work O(N log N), no array of M x N; sums in float32 (float64); errors: spec.md, Rounding; same bits on every run.
    Source: spec.md; arXiv 2512.16615.
    """
    who = "attention"
    call = _prepare(who, backend, layout, {"q": q, "k": k, "v": v})
    block_size, levels, topks = check_pyramid(who, block_size, levels, topk, call.sizes["k"].tokens)
    options = check_attend_options(who, enrich, reweight, scale, precision, levels=levels, dim=call.sizes["q"].dim)
    kernels = call.choose(block_size, topks)
    key_hierarchy = Hierarchy(call.sizes["k"].tokens, block_size, levels)
    k_levels = call.levels(kernels, "k", key_hierarchy)
    selection = call.select(kernels, k_levels, key_hierarchy, topks)
    v_levels = call.levels(kernels, "v", key_hierarchy)
    out, lse = call.attend(kernels, k_levels, v_levels, selection, options)
    return (out, lse) if return_lse else out


@copied_to_the_device
def select(
    q: Any,
    k: Any,
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
    call = _prepare(who, backend, layout, {"q": q, "k": k})
    block_size, levels, topks = check_pyramid(who, block_size, levels, topk, call.sizes["k"].tokens)
    kernels = call.choose(block_size, topks)
    key_hierarchy = Hierarchy(call.sizes["k"].tokens, block_size, levels)
    return call.select(kernels, call.levels(kernels, "k", key_hierarchy), key_hierarchy, topks)


@copied_to_the_device
def attend(
    q: Any,
    k: Any,
    v: Any,
    selection: Selection,
    *,
    enrich: Iterable[int] | None = None,
    reweight: bool = True,
    scale: float | None = None,
    layout: Layout = "bhnd",
    backend: BackendName = "auto",
    precision: Precision = "full",
) -> tuple[Any, Any]:
    """Attention under a given selection: out_t as in `attention` and lse_t = log Z_t.

    q: (batch, heads, M, D). k: (batch, kv_heads, N, D). v: (batch, kv_heads, N, Dv). selection: made for these sizes by
    `select` or from outside. Other arguments as in `attention`. A row without candidates has out 0 and lse -inf.
    Returns (out, lse): out in q's dtype and layout, lse (batch, heads, M) in both, float32 (float64 for float64).
    Differentiable in both results where the framework differentiates. Raises as `attention`, and TypeError for a
    selection that is not one or is of another framework, ValueError for one made for other shapes.
    Source: spec.md, Attention.
    """
    who = "attend"
    call = _prepare(who, backend, layout, {"q": q, "k": k, "v": v}, selection)
    options = check_attend_options(
        who, enrich, reweight, scale, precision, levels=selection.levels, dim=call.sizes["q"].dim
    )
    kernels = call.choose(selection.block_size, selection.topk)
    k_levels = call.levels(kernels, "k", selection.key_hierarchy)
    v_levels = call.levels(kernels, "v", selection.key_hierarchy)
    return call.attend(kernels, k_levels, v_levels, selection, options)


@copied_to_the_device
def attend_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    selection: Selection,
    *,
    dlse: Any | None = None,
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
    call = _prepare(who, backend, layout, arrays, selection)
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
            selection,
            options,
            gradients["q"][1],
            gradients["k"][1],
            gradients["v"][1],
            lend(kernels, call.adapter, call.views["q"], work),
        )
    return gradients["q"][0], gradients["k"][0], gradients["v"][0]


@copied_to_the_device
def pool(
    x: Any, *, block_size: int = 16, levels: int = 1, layout: Layout = "bhnd", backend: BackendName = "auto"
) -> tuple[Any, ...]:
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
    hierarchy = Hierarchy(of.tokens, block_size, check_levels(who, levels, block_size))
    kernels = choose(name, view.device, Case(who, dtype, of.dim, of.dim, block_size, ()))
    results = _empty_levels(adapter, view, of, hierarchy, layout)
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
    """Compile ahead what calls with this dtype, these head dims and options will need, in every layout and alignment.

    dtype: a NumPy or ml_dtypes element type or its name. dim: D. value_dim: Dv, D if None. levels=None: any L.
    arch: which GPU to compile for, e.g. "sm_90a"; None: the one that is here. The NumPy backend compiles nothing, and
    with it, as with "auto" where there is no GPU, this only checks its arguments, which raise as in `attention`.
    """
    who = "precompile"
    backend_name = check_backend(who, backend)
    dtype_name = check_dtype_name(who, dtype)
    dim = check_integer(who, "dim", dim, 1, None)
    value_dim = dim if value_dim is None else check_integer(who, "value_dim", value_dim, 1, None)
    block_size = check_block_size(who, block_size)
    if levels is None:
        topk = tuple(topk) if isinstance(topk, Iterable) else (topk,)
        topks = check_topk(who, topk, len(topk))
        enrichable = MAX_LEVELS
    else:
        enrichable = check_levels(who, levels, block_size)
        topks = check_topk(who, topk, enrichable)
    check_attend_options(who, enrich, reweight, None, precision, levels=enrichable, dim=dim)
    if not isinstance(backward, (bool, np.bool_)):
        raise ValueError(f"{who}: backward is {backward!r}; allowed is True or False")
    if arch is not None and not (isinstance(arch, str) and arch.startswith("sm_")):
        raise ValueError(f"{who}: arch is {arch!r}; allowed is None or a name such as 'sm_90a'")
    # The host's backend, or that of a GPU if one was named or is here.
    on_host = not serves_gpu() if backend_name == "auto" else backend_name == "numpy"
    case = Case(who, dtype_name, dim, value_dim, block_size, topks)
    choose(backend_name, "cpu" if on_host else "cuda", case).precompile(case, bool(backward), arch)


class Call(NamedTuple):
    """A call whose arrays are checked: how to look at them, how large they are, and how to make more of their kind."""

    who: str
    backend: str
    layout: Layout
    adapter: Adapter
    views: dict[str, View]
    sizes: dict[str, Sizes]
    dtype: str

    def choose(self, block_size: int, topk: tuple[int, ...]) -> Backend:
        value_dim = self.sizes["v"].dim if "v" in self.sizes else self.sizes["q"].dim
        case = Case(self.who, self.dtype, self.sizes["q"].dim, value_dim, block_size, topk)
        return choose(self.backend, self.views["q"].device, case)

    def work(
        self,
        operation: str,
        query_hierarchy: Hierarchy,
        key_hierarchy: Hierarchy,
        topk: tuple[int, ...],
        options: AttendOptions | None = None,
        needs: frozenset[str] = frozenset(),
    ) -> Work:
        """What the workspace of an operation on these arrays is planned from."""
        q, k = self.sizes["q"], self.sizes["k"]
        value_dim = self.sizes["v"].dim if "v" in self.sizes else q.dim
        shapes = (q.batch, q.heads, k.heads, q.dim, value_dim)
        return Work(operation, self.dtype, *shapes, query_hierarchy, key_hierarchy, topk, options, needs)

    def levels(self, kernels: Backend, name: str, hierarchy: Hierarchy) -> list[Any]:
        """Levels 0..L of an argument."""
        view = self.views[name]
        pooled = [level.array for _, level in _empty_levels(self.adapter, view, self.sizes[name], hierarchy, "bhnd")]
        of = self.sizes[name]
        work = Work("pool", self.dtype, of.batch, of.heads, of.heads, of.dim, of.dim, hierarchy, hierarchy)
        kernels.pool(view.array, hierarchy, pooled, lend(kernels, self.adapter, view, work))
        return [view.array, *pooled]

    def select(
        self, kernels: Backend, k_levels: list[Any], key_hierarchy: Hierarchy, topk: tuple[int, ...]
    ) -> Selection:
        q = self.sizes["q"]
        hierarchy = Hierarchy(q.tokens, key_hierarchy.block_size, key_hierarchy.levels)
        results = [
            self.adapter.empty((q.batch, q.heads, length, k), "int32", self.views["q"])
            for length, k in zip(hierarchy.lengths[1:], topk, strict=True)
        ]
        q_levels = self.levels(kernels, "q", hierarchy)
        room = lend(kernels, self.adapter, self.views["q"], self.work("select", hierarchy, key_hierarchy, topk))
        kernels.select(q_levels[1:], k_levels[1:], key_hierarchy, [view.array for _, view in results], room)
        return Selection(
            [array for array, _ in results],
            block_size=hierarchy.block_size,
            query_tokens=q.tokens,
            key_tokens=key_hierarchy.tokens,
            validate=False,
        )

    def attend(
        self, kernels: Backend, k_levels: list[Any], v_levels: list[Any], selection: Selection, options: Any
    ) -> tuple[Any, Any]:
        q, view = self.sizes["q"], self.views["q"]
        out, out_view = self.adapter.empty((q.batch, q.heads, q.tokens, self.sizes["v"].dim), None, view, self.layout)
        lse, lse_view = self.adapter.empty((q.batch, q.heads, q.tokens), lse_dtype(self.dtype), view)
        work = self.work("attend", selection.query_hierarchy, selection.key_hierarchy, selection.topk, options)
        room = lend(kernels, self.adapter, view, work)
        kernels.attend(view.array, k_levels, v_levels, selection, options, out_view.array, lse_view.array, room)
        return out, lse

    def empty_like(self, name: str) -> tuple[Any, Any]:
        """A new array of an argument's shape, dtype and layout: for the caller, and as the backend sees it."""
        array, view = self.adapter.empty(tuple(self.sizes[name]), None, self.views[name], self.layout)
        return array, view.array


def lend(kernels: Backend, adapter: Adapter, like: View, work: Work) -> Room:
    """The workspace of an operation, allocated beside `like` by the caller's framework, and the caller's stream."""
    arrays = [adapter.empty(shape, dtype, like)[1].array for shape, dtype in kernels.spaces(work)]
    return Room(arrays, adapter.stream(like), like.device, work.dtype)


def _prepare(who: str, backend: Any, layout: Any, arrays: dict[str, Any], *selection: Any) -> Call:
    """The checks that all calls with queries and keys share, in this order: is the backend there, are the arrays what
    it takes, do they fit together. selection: the call's Selection, if the operation has one."""
    backend = check_backend(who, backend)
    layout = check_layout(who, layout)
    selected = {}
    for given in selection:
        if not isinstance(given, Selection):
            raise TypeError(
                f"{who}: selection is a {type_name(given)}; allowed is a llsa_np.Selection, "
                "from select() or Selection(arrays, ...)"
            )
        selected["selection"] = given[1]
    adapter = common_adapter(who, arrays | selected)
    views = {name: adapter.view(x, "bhnd" if name in ("lse", "dlse") else layout) for name, x in arrays.items()}
    of = check_queries_keys(who, {name: view for name, view in views.items() if name in ("q", "k", "v")}, layout)
    dtype = check_floats(who, {name: view for name, view in views.items() if name not in ("lse", "dlse")})
    check_devices(who, views | {name: adapter.view(x) for name, x in selected.items()})
    for given in selection:
        check_selection(who, given, of)
    if "dout" in views:
        _check_results(who, views, of, dtype, layout)
    return Call(who, backend, layout, adapter, views, of, dtype)


def _check_results(who: str, views: dict[str, View], of: dict[str, Sizes], dtype: str, layout: Layout) -> None:
    """out, lse and their gradients have the shapes and dtypes that `attend` gives for these inputs."""
    q, value_dim = of["q"], of["v"].dim
    shape = (q.batch, q.heads, q.tokens, value_dim) if layout == "bhnd" else (q.batch, q.tokens, q.heads, value_dim)
    for name in ("out", "dout"):
        check_shape(who, name, views[name], shape, "the shape of attend's out for these q and v")
    for name in ("lse", "dlse"):
        if name in views:
            check_shape(who, name, views[name], (q.batch, q.heads, q.tokens), "(batch, heads, queries) in both layouts")
            check_dtype(who, name, views[name], lse_dtype(dtype))


def _empty_levels(
    adapter: Adapter, view: View, of: Sizes, hierarchy: Hierarchy, layout: Layout
) -> list[tuple[Any, View]]:
    return [adapter.empty((of.batch, of.heads, length, of.dim), None, view, layout) for length in hierarchy.lengths[1:]]
