"""The host's side of pool.cu: one launch for every two levels."""

from __future__ import annotations

from functools import cache, lru_cache
from struct import Struct
from typing import Any

from llsa_np.gpu.cupy_raw.program import ARRAY, NO_ARRAY, Kernel, array, is_whole, launch
from llsa_np.hierarchy import Hierarchy

Spaces = list[tuple[tuple[int, ...], str]]

THREADS = 128
CHUNK = 64
ARGUMENTS = Struct(f"{ARRAY}{ARRAY}{ARRAY}Qq4i4f0q")


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
    children = array(x)
    for level in range(1, hierarchy.levels + 1, 2):
        is_two, goes_on = level < hierarchy.levels, level + 1 < hierarchy.levels
        means, upper = array(out[level - 1]), out[level] if is_two else None
        sums = spaces[(level - 1) // 2] if goes_on else None
        lengths = hierarchy.lengths
        values = (
            *(*children, *means, *(array(upper) if is_two else NO_ARRAY)),
            *(0 if sums is None else sums.ptr, heads),
            *(lengths[level - 1], lengths[level], lengths[level + 1] if is_two else 0, dim),
            *(*counts(level, hierarchy), *(counts(level + 1, hierarchy) if is_two else (0, 0))),
        )
        uppers = -(-lengths[level] // hierarchy.block_size)
        blocks = batch * heads * uppers * -(-dim // CHUNK)
        whole = is_whole(dtype if level == 1 else "float32", children) and is_whole(dtype, means)
        name = "pool" if level == 1 else "pool_sums"
        launch(pool_kernel(name, dtype, hierarchy.block_size, whole), blocks, ARGUMENTS, values, recording)
        children = array(sums) if goes_on else NO_ARRAY


@lru_cache
def counts(level: int, hierarchy: Hierarchy) -> tuple[int, int]:
    """How many tokens a token of a level stands for, and the last one."""
    return min(hierarchy.stride(level), hierarchy.tokens), hierarchy.last_count(level)
