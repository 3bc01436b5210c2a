"""The host's side of levels.cuh: what a kernel is told of each level of the list of candidates."""

from __future__ import annotations

import math
from struct import calcsize, pack
from typing import Any

from llsa_np.gpu.cupy_raw.program import ARRAY, NO_ARRAY, array
from llsa_np.hierarchy import Hierarchy
from llsa_np.options import AttendOptions

MOST_LEVELS = 17
MOST_BITS = 62
"""2**62 queries are more than there are: all share one row."""

LEVEL = f"{ARRAY}{ARRAY}{ARRAY}5i2f4x"
"""`Level` of levels.cuh, for `struct.pack`."""
LEVEL_BYTES = calcsize(LEVEL)


def level_argument(
    level: int, k: Any, v: Any, selected: list[Any], hierarchy: Hierarchy, reweight: bool, span_bits: int | None = None
) -> tuple[Any, ...]:
    """The values of a LEVEL. selected: S_1 .. S_L. 2**span_bits queries share a row of S_{l+1}; None: b**(l+1)."""
    full = last = 1
    if reweight and level > 0:
        full, last = min(hierarchy.stride(level), hierarchy.tokens), hierarchy.last_count(level)
    regular = hierarchy.lengths[level] - (last != full)
    ends = (regular, math.log2(full), math.log2(last))
    of_v = NO_ARRAY if v is None else array(v)
    if level == hierarchy.levels:
        return *array(k), *of_v, *NO_ARRAY, MOST_BITS, hierarchy.lengths[level], 0, 1, *ends
    rows = selected[level]
    if span_bits is None:
        span_bits = min(MOST_BITS, (hierarchy.block_size.bit_length() - 1) * (level + 1))
    sizes = (hierarchy.lengths[level], rows.shape[3], hierarchy.lengths[level + 1])
    return *array(k), *of_v, *array(rows), span_bits, *sizes, *ends


def pack_levels(
    k_levels: list[Any], v_levels: list[Any], selected: list[Any], hierarchy: Hierarchy, options: AttendOptions
) -> bytes:
    """The levels that take part, coarsest first, as an array of MOST_LEVELS."""
    packed = b"".join(
        pack(LEVEL, *level_argument(level, k_levels[level], v_levels[level], selected, hierarchy, options.reweight))
        for level in options.levels
    )
    return packed.ljust(MOST_LEVELS * LEVEL_BYTES, b"\0")
