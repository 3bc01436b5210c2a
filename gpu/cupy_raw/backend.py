"""The CUDA C++ kernels as a backend: what they serve, and what each operation launches, which is recorded."""

from __future__ import annotations

from typing import Any

from llsa_np.backends import Case, Room, Work
from llsa_np.gpu.cupy_raw.attend import attend, attend_kernel
from llsa_np.gpu.cupy_raw.attend_backward import attend_backward, backward_kernels, backward_spaces
from llsa_np.gpu.cupy_raw.pool import pool, pool_kernels, pool_spaces
from llsa_np.gpu.cupy_raw.program import BYTES, Launches, precompile
from llsa_np.gpu.cupy_raw.select import select, select_kernel
from llsa_np.gpu.cupy_raw.specialisations import (
    BLOCK_SIZES,
    DIM_STEP,
    LEAST_DIM,
    MOST_DIM,
    MOST_TOPK,
    tile_for,
)
from llsa_np.hierarchy import Hierarchy
from llsa_np.options import AttendOptions
from llsa_np.selection import Selection

LEAST_ARCH = 80
Spaces = list[tuple[tuple[int, ...], str]]


class CupyRawBackend:
    """Serves float16, bfloat16 and float32 on CUDA devices of compute capability 8.0 and up."""

    name = "cupy_raw"

    def refusals(self, case: Case) -> list[str]:
        """What is outside of the kernels' specialisations."""
        reasons = []
        if case.dtype not in BYTES:
            reasons.append(f"serves {', '.join(BYTES)}, not {case.dtype}")
        for name, dim in (("D", case.dim), ("Dv", case.value_dim)):
            if dim % DIM_STEP or not LEAST_DIM <= dim <= MOST_DIM:
                reasons.append(f"serves {name} of {LEAST_DIM}..{MOST_DIM} in steps of {DIM_STEP}, not {dim}")
        if case.block_size not in BLOCK_SIZES:
            reasons.append(f"serves block_size {', '.join(map(str, BLOCK_SIZES))}, not {case.block_size}")
        if any(k > MOST_TOPK for k in case.topk):
            reasons.append(f"serves topk of 1..{MOST_TOPK}, not {max(case.topk)}")
        return reasons

    def spaces(self, work: Work) -> Spaces:
        """The workspace of an operation."""
        if work.operation == "pool":
            return pool_spaces(work.batch, work.kv_heads, work.dim, work.key_hierarchy)
        if work.operation == "attend_backward" and work.options is not None:
            shapes = (work.batch, work.heads, work.kv_heads, work.dim, work.value_dim)
            hierarchies = (work.query_hierarchy, work.key_hierarchy)
            return backward_spaces(*shapes, *hierarchies, work.topk, work.options, work.needs)
        return []

    def precompile(self, case: Case, backward: bool, arch: str | None) -> None:
        """Compile every kernel of the case, for arguments whose rows can be moved in pieces and for others."""
        if arch is not None and int("".join(filter(str.isdigit, arch))) < LEAST_ARCH:
            raise NotImplementedError(
                f"{case.operation}: cupy_raw serves sm_{LEAST_ARCH} and up, not {arch}; there, numba_cuda does"
            )
        tile = tile_for(case.dtype, case.dim)
        wider = tile_for(case.dtype, max(case.dim, case.value_dim))
        kernels = [select_kernel(tile, True)]  # it takes pooled levels alone, whose rows always can
        for whole in (True, False):
            kernels += [*pool_kernels(case.dtype, case.block_size, whole), attend_kernel(wider, whole)]
            kernels += backward_kernels(wider, whole) if backward else []
        precompile(kernels, arch)

    def prepared(self, launches: list[Any], places: dict[int, tuple[int, int]], device: str) -> Launches:
        """What was recorded, ready to be enqueued."""
        return Launches(launches, places, device)

    def pool(self, x: Any, hierarchy: Hierarchy, out: list[Any], room: Room) -> None:
        """Fill levels 1..L."""
        pool(x, hierarchy, out, room.arrays, room.dtype, room.stream)

    def select(
        self, q_levels: list[Any], k_levels: list[Any], hierarchy: Hierarchy, out: list[Any], room: Room
    ) -> None:
        """Fill S_1 .. S_L."""
        select(q_levels, k_levels, hierarchy, out, room.dtype, room.stream)

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
        hierarchy, selected = selection.key_hierarchy, list(selection)
        attend(q, k_levels, v_levels, selected, hierarchy, options, out, lse, room.dtype, room.stream)

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
        attend_backward(
            dout,
            q,
            k_levels,
            v_levels,
            out,
            lse,
            dlse,
            list(selection),
            selection.query_hierarchy,
            selection.key_hierarchy,
            options,
            dq,
            dk,
            dv,
            room.arrays,
            room.dtype,
            room.stream,
        )


backend = CupyRawBackend()
