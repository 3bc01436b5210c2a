"""The host's side of pool.cu: one launch for every two levels, of up to three arrays."""

from __future__ import annotations

from functools import cache, lru_cache
from struct import Struct
from typing import Any

from llsa_np.gpu.cupy_raw.program import ARRAY, NO_ARRAY, Kernel, Launch, array, is_whole
from llsa_np.hierarchy import Hierarchy

Spaces = list[tuple[tuple[int, ...], str]]
Group = dict[int, tuple[int, tuple[Any, ...]]]
"""Of arrays that share launches: for the first of every two levels, which launch it is, and each array's part."""

THREADS = 128
CHUNK = 64
PART = f"{ARRAY}{ARRAY}{ARRAY}Qq4i4fq"
PART_VALUES = 26
MOST_PARTS = 3
MOST_BLOCKS = 2**31 - 1
"""Of a launch."""
ARGUMENTS = Struct(PART * MOST_PARTS)


@cache
def pool_kernel(name: str, dtype: str, block_size: int, whole: bool) -> Kernel:
    """name: "pool" for elements, "pool_sums" for sums of the levels below. whole: the rows that it reads, and those of
    the means, can be moved in pieces."""
    defines = (
        (f"ELEMENT_{dtype.upper()}", "1"),
        ("WHOLE", str(int(whole))),
        ("BLOCK_SIZE", str(block_size)),
    )
    return Kernel("pool.cu", name, defines, THREADS)


def pool_kernels(dtype: str, block_size: int, whole: bool) -> list[Kernel]:
    """All that a call needs. Sums are arrays of our own, whose rows always can be moved in pieces."""
    return [pool_kernel("pool", dtype, block_size, whole), pool_kernel("pool_sums", dtype, block_size, True)]


def pool_spaces(batch: int, heads: int, dim: int, hierarchy: Hierarchy) -> Spaces:
    """The unrounded sums of every second level that others are made of."""
    return [((batch, heads, hierarchy.lengths[level], dim), "float32") for level in range(2, hierarchy.levels, 2)]


def pool(x: Any, hierarchy: Hierarchy, out: list[Any], spaces: list[Any], dtype: str, recording: Any) -> None:
    """out[l - 1] = level l of x, l = 1..L."""
    batch, heads, _, dim = x.shape
    if batch * heads == 0:
        return
    children = array(x)
    for level in range(1, hierarchy.levels + 1, 2):
        is_two, goes_on = level < hierarchy.levels, level + 1 < hierarchy.levels
        means, upper = array(out[level - 1]), out[level] if is_two else None
        sums = spaces[(level - 1) // 2] if goes_on else None
        lengths = hierarchy.lengths
        part = (
            *(*children, *means, *(NO_ARRAY if upper is None else array(upper))),
            *(0 if sums is None else sums.ptr, heads),
            *(lengths[level - 1], lengths[level], lengths[level + 1] if is_two else 0, dim),
            *(*counts(level, hierarchy), *(counts(level + 1, hierarchy) if is_two else (0, 0))),
        )
        uppers = -(-lengths[level] // hierarchy.block_size)
        blocks = batch * heads * uppers * -(-dim // CHUNK)
        if level == 1:
            kernel = pool_kernel("pool", dtype, hierarchy.block_size, is_whole(dtype, children, means))
            group = group_of(kernel, blocks, recording)
        else:  # sums and means are arrays of our own, of dims in steps of 8, whose rows always can be moved in pieces
            kernel = pool_kernel("pool_sums", dtype, hierarchy.block_size, True)
        launch_part(kernel, blocks, part, group, level, recording)
        children = NO_ARRAY if sums is None else array(sums)


def group_of(kernel: Kernel, blocks: int, recording: Any) -> Group:
    """The arrays that share launches with one whose first level this kernel makes. Higher levels follow the first, so
    that no sum is read in a launch before the one that makes it."""
    group: Group = recording.shared.setdefault(kernel, {})
    if 1 in group:
        parts = group[1][1]
        if len(parts) == MOST_PARTS or parts[-1][-1] + blocks > MOST_BLOCKS:
            group = recording.shared[kernel] = {}
    return group


def launch_part(kernel: Kernel, blocks: int, part: tuple[Any, ...], group: Group, level: int, recording: Any) -> None:
    """Launch an array's blocks behind those of the group's other arrays."""
    at, parts = group.get(level, (len(recording.launches), ()))
    parts = (*parts, (*part, blocks + (parts[-1][-1] if parts else 0)))
    values = [value for of_array in parts for value in of_array]
    values += [0] * (PART_VALUES * MOST_PARTS - len(values))
    recording.launches[at : at + 1] = [Launch(kernel, parts[-1][-1], ARGUMENTS, tuple(values))]
    group[level] = at, parts


@lru_cache
def counts(level: int, hierarchy: Hierarchy) -> tuple[int, int]:
    """How many tokens a token of a level stands for, and the last one."""
    return min(hierarchy.stride(level), hierarchy.tokens), hierarchy.last_count(level)
