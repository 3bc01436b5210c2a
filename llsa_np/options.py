"""What an option may be, checked once for every backend (spec.md, Bad input)."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, cast, get_args

import numpy as np

Layout = Literal["bhnd", "bnhd"]
Precision = Literal["full", "tf32"]
TopK = int | Iterable[int]

MAX_LEVELS = 16
MAX_SPAN = 2**62  # block_size ** levels stays below this, so that token arithmetic fits int64


@dataclass(frozen=True)
class AttendOptions:
    """The checked options of attention: which levels take part, how they weigh, and the scale of the logits."""

    levels: tuple[int, ...]
    """Levels that take part, coarsest first; level 0 always does."""
    reweight: bool
    """Whether a coarse token weighs as many tokens as it stands for, or 1."""
    scale: float
    precision: Precision


def check_integer(who: str, name: str, value: Any, low: int, high: int | None) -> int:
    """The value as an int within low..high (high None: no upper end)."""
    allowed = f"an integer of {low} or more" if high is None else f"an integer in {low}..{high}"
    try:
        number: int = operator.index(value)
    except TypeError:
        raise ValueError(f"{who}: {name} is {value!r}; allowed is {allowed}") from None
    if isinstance(value, (bool, np.bool_)) or number < low or (high is not None and number > high):
        raise ValueError(f"{who}: {name} is {value!r}; allowed is {allowed}")
    return number


def check_block_size(who: str, block_size: Any) -> int:
    """The block size as an int of 2 or more."""
    return check_integer(who, "block_size", block_size, 2, None)


def check_levels(who: str, levels: Any, block_size: int) -> int:
    """The number of coarse levels, 1..16, such that a token of the coarsest stands for fewer than 2**62."""
    number = check_integer(who, "levels", levels, 1, MAX_LEVELS)
    if block_size**number >= MAX_SPAN:
        raise ValueError(
            f"{who}: block_size ** levels is {block_size} ** {number}; allowed is anything below 2**62. "
            "Use fewer levels or a smaller block_size"
        )
    return number


def check_topk(who: str, topk: Any, levels: int) -> tuple[int, ...]:
    """One K_l per level 1..levels, from an int or from one int per level."""
    limit = 2**31 - 1  # what an int32 index can tell apart
    given = as_tuple(topk)
    if given is None:
        given = (topk,) * levels
    if len(given) != levels:
        raise ValueError(
            f"{who}: topk has {len(given)} entries, {given!r}, for {levels} levels; "
            "allowed is one integer, or one integer for each of the levels 1..levels"
        )
    return tuple(check_integer(who, "topk", k, 1, limit) for k in given)


def as_tuple(values: Any) -> tuple[Any, ...] | None:
    """The entries of a sequence; None of what is none, a string or an array without axes among them."""
    if isinstance(values, (str, bytes, int)):  # an integer that a compiler leaves open has no other attributes
        return None
    if getattr(values, "ndim", 1) == 0 or not isinstance(values, Iterable):
        return None
    return tuple(values)


def check_flag(who: str, name: str, value: Any) -> bool:
    """The value of a switch."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{who}: {name} is {value!r}; allowed is True or False")
    return bool(value)


def check_attend_options(
    who: str, enrich: Any, reweight: Any, scale: Any, precision: Any, *, levels: int, dim: int
) -> AttendOptions:
    """The options of `attend`, checked and with their defaults filled in."""
    if not isinstance(precision, str) or precision not in get_args(Precision):
        raise ValueError(f"{who}: precision is {precision!r}; allowed is one of {get_args(Precision)}")
    return AttendOptions(
        levels=(*sorted(check_enrich(who, enrich, levels), reverse=True), 0),
        reweight=check_flag(who, "reweight", reweight),
        scale=check_scale(who, scale, dim),
        precision=cast(Precision, precision),
    )


def check_enrich(who: str, enrich: Any, levels: int) -> tuple[int, ...]:
    """The coarse levels that take part; None means all of them."""
    if enrich is None:
        return tuple(range(1, levels + 1))
    allowed = f"allowed is None (all of them), () or distinct levels of 1..{levels}"
    given = as_tuple(enrich)
    if given is None:
        raise ValueError(f"{who}: enrich is {enrich!r}; {allowed}, as a tuple")
    for level in given:
        check_integer(who, "a level in enrich", level, 1, levels)
    if len(set(given)) != len(given):
        raise ValueError(f"{who}: enrich is {given!r} and names a level twice; {allowed}")
    return tuple(operator.index(level) for level in given)


def check_scale(who: str, scale: Any, dim: int) -> float:
    """The scale of the logits; None means 1 / sqrt(dim)."""
    if scale is None:
        return 1.0 / math.sqrt(dim)
    allowed = "allowed is a finite number above 0, or None for 1 / sqrt(head dim)"
    flag = isinstance(scale, bool)  # which is a Real too
    try:
        number = float(scale) if isinstance(scale, Real) and not flag else math.nan
    except OverflowError:
        number = math.inf
    if not 0 < number < math.inf:
        raise ValueError(f"{who}: scale is {scale!r}; {allowed}")
    return number


def check_layout(who: str, layout: Any) -> Layout:
    """The layout, if it is one."""
    if not isinstance(layout, str) or layout not in get_args(Layout):
        raise ValueError(
            f"{who}: layout is {layout!r}; allowed is 'bhnd' (batch, heads, tokens, dim) "
            "or 'bnhd' (batch, tokens, heads, dim)"
        )
    return cast(Layout, layout)


def check_needs(who: str, needs: Any) -> frozenset[str]:
    """Which gradients are asked for."""
    allowed = "allowed is any of 'q', 'k' and 'v'"
    given = as_tuple(needs)
    if given is None:
        raise ValueError(f"{who}: needs is {needs!r}; {allowed}, as a tuple")
    if not all(name in ("q", "k", "v") for name in given):
        raise ValueError(f"{who}: needs is {given!r}; {allowed}")
    return frozenset(given)
