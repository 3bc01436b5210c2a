"""The Numba kernels as a backend: what each operation needs to run, and its call."""

from __future__ import annotations

from typing import Any

from llsa_np.backends import Case, Room, Work
from llsa_np.gpu.numba_cuda.attend import attend, attend_spaces
from llsa_np.gpu.numba_cuda.attend_backward import attend_backward, backward_spaces
from llsa_np.gpu.numba_cuda.cuda import device_array, on_device, stream_at
from llsa_np.gpu.numba_cuda.pool import pool, pool_spaces
from llsa_np.gpu.numba_cuda.select import select, select_spaces
from llsa_np.hierarchy import Hierarchy
from llsa_np.options import AttendOptions
from llsa_np.selection import Selection

Spaces = list[tuple[tuple[int, ...], str]]


def device_arrays(arrays: Any) -> list[Any]:
    """Arrays of any framework as kernels take them."""
    return [device_array(x) for x in arrays]


class NumbaCudaBackend:
    """Serves every case whose arrays lie on a CUDA device, in every dtype, with float32 products in full precision."""

    name = "numba_cuda"

    def refusals(self, case: Case) -> list[str]:
        """None: whatever passes the checks is served."""
        return []

    def spaces(self, work: Work) -> Spaces:
        """The workspace of an operation."""
        of = work
        if of.operation == "pool":
            return pool_spaces(of.dtype, of.batch, of.kv_heads, of.dim, of.key_hierarchy)
        if of.operation == "select":
            return select_spaces(of.batch, of.heads, of.query_hierarchy, of.key_hierarchy, of.topk)
        if of.operation == "attend":
            return attend_spaces(
                of.dtype,
                of.batch,
                of.heads,
                of.query_hierarchy.tokens,
                of.value_dim,
                of.key_hierarchy.block_size,
                of.options,
            )
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
            levels = [device_arrays(arrays) for arrays in (q_levels, k_levels)]
            stream, spaces = stream_at(room.stream), device_arrays(room.arrays)
            select(*levels, hierarchy, device_arrays(out), spaces, room.dtype, stream)

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
            gradients = [None if x is None else device_array(x) for x in (dq, dk, dv)]
            attend_backward(
                device_array(dout),
                device_array(q),
                device_arrays(k_levels),
                device_arrays(v_levels),
                device_array(out),
                device_array(lse),
                None if dlse is None else device_array(dlse),
                device_arrays(selection),
                selection.query_hierarchy,
                selection.key_hierarchy,
                options,
                *gradients,
                device_arrays(room.arrays),
                room.dtype,
                stream_at(room.stream),
            )


backend = NumbaCudaBackend()
