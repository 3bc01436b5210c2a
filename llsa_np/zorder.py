"""Z-order (Morton order) of a grid, so that neighbours on the grid are neighbours in the sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from llsa_np.options import check_integer


def zorder(*shape: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(order, inverse): x[order] puts a grid's cells, given in row-major order, into Z-order; y[inverse] undoes it.

    A cell's place is its Morton code: the bits of its coordinates interleaved, the last axis taking the lowest bit.
    shape: the grid's size on each of any number of axes; sizes that are no power of two give the Morton order of the
    enclosing power-of-two grid with absent cells left out. Both results are int64, (product of shape,).
    Raises ValueError without a size, or for one that is below 1 or not an integer.
    Blocks of b consecutive tokens are then compact patches. Source: arXiv 2512.16615, section 3 (index reordering).
    """
    if not shape:
        raise ValueError("zorder: got no size; allowed is one integer of 1 or more per axis, e.g. zorder(256, 256)")
    sizes = [check_integer("zorder", f"size {axis}", size, 1, None) for axis, size in enumerate(shape)]
    sizes = [size for size in sizes if size > 1] or [1]  # an axis of one cell has no bits
    code = np.zeros(sizes, np.int64)
    place = 0
    for bit in range(max(sizes).bit_length()):
        for axis in reversed(range(len(sizes))):
            if (sizes[axis] - 1) >> bit == 0:  # this axis has no such bit
                continue
            coordinate = np.arange(sizes[axis], dtype=np.int64)
            bits = ((coordinate >> bit) & 1) << place
            code += bits.reshape([-1 if i == axis else 1 for i in range(len(sizes))])
            place += 1
    order = np.argsort(code.ravel(), kind="stable").astype(np.int64)
    inverse = np.empty_like(order)
    inverse[order] = np.arange(order.size)
    return order, inverse
