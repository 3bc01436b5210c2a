"""Everything that the kernels are compiled for: element types and tile widths. How a kernel cuts its work for them
stands beside it: `split_for` in attend.py, `key_split_for` in attend_backward.py.

Dims are rounded up to a tile's width inside the kernels; all else (lengths, block size, K, levels, strides, alignment)
they take as they come, but for pooling, which is compiled for every block size.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import NamedTuple

from llsa_np.gpu.cupy_raw.program import BYTES

WIDTHS = (32, 64, 96, 128, 192, 256)
"""Of tiles, in dims. 72 dims, say, take the width 96."""

DIM_STEP, LEAST_DIM, MOST_DIM = 8, 16, WIDTHS[-1]
BLOCK_SIZES = (8, 16, 32, 64)
MOST_TOPK = 64
PORTABLE_SHARED = 99 * 2**10
"""Shared memory that a block may have on every card from sm_80 on."""


class Tile(NamedTuple):
    """How rows of a dtype and width lie in shared memory."""

    dtype: str
    WIDTH: int

    @property
    def row_bytes(self) -> int:
        """Of a row without the piece that it is longer in shared memory."""
        return self.WIDTH * BYTES[self.dtype]

    @property
    def pitch_bytes(self) -> int:
        return self.row_bytes + 16

    def defines(self, whole: bool) -> tuple[tuple[str, str], ...]:
        """whole: rows can be moved 16 bytes at a time."""
        return ((f"ELEMENT_{self.dtype.upper()}", "1"), ("WIDTH", str(self.WIDTH)), ("WHOLE", str(int(whole))))


@cache
def tile_for(dtype: str, dims: int) -> Tile:
    """The narrowest tile that holds so many dims."""
    return Tile(dtype, next(width for width in WIDTHS if width >= dims))


def all_tiles() -> list[Tile]:
    """Every specialisation."""
    return [Tile(dtype, width) for dtype, width in product(BYTES, WIDTHS)]
