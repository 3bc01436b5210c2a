"""Hierarchical Top-K: which tokens of every level a query keeps (spec.md, Selection).

Three kernels tell how to keep the K best of a list. `select_serial` has one thread for each query, which puts what it
meets into a short sorted list. `select_bitonic` has all threads sort, by a network of comparisons that does not depend
on the data. `select_by_bits` has no list: it works out the K-th largest score bit by bit, and serves any K.
"""

from __future__ import annotations

from typing import Any

from llsa_np.gpu.numba_cuda.attend import Spaces, family, rows_above
from llsa_np.gpu.numba_cuda.cuda import SIMULATED, launch
from llsa_np.gpu.numba_cuda.select_bitonic import select_bitonic_kernel
from llsa_np.gpu.numba_cuda.select_by_bits import BITS_BLOCKS, BITS_THREADS, select_by_bits_kernel
from llsa_np.gpu.numba_cuda.select_serial import select_serial_kernel
from llsa_np.gpu.numba_cuda.tiles import Shape, shape_for, tiling
from llsa_np.hierarchy import Hierarchy

SERIAL_MOST = 2 if SIMULATED else 4
"""The largest K for which one thread with a list is faster than all threads sorting."""


def form_of(topk: int, shape: Shape) -> str:
    """Which of the kernels keeps K: "serial", "bitonic" or "bits"."""
    if topk <= SERIAL_MOST:
        return "serial"
    return "bitonic" if topk <= shape.BS else "bits"


def select_kernels(dtype: str, block_size: int) -> list[Any]:
    """All that selection needs, for any K."""
    shape = shape_for(dtype, block_size)
    return [select_serial_kernel(dtype, shape), select_bitonic_kernel(dtype, shape), select_by_bits_kernel(dtype)]


def select_spaces(
    dtype: str,
    batch: int,
    heads: int,
    query_hierarchy: Hierarchy,
    hierarchy: Hierarchy,
    topk: tuple[int, ...],
) -> Spaces:
    """Room for the scores of BITS_BLOCKS queries, if any level needs it."""
    most = 0
    for level in range(1, hierarchy.levels + 1):
        if form_of(topk[level - 1], shape_for(dtype, hierarchy.block_size)) == "bits":
            candidates = hierarchy.lengths[level]
            if level < hierarchy.levels:
                candidates = min(topk[level], hierarchy.lengths[level + 1]) * min(hierarchy.block_size, candidates)
            most = max(most, candidates)
    rows = batch * heads * query_hierarchy.lengths[1]
    return [((min(rows, BITS_BLOCKS) if most else 0, most), "int64")]


def select(
    q_levels: list[Any],
    k_levels: list[Any],
    hierarchy: Hierarchy,
    selected: list[Any],
    spaces: list[Any],
    dtype: str,
    stream: Any,
) -> None:
    """S_l for l = L down to 1, one launch a level. q_levels, k_levels, selected: levels 1..L."""
    shape = shape_for(dtype, hierarchy.block_size)
    for level in range(hierarchy.levels, 0, -1):
        q, k, rows = q_levels[level - 1], k_levels[level - 1], selected[level - 1]
        batch, heads, queries, topk = rows.shape
        _, COLUMNS, *relations = family(level, hierarchy, selected)
        arrays = (q, k, rows_above(level, selected), rows)
        B = hierarchy.block_size
        form = form_of(topk, shape)
        if form == "bits":
            rows_here = batch * heads * queries
            blocks = min(rows_here, BITS_BLOCKS)
            launch(
                select_by_bits_kernel(dtype),
                blocks,
                BITS_THREADS,
                stream,
                *(*arrays, spaces[0], rows_here, topk, B, COLUMNS, *relations, blocks),
            )
        else:
            tiles = tiling(queries, hierarchy.block_size, shape.BT)
            kernel_of = select_serial_kernel if form == "serial" else select_bitonic_kernel
            launch(
                kernel_of(dtype, shape),
                batch * heads * tiles.TILES,
                shape.THREADS,
                stream,
                *(*arrays, *tiles, topk, B, COLUMNS, *relations),
            )
