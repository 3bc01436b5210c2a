"""The pyramid of levels over a sequence: lengths, counts and kinship of tokens (spec.md, Notation)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from llsa_np.options import MAX_LEVELS, check_block_size, check_integer, check_levels


@dataclass(frozen=True)
class Hierarchy:
    """n_0 = tokens, n_l = ceil(n_{l-1} / block_size) for l = 1..levels.

    tokens: length of level 0, at least 1. block_size: how many tokens of one level a token of the next stands for,
    at least 2. levels: number of coarse levels, 1..16, with block_size ** levels < 2**62. Past the level with one
    token, that token repeats. Sizes are plain integers; a value outside its range is a ValueError.
    Source: spec.md, Notation; arXiv 2512.16615, section 3.
    """

    tokens: int
    block_size: int
    levels: int

    def __post_init__(self) -> None:
        tokens = check_integer("Hierarchy", "tokens", self.tokens, 1, None)
        block_size = check_block_size("Hierarchy", self.block_size)
        levels = check_levels("Hierarchy", self.levels, block_size)
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "block_size", block_size)
        object.__setattr__(self, "levels", levels)

    def stride(self, level: int) -> int:
        """b**l: how many level-0 tokens a token of a level stands for, but for the ragged last one."""
        stride: int = self.block_size ** check_integer("Hierarchy", "level", level, 0, self.levels)
        return stride

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """(n_0, ..., n_L): the number of tokens of every level, n_l = ceil(tokens / block_size ** l)."""
        return tuple(-(-self.tokens // self.stride(level)) for level in range(self.levels + 1))

    def counts(self, level: int) -> NDArray[np.int64]:
        """c_l[j], int64 (n_l,): how many level-0 tokens token j stands for; block_size ** l but in the ragged tail."""
        counts = np.full(self._length(level), min(self.stride(level), self.tokens), np.int64)
        counts[-1] = self.last_count(level)
        return counts

    def last_count(self, level: int) -> int:
        """The count of the last token of a level, the only one that may stand for fewer than block_size ** level."""
        return self.tokens - (self._length(level) - 1) * self.stride(level)

    def children(self, level: int, token: int) -> range:
        """The tokens of level - 1 that this token of a level >= 1 stands for: j*b .. min((j + 1)*b, n_{l-1}) - 1."""
        self._check_token(level, token)
        if level == 0:
            raise ValueError("Hierarchy.children: level is 0, and tokens of level 0 have no children; levels 1.. have")
        first = token * self.block_size
        return range(first, min(first + self.block_size, self._length(level - 1)))

    def span(self, level: int, token: int) -> range:
        """The level-0 tokens that a token of a level stands for: j*b**l .. min((j + 1)*b**l, tokens) - 1."""
        self._check_token(level, token)
        size = self.stride(level)
        return range(token * size, min((token + 1) * size, self.tokens))

    def ancestor(self, level: int, token: int) -> int:
        """anc_l(t) = t // block_size ** l: the token of a level that stands for level-0 token t."""
        self._length(level)
        self._check_token(0, token)
        return token // self.stride(level)

    def _length(self, level: int) -> int:
        return self.lengths[check_integer("Hierarchy", "level", level, 0, self.levels)]

    def _check_token(self, level: int, token: int) -> None:
        check_integer("Hierarchy", f"token of level {level}", token, 0, self._length(level) - 1)


@lru_cache
def hierarchy_of(tokens: int, block_size: int, levels: int) -> Hierarchy:
    """A Hierarchy; one that was asked for before is not checked and worked out again."""
    return Hierarchy(tokens, block_size, levels)


def default_levels(tokens: int, block_size: int = 16) -> int:
    """L = min(16, max(1, floor(log_b N) - 1)): the paper's number of coarse levels, the log taken in integers.

    tokens: number of keys N, at least 1. block_size: b, at least 2; else a ValueError.
    With b = 16: 2 at 16,384, 3 at 65,536 and at 262,144, 4 at 1,048,576. Source: spec.md, Notation.
    """
    tokens = check_integer("default_levels", "tokens", tokens, 1, None)
    block_size = check_block_size("default_levels", block_size)
    return levels_of(tokens, block_size)


def levels_of(tokens: int, block_size: int) -> int:
    """`default_levels` of checked sizes; it only compares `tokens`, so that a compiler may leave it open."""
    log = 0
    while block_size ** (log + 1) <= tokens:
        log += 1
    return min(MAX_LEVELS, max(1, log - 1))
