"""The Numba kernels as a backend: what each operation needs to run, and its call."""

from __future__ import annotations

from typing import Any

from llsa_np.backends import Case, Room, Work
from llsa_np.gpu.numba_cuda.attend import attend, attend_kernels, attend_spaces
from llsa_np.gpu.numba_cuda.attend_backward import attend_backward, backward_kernels, backward_spaces
from llsa_np.gpu.numba_cuda.cuda import device_array, on_device, stream_at
from llsa_np.gpu.numba_cuda.pool import pool, pool_kernels, pool_spaces
from llsa_np.gpu.numba_cuda.select import select, select_kernels, select_spaces
from llsa_np.hierarchy import Hierarchy
from llsa_np.options import AttendOptions
from llsa_np.selection import Selection

Spaces = list[tuple[tuple[int, ...], str]]


def device_arrays(arrays: Any) -> list[Any]:
    """Arrays of any framework as kernels take them."""
    return [device_array(x) for x in arrays]


def needed_spaces(of: Work) -> Spaces:
    """The workspace of an operation, each part planned beside the kernels that use it."""
    if of.operation == "pool":
        return pool_spaces(of.dtype, of.batch, of.kv_heads, of.dim, of.key_hierarchy)
    if of.operation == "select":
        return select_spaces(of.dtype, of.batch, of.heads, of.query_hierarchy, of.key_hierarchy, of.topk)
    if of.options is None:
        raise ValueError(f"{of.operation}: got no options to plan from")
    if of.operation == "attend":
        queries, block_size = of.query_hierarchy.tokens, of.key_hierarchy.block_size
        return attend_spaces(of.dtype, of.batch, of.heads, queries, of.value_dim, block_size, of.options)
    return backward_spaces(
        of.dtype,
        of.batch,
        of.heads,
        of.kv_heads,
        of.dim,
        of.value_dim,
        of.query_hierarchy,
        of.key_hierarchy,
        of.topk,
        of.options,
        of.needs,
    )


class NumbaCudaBackend:
    """Serves every case whose arrays lie on a CUDA device, in every dtype, with float32 products in full precision."""

    name = "numba_cuda"

    def refusals(self, case: Case) -> list[str]:
        """None: whatever passes the checks is served."""
        return []

    def spaces(self, work: Work) -> Spaces:
        """The workspace of an operation. What an operation can do without is given one element: not every version of
        Numba passes an empty array to a kernel."""
        return [(tuple(max(1, size) for size in shape), dtype) for shape, dtype in needed_spaces(work)]

    def precompile(self, case: Case, backward: bool, arch: str | None) -> None:
        """Compile every kernel of the case, for this GPU."""
        if arch is not None:
            raise NotImplementedError(
                f"{case.operation}: arch is {arch!r}; the numba_cuda backend compiles for the GPU that is here. "
                "Use arch=None"
            )
        for compile_kernels in (pool_kernels, select_kernels, attend_kernels, *([backward_kernels] * backward)):
            compile_kernels(case.dtype, case.block_size)

    def pool(self, x: Any, hierarchy: Hierarchy, out: list[Any], room: Room) -> None:
        """Fill levels 1..L."""
        with on_device(room.device):
            stream, spaces = stream_at(room.stream), device_arrays(room.arrays)
            pool(device_array(x), hierarchy, device_arrays(out), spaces, room.dtype, stream)

    def select(
        self, q_levels: list[Any], k_levels: list[Any], hierarchy: Hierarchy, out: list[Any], room: Room
    ) -> None:
        """Fill S_1 .. S_L."""
        with on_device(room.device):
            q, k = device_arrays(q_levels), device_arrays(k_levels)
            stream, spaces = stream_at(room.stream), device_arrays(room.arrays)
            select(q, k, hierarchy, device_arrays(out), spaces, room.dtype, stream)

    def attend(
        self,
        q: Any,
        k_levels: list[Any],
        v_levels: list[Any],
        selection: Selection,
        options: AttendOptions,
        out: Any,
        lse: Any,
        room: Room,
    ) -> None:
        """Fill out and lse."""
        with on_device(room.device):
            attend(
                device_array(q),
                device_arrays(k_levels),
                device_arrays(v_levels),
                device_arrays(selection),
                selection.key_hierarchy,
                options,
                device_array(out),
                device_array(lse),
                device_arrays(room.arrays),
                room.dtype,
                stream_at(room.stream),
            )

    def attend_backward(
        self,
        dout: Any,
        q: Any,
        k_levels: list[Any],
        v_levels: list[Any],
        out: Any,
        lse: Any,
        dlse: Any | None,
        selection: Selection,
        options: AttendOptions,
        dq: Any | None,
        dk: Any | None,
        dv: Any | None,
        room: Room,
    ) -> None:
        """Fill dq, dk and dv, each unless None."""
        with on_device(room.device):
            attend_backward(
                device_array(dout),
                device_array(q),
                device_arrays(k_levels),
                device_arrays(v_levels),
                device_array(out),
                device_array(lse),
                device_array(dlse),
                device_arrays(selection),
                selection.query_hierarchy,
                selection.key_hierarchy,
                options,
                device_array(dq),
                device_array(dk),
                device_array(dv),
                device_arrays(room.arrays),
                room.dtype,
                stream_at(room.stream),
            )


backend = NumbaCudaBackend()
