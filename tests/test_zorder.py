"""Z-order against the definition: bits interleaved, the last axis lowest."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import llsa_np as llsa


def morton(cell, bits):
    """The interleaved bits of a cell's coordinates in the enclosing cube of 2**bits cells a side."""
    code, place = 0, 0
    for bit in range(bits):
        for coordinate in reversed(cell):
            code |= (coordinate >> bit & 1) << place
            place += 1
    return code


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_against_the_definition(shape):
    order, inverse = llsa.zorder(*shape)
    assert order.dtype == inverse.dtype == np.int64
    cells = list(np.ndindex(*shape))
    expected = sorted(range(len(cells)), key=lambda i: morton(cells[i], 4))
    assert order.tolist() == expected
    x = np.arange(order.size) * 10
    assert (x[order][inverse] == x).all()


def test_small_and_large():
    assert llsa.zorder(2, 2)[0].tolist() == [0, 1, 2, 3]
    assert llsa.zorder(4, 4)[0][:8].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert llsa.zorder(1)[0].tolist() == [0]
    assert llsa.zorder(*[1] * 70, 2, 2)[0].tolist() == [0, 1, 2, 3]
    order, _ = llsa.zorder(np.int64(1000), 1024)
    assert (np.sort(order) == np.arange(1000 * 1024)).all()


def test_blocks_are_squares():
    order, _ = llsa.zorder(64, 64)
    rows, columns = np.divmod(order.reshape(-1, 256), 64)
    assert (np.ptp(rows, axis=1) == 15).all()
    assert (np.ptp(columns, axis=1) == 15).all()
