"""The host's side of select.cu: one launch for every level, coarsest first."""

from __future__ import annotations

from functools import cache
from struct import Struct
from typing import Any

from llsa_np.gpu.cupy_raw.levels import LEVEL, level_argument
from llsa_np.gpu.cupy_raw.program import ARRAY, NO_ARRAY, Kernel, array, is_whole, launch
from llsa_np.gpu.cupy_raw.specialisations import Tile, tile_for
from llsa_np.hierarchy import Hierarchy

QUERIES = 16
ARGUMENTS = Struct(f"{ARRAY}{LEVEL}Q6i0q")


@cache
def select_kernel(tile: Tile, whole: bool) -> Kernel:
    """128 candidates at a time, or 64 where their rows are long; 16 for each warp."""
    candidates = 128 if tile.row_bytes <= 256 else 64
    warps = candidates // 16
    shared = (QUERIES + candidates) * tile.pitch_bytes
    return Kernel(
        "select.cu",
        "select",
        (*tile.defines(whole), ("MOST_ROW_REGISTERS", "128"), ("TILE", str(candidates)), ("WARPS", str(warps))),
        warps * 32,
        shared,
    )


def select(
    q_levels: list[Any], k_levels: list[Any], hierarchy: Hierarchy, selected: list[Any], dtype: str, recording: Any
) -> None:
    """S_l for l = L down to 1. q_levels, k_levels, selected: levels 1..L."""
    of_q, of_k = [array(x) for x in q_levels], [array(x) for x in k_levels]
    kernel = select_kernel(tile_for(dtype, q_levels[0].shape[3]), is_whole(dtype, *of_q, *of_k))
    kv_heads, dim = k_levels[0].shape[1], q_levels[0].shape[3]
    block_size = hierarchy.block_size
    block_bits = block_size.bit_length() - 1
    for level in range(hierarchy.levels, 0, -1):
        q, k, rows = of_q[level - 1], of_k[level - 1], selected[level - 1]
        batch, heads, queries, topk = rows.shape
        values = (
            *q,
            *level_argument(level, k, NO_ARRAY, selected, hierarchy, reweight=False, span_bits=block_bits),
            *(rows.ptr, heads, kv_heads, queries, topk, dim, block_bits),
        )
        tiles = -(-queries // block_size) * max(1, block_size // QUERIES)
        launch(kernel, batch * heads * tiles, ARGUMENTS, values, recording)
