"""The host's side of levels.cuh: what a kernel is told of each level of the list of candidates."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from llsa_np.gpu.cupy_raw.program import ARRAY, NO_ARRAY, Packed, array
from llsa_np.hierarchy import Hierarchy
from llsa_np.options import AttendOptions

MOST_LEVELS = 17
MOST_BITS = 62
"""2**62 queries are more than there are: all share one row."""

LEVEL = f"{ARRAY}{ARRAY}{ARRAY}5i2f0q"
"""`Level` of levels.cuh, for `struct.pack`."""
LEVEL_VALUES = 3 * 5 + 5 + 2


@lru_cache
def log_counts(level: int, hierarchy: Hierarchy, reweight: bool) -> tuple[float, float]:
    """log2 of how many tokens a token of the level stands for, and its last one."""
    if not reweight or level == 0:
        return 0.0, 0.0
    return math.log2(min(hierarchy.stride(level), hierarchy.tokens)), math.log2(hierarchy.last_count(level))


def level_argument(
    level: int,
    k: Packed,
    v: Packed,
    selected: list[Any],
    hierarchy: Hierarchy,
    reweight: bool,
    span_bits: int | None = None,
) -> tuple[Any, ...]:
    """The values of a LEVEL. selected: S_1 .. S_L. 2**span_bits queries share a row of S_{l+1}; None: b**(l+1)."""
    full, last = log_counts(level, hierarchy, reweight)
    ends = (hierarchy.lengths[level] - (last != full), full, last)
    if level == hierarchy.levels:
        return *k, *v, *NO_ARRAY, MOST_BITS, hierarchy.lengths[level], 0, 1, *ends
    rows = selected[level]
    if span_bits is None:
        span_bits = min(MOST_BITS, (hierarchy.block_size.bit_length() - 1) * (level + 1))
    sizes = (hierarchy.lengths[level], rows.shape[3], hierarchy.lengths[level + 1])
    return *k, *v, *array(rows), span_bits, *sizes, *ends


def level_values(
    k_levels: list[Packed], v_levels: list[Packed], selected: list[Any], hierarchy: Hierarchy, options: AttendOptions
) -> list[Any]:
    """The values of MOST_LEVELS: the levels that take part, coarsest first, then zeros."""
    values = [
        value
        for level in options.levels
        for value in level_argument(level, k_levels[level], v_levels[level], selected, hierarchy, options.reweight)
    ]
    return values + [0] * (MOST_LEVELS * LEVEL_VALUES - len(values))
