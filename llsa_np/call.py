"""What happens to a call's arguments before a backend sees them: checked once, viewed, and given results to fill."""

from __future__ import annotations

from typing import Any, NamedTuple

from llsa_np.adapters import Adapter, View, common_adapter
from llsa_np.backends import Backend, Case, Room, Work, check_backend, choose
from llsa_np.checks import (
    Sizes,
    check_devices,
    check_dtype,
    check_floats,
    check_is_selection,
    check_queries_keys,
    check_selection,
    check_shape,
    lse_dtype,
)
from llsa_np.hierarchy import Hierarchy, hierarchy_of
from llsa_np.options import AttendOptions, Layout, check_layout
from llsa_np.recording import Recording
from llsa_np.selection import Selection

NO_SELECTION: Any = object()
"""Stands for the argument that `attention` and `select` do not have; None would be a mistake of the caller's."""

NOT_IN_LAYOUT = ("lse", "dlse")
"""(batch, heads, queries) in both layouts."""


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
        return chosen(self.backend, self.adapter, self.views["q"], case)

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
        pooled = [level.array for _, level in empty_levels(self.adapter, view, self.sizes[name], hierarchy, "bhnd")]
        of = self.sizes[name]
        work = Work("pool", self.dtype, of.batch, of.heads, of.heads, of.dim, of.dim, hierarchy, hierarchy)
        kernels.pool(view.array, hierarchy, pooled, lend(kernels, self.adapter, view, work))
        return [view.array, *pooled]

    def select(
        self, kernels: Backend, k_levels: list[Any], key_hierarchy: Hierarchy, topk: tuple[int, ...]
    ) -> Selection:
        q = self.sizes["q"]
        hierarchy = hierarchy_of(q.tokens, key_hierarchy.block_size, key_hierarchy.levels)
        results = [
            self.adapter.empty((q.batch, q.heads, length, k), "int32", self.views["q"])
            for length, k in zip(hierarchy.lengths[1:], topk, strict=True)
        ]
        q_levels = self.levels(kernels, "q", hierarchy)
        room = lend(kernels, self.adapter, self.views["q"], self.work("select", hierarchy, key_hierarchy, topk))
        kernels.select(q_levels[1:], k_levels[1:], key_hierarchy, [view.array for _, view in results], room)
        return Selection._made(tuple(array for array, _ in results), q.batch, q.heads, topk, hierarchy, key_hierarchy)

    def attend(
        self, kernels: Backend, k_levels: list[Any], v_levels: list[Any], selection: Selection, options: AttendOptions
    ) -> tuple[Any, Any]:
        q, view = self.sizes["q"], self.views["q"]
        out, out_view = self.adapter.empty((q.batch, q.heads, q.tokens, self.sizes["v"].dim), None, view, self.layout)
        lse, lse_view = self.adapter.empty((q.batch, q.heads, q.tokens), lse_dtype(self.dtype), view)
        work = self.work("attend", selection.query_hierarchy, selection.key_hierarchy, selection.topk, options)
        room, seen = lend(kernels, self.adapter, view, work), self.seen(selection)
        kernels.attend(view.array, k_levels, v_levels, seen, options, out_view.array, lse_view.array, room)
        return out, lse

    def seen(self, selection: Selection) -> Selection:
        """A Selection as the backend sees it."""
        return selection._with_arrays(self.adapter.view(x).array for x in selection)

    def empty_like(self, name: str) -> tuple[Any, Any]:
        """A new array of an argument's shape, dtype and layout: for the caller, and as the backend sees it."""
        array, view = self.adapter.empty(tuple(self.sizes[name]), None, self.views[name], self.layout)
        return array, view.array


def chosen(name: str, adapter: Adapter, view: View, case: Case) -> Backend:
    """The backend for a call with arrays like this one; where the call is only recorded, such that nothing runs."""
    backend: Backend = choose(name, view.device, case)
    stream = adapter.stream(view)
    return stream.of(backend) if isinstance(stream, Recording) else backend


def lend(kernels: Backend, adapter: Adapter, like: View, work: Work) -> Room:
    """The workspace of an operation, allocated beside `like` by the caller's framework, and the caller's stream."""
    stream = adapter.stream(like)
    arrays = [adapter.empty(shape, dtype, like)[1].array for shape, dtype in kernels.spaces(work)]
    return Room(arrays, stream, like.device, work.dtype)


def prepare(who: str, backend: Any, layout: Any, arrays: dict[str, Any], selection: Any = NO_SELECTION) -> Call:
    """The checks that calls with queries and keys share, in this order: is the backend there, are the arrays what it
    takes, do they fit together."""
    backend = check_backend(who, backend)
    layout = check_layout(who, layout)
    selected: dict[str, Any] = {}
    if selection is not NO_SELECTION:
        selected = {f"level {i} of selection": x for i, x in enumerate(check_is_selection(who, selection), 1)}
    adapter = common_adapter(who, arrays | selected)
    views = {name: adapter.view(x, "bhnd" if name in NOT_IN_LAYOUT else layout) for name, x in arrays.items()}
    of = check_queries_keys(who, {name: view for name, view in views.items() if name in ("q", "k", "v")}, layout)
    dtype = check_floats(who, {name: view for name, view in views.items() if name not in NOT_IN_LAYOUT})
    of_selection = {name: adapter.view(x) for name, x in selected.items()}
    check_devices(who, views | of_selection)
    if of_selection:
        check_selection(who, selection, of, of_selection)
    if "dout" in views:
        check_results(who, views, of, dtype, layout)
    return Call(who, backend, layout, adapter, views, of, dtype)


def check_results(who: str, views: dict[str, View], of: dict[str, Sizes], dtype: str, layout: Layout) -> None:
    """out, lse and their gradients have the shapes and dtypes that `attend` gives for these inputs."""
    q, value_dim = of["q"], of["v"].dim
    shape = (q.batch, q.heads, q.tokens, value_dim) if layout == "bhnd" else (q.batch, q.tokens, q.heads, value_dim)
    for name in ("out", "dout"):
        check_shape(who, name, views[name], shape, "the shape of attend's out for these q and v")
    for name in ("lse", "dlse"):
        if name in views:
            check_shape(who, name, views[name], (q.batch, q.heads, q.tokens), "(batch, heads, queries) in both layouts")
            check_dtype(who, name, views[name], lse_dtype(dtype))


def empty_levels(
    adapter: Adapter, view: View, of: Sizes, hierarchy: Hierarchy, layout: Layout
) -> list[tuple[Any, View]]:
    """New arrays for levels 1..L beside an argument: for the caller, and as the backend sees them."""
    return [adapter.empty((of.batch, of.heads, length, of.dim), None, view, layout) for length in hierarchy.lengths[1:]]
