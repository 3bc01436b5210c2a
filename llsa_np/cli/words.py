"""Numbers as the pages and pictures of the command say them."""

from __future__ import annotations

import math


def count(number: int, one: str, more: str | None = None) -> str:
    """How many of something: "1 head", "4,096 tokens"; more: the plural, where it is not `one` with an s."""
    return f"{number:,} {one if number == 1 else more or one + 's'}"


def digits(value: float) -> str:
    """A number of 0 or more with three digits that count, and no exponent."""
    if value >= 100 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"
