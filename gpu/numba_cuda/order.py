"""The order of scores, as integers (spec.md, Selection)."""

from __future__ import annotations

from functools import cache
from typing import Any

from llsa_np.gpu.numba_cuda.cuda import ELEMENT, accumulator, bits_of, device_function


def order_type(dtype: str) -> str:
    """The integers that hold an order: as wide as a score."""
    return "int64" if dtype == "float64" else "int32"


def least_order(dtype: str) -> int:
    """The order of what is absent, below that of any score."""
    return -(2**63) if dtype == "float64" else -(2**31)


@cache
def order_function(dtype: str) -> Any:
    """A device function: an integer that compares as the score does, +inf > finite > -inf > NaN, -0 equal to +0.

    A float's bits, read as an integer, already ascend for positive numbers; for negative ones the magnitude is flipped.
    The least integer is left for what is absent, the next is NaN.
    """
    bits_of_score = bits_of(accumulator(dtype))
    acc, integer = ELEMENT[accumulator(dtype)], ELEMENT["int64"]
    LARGEST = -1 - least_order(dtype)

    @device_function
    def order(score):
        bits = integer(bits_of_score(score + acc(0)))  # -0 + 0 = +0
        if score != score:
            bits = integer(-LARGEST)
        elif bits < 0:
            bits = bits ^ integer(LARGEST)
        return bits

    return order
