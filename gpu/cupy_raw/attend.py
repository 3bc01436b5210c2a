"""The host's side of attend.cu: one launch for all levels."""

from __future__ import annotations

import math
from functools import cache
from struct import Struct
from typing import Any, NamedTuple

from llsa_np.gpu.cupy_raw.levels import LEVEL, MOST_LEVELS, level_values
from llsa_np.gpu.cupy_raw.program import ARRAY, Kernel, array, is_whole, launch
from llsa_np.gpu.cupy_raw.specialisations import Tile, tile_for
from llsa_np.hierarchy import Hierarchy
from llsa_np.options import AttendOptions

ARGUMENTS = Struct(f"{ARRAY}{ARRAY}Q7if{LEVEL * MOST_LEVELS}")


class Split(NamedTuple):
    """How attend.cu cuts its work."""

    WARPS: int
    """Of a block."""
    KEYS: int
    """Keys of a tile that all warps share."""
    FINE_KEYS: int
    """Keys of a tile of a warp's own."""
    COARSE_STAGES: int
    """Tiles that all warps share, there or on their way."""
    BLOCKS: int
    """Blocks of a multiprocessor for which registers are kept."""


def split_for(tile: Tile) -> Split:
    """So that two blocks or more fit into a multiprocessor's shared memory, and one on every card."""
    # Milliseconds of attend and of query_gradient on an H100 (bfloat16, batch 2, 4 heads, 65,536 tokens, D = 64,
    # b = 16, K = 8, L = 2): as it stands 0.383 and 0.429. FINE_KEYS 16: 0.403, 0.426, so attention takes 32 keys at
    # once; query_gradient would spill. COARSE_STAGES 2: 0.398; 4: 0.385, and more shared memory than every card has.
    # KEYS 64 with two: 0.382, 0.418, but attend 0.388 instead of 0.359 with L = 3, whose coarsest level has 16 keys.
    # WARPS 4 with three blocks: 0.430, 0.471, and with four 0.456, 0.465. As it stands a block takes all the shared
    # memory that every card has, so on some there is one in a multiprocessor, and no room for a shared variable.
    if tile.row_bytes <= 128:
        return Split(WARPS=4 if tile.dtype == "float32" else 8, KEYS=32, FINE_KEYS=32, COARSE_STAGES=3, BLOCKS=2)
    # With D = 128: as it stands 0.827, 1.125; with two tiles for each warp, COARSE_STAGES and BLOCKS 2: 1.019, 1.762;
    # with 32 keys at once and two blocks: 0.911. float32: as it stands 2.737, 4.434; with three coarse stages 3.027,
    # 4.444.
    if tile.row_bytes <= 256:
        coarse_stages = 2 if tile.dtype == "float32" else 3
        return Split(WARPS=4, KEYS=16, FINE_KEYS=16, COARSE_STAGES=coarse_stages, BLOCKS=3)
    if tile.row_bytes <= 384:
        return Split(WARPS=4, KEYS=16, FINE_KEYS=16, COARSE_STAGES=1, BLOCKS=2)
    return Split(WARPS=2 if tile.row_bytes <= 768 else 1, KEYS=16, FINE_KEYS=16, COARSE_STAGES=1, BLOCKS=2)


@cache
def attend_kernel(tile: Tile, whole: bool) -> Kernel:
    """The kernel for rows of this tile's width."""
    split = split_for(tile)
    defines = (
        *tile.defines(whole),
        ("MOST_ROW_REGISTERS", "128"),
        *((name, str(value)) for name, value in split._asdict().items()),
    )
    rows = 2 * (split.COARSE_STAGES * split.KEYS + split.WARPS * split.FINE_KEYS)
    if tile.dtype == "float32" or tile.WIDTH > 128:  # the queries stay in shared memory
        rows += split.WARPS * 16
    return Kernel("attend.cu", "attend", defines, split.WARPS * 32, rows * tile.pitch_bytes)


def queries_of_block(kernel: Kernel, block_size: int) -> int:
    """A warp has 16, or 8 where blocks are of 8."""
    return kernel.threads // 32 * min(16, block_size)


def attend(
    q: Any,
    k_levels: list[Any],
    v_levels: list[Any],
    selected: list[Any],
    hierarchy: Hierarchy,
    options: AttendOptions,
    out: Any,
    lse: Any,
    dtype: str,
    recording: Any,
) -> None:
    """out and lse of all queries."""
    batch, heads, queries, dim = q.shape
    value_dim = out.shape[3]
    tile = tile_for(dtype, max(dim, value_dim))
    of_q, of_out = array(q), array(out)
    of_k, of_v = [array(x) for x in k_levels], [array(x) for x in v_levels]
    values = (
        *(*of_q, *of_out, lse.ptr),
        *(heads, k_levels[0].shape[1], queries, dim, value_dim, hierarchy.block_size.bit_length() - 1),
        *(len(options.levels), options.scale * math.log2(math.e)),
        *level_values(of_k, of_v, selected, hierarchy, options),
    )
    kernel = attend_kernel(tile, is_whole(dtype, of_q, of_out, *of_k, *of_v))
    blocks = batch * heads * -(-queries // queries_of_block(kernel, hierarchy.block_size))
    launch(kernel, blocks, ARGUMENTS, values, recording)
