"""Pooling: the levels of a sequence as means of the tokens they stand for (spec.md, Pooling)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from llsa_np.hierarchy import Hierarchy
from llsa_np.threads import run
from llsa_np.tiles import Floats

RUN_NUMBERS = 2**16
"""How many numbers are converted and summed at a time: few enough for the cache."""

ROWS = 128
"""So many rows are added one after another; more are added as two halves, or the rounding of each addition adds up."""


def accumulator(dtype: Any) -> Any:
    """The type in which scores, softmax and all sums accumulate: float64 for float64, else float32."""
    return np.float64 if np.dtype(dtype).itemsize == 8 else np.float32


def pool(x: Floats, hierarchy: Hierarchy, out: list[Floats]) -> None:
    """out[l - 1][j] = mean of x over the level-0 tokens that token j of level l stands for, l = 1..L.

    x: (batch, heads, tokens, dim), any strides. out: L arrays (batch, heads, n_l, dim) of x's dtype, filled here.
    """
    counts = [hierarchy.counts(level).astype(accumulator(x.dtype))[:, None] for level in range(1, hierarchy.levels + 1)]

    def pool_head(head: tuple[int, ...]) -> None:
        sums = x[head]
        for level in range(hierarchy.levels):
            # Children enter as unrounded sums; a level is rounded once, when it is stored.
            sums = sum_children(sums, hierarchy.block_size)
            out[level][head] = sums / counts[level]

    run(pool_head, list(np.ndindex(x.shape[:2])), x.size)


def sum_children(x: Floats, block_size: int) -> Floats:
    """(n, D) -> (ceil(n / b), D): sums over runs of b tokens, the last run ragged.

    Runs are copied, a few at a time, into one memory order, so that the order of a sum does not depend on x's strides.
    """
    tokens, dim = x.shape
    sums: NDArray[Any] = np.empty((-(-tokens // block_size), dim), accumulator(x.dtype))
    whole = tokens // block_size if block_size <= ROWS else 0  # runs that are summed many at a time
    step = max(1, RUN_NUMBERS // (block_size * dim))
    for first in range(0, whole, step):
        last = min(first + step, whole)
        runs = x[first * block_size : last * block_size].astype(sums.dtype, order="C", copy=False)
        np.add.reduce(runs.reshape(last - first, block_size, dim), axis=1, out=sums[first:last])
    for run_ in range(whole, len(sums)):
        sums[run_] = sum_rows(x[run_ * block_size : (run_ + 1) * block_size], sums.dtype)
    return sums


def sum_rows(x: Floats, acc: Any) -> Floats:
    """(n, D) -> (D,), in halves down to ROWS."""
    if len(x) > ROWS:
        half = len(x) // 2
        return sum_rows(x[:half], acc) + sum_rows(x[half:], acc)
    total: Floats = np.add.reduce(x.astype(acc, order="C", copy=False), axis=0)
    return total
