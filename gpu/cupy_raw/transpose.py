"""The host's side of transpose.cu: the lists of queries that each key block has, and their sizes."""

from __future__ import annotations

from functools import cache
from struct import Struct
from typing import Any, NamedTuple

from llsa_np.gpu.cupy_raw.program import ARRAY, Kernel, array, launch
from llsa_np.hierarchy import Hierarchy

THREADS, SUM_THREADS, WARP = 256, 1024, 32
CHUNK = 4 * SUM_THREADS
ARGUMENTS = Struct(f"{ARRAY}3Q12i0q")

MOST_RANGES = 128
# On an H100 at 65,536 tokens, level 0, place_pairs took 0.127 ms with 1, 0.039 with 4, and takes 0.022 with 8.
MOST_STARTS = 8
"""Counters, one for each range of each parent, to a pair: more ranges are placed at once, and take more memory."""
MOST_COUNTERS = 2**31 - 2**10
"""Of a list: the kernels count them in 32 bits."""
LEAST_SPLIT = 256
"""Tiles of 16 queries of a piece of work, at least."""
MOST_SPARE = 2**12
"""So many sums of single keys may be split off, or an eighth of all, whichever is more: they take memory."""


class Lists(NamedTuple):
    """Sizes of the lists of one level below the coarsest: every (batch entry, kv head) has its own."""

    row_length: int
    """m_{l+1}: rows of S_{l+1} of one query head."""
    row_count: int
    """Of all query heads that read one kv head."""
    columns: int
    parents: int
    ranges: int
    run: int
    """Places that a row takes in a parent's list: its queries, or 16 times as many tiles as hold them."""
    run_log: int
    """log2 of `run`; -1 where it is no power of two, and then a list has one row of each query head."""
    run_bits: int
    """2**run_bits queries lie between the first of one row and that of the next."""
    split: int
    """Tiles of 16 queries of a piece of work, at most."""
    spare: int
    """Pieces of work beyond one for each parent, at most."""


def lists_of(level: int, hierarchy: Hierarchy, queries: Hierarchy, topk: int, group: int) -> Lists:
    """The sizes for a level, from shapes alone."""
    parents, row_length = hierarchy.lengths[level + 1], queries.lengths[level + 1]
    row_count = group * row_length
    run_bits = (hierarchy.block_size.bit_length() - 1) * (level + 1)
    run = min(2**run_bits, -(-queries.tokens // 16) * 16)
    tiles = -(-row_count * topk * run // 16)
    most = max(1, parents // 8, MOST_SPARE // hierarchy.block_size)
    split = max(LEAST_SPLIT, -(-tiles // most))
    ranges = min(MOST_RANGES, row_count, MOST_STARTS * row_count * topk // parents, MOST_COUNTERS // parents)
    run_log = run.bit_length() - 1 if run & (run - 1) == 0 else -1
    return Lists(
        row_length, row_count, topk, parents, max(1, ranges), run, run_log, min(run_bits, 31), split, tiles // split
    )


@cache
def transpose_kernels() -> tuple[Kernel, ...]:
    """In the order in which `transpose` launches them."""
    defines = (("ELEMENT_FLOAT32", "1"),)  # of which none are looked at
    sums, others = ("sum_chunks", "sum_counts", "count_items"), ("clear_starts", "count_pairs")
    names = [*((name, THREADS) for name in others), *((name, SUM_THREADS) for name in sums), ("place_pairs", THREADS)]
    return tuple(Kernel("transpose.cu", name, defines, threads) for name, threads in names)


def transpose_spaces(lists: int, of: Lists) -> tuple[int, int, int]:
    """How many integers `starts`, `rows` and `items` hold for so many lists."""
    starts, items = (-(-size // 4) * 4 for size in (of.parents * of.ranges + 1, of.parents + 1))
    return lists * starts, lists * of.row_count * of.columns, lists * items


def transpose(selected: Any, of: Lists, kv_heads: int, starts: Any, rows: Any, items: Any, recording: Any) -> None:
    """Fills starts, rows and items (int32) as transpose.cu says."""
    batch, heads = selected.shape[:2]
    lists = batch * kv_heads
    chunks = -(-(of.parents * of.ranges + 1) // CHUNK)
    values = (
        *(*array(selected), starts.ptr, rows.ptr, items.ptr),
        *(lists, heads, heads // kv_heads, of.row_length, of.row_count, of.columns, of.parents, of.ranges),
        *(-(-of.row_count // of.ranges), chunks, of.run, of.split),
    )
    clear, count, sum_chunks, sum_counts, count_items, place = transpose_kernels()
    n_starts, n_pairs, _ = transpose_spaces(lists, of)
    launch(clear, -(-n_starts // THREADS), ARGUMENTS, values, recording)
    launch(count, -(-n_pairs // THREADS), ARGUMENTS, values, recording)
    if chunks > 1:
        launch(sum_chunks, lists * chunks, ARGUMENTS, values, recording)
    launch(sum_counts, lists * chunks, ARGUMENTS, values, recording)
    launch(count_items, lists, ARGUMENTS, values, recording)
    launch(place, -(-lists * of.ranges // (THREADS // WARP)), ARGUMENTS, values, recording)
