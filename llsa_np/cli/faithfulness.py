"""How much of dense attention a selection keeps, how evenly it selects, and how both change with K and L."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import llsa_np as llsa

Doubles = NDArray[np.float64]
MOST_SECONDS = 20.0
"""What one row of the sweep may take, as far as can be told beforehand."""


@dataclass(frozen=True)
class Faithfulness:
    """Of one selection, per query head (batches averaged)."""

    mass: Doubles
    """(heads, L + 1): share of dense attention's probability on tokens whose finest attended level is l."""
    error: Doubles
    """(heads,): relative error of the output against dense attention."""
    busiest: Doubles
    """(heads,): share of query blocks that selected the most-selected finest key block."""
    never: Doubles
    """(heads,): share of finest key blocks that no query block selected."""
    attended: float
    """Tokens, of all levels, that a query attends to, on average."""
    seconds: float
    """What measuring took."""


def measure(q: Any, k: Any, v: Any, selection: llsa.Selection, queries: int) -> Faithfulness:
    """Compare attention under a selection with dense attention, on sampled queries, in float64."""
    began = time.perf_counter()
    mass, error = llsa.coverage(q, k, selection, v, queries=queries)
    chosen = popularity(selection) / selection.query_hierarchy.lengths[1]
    return Faithfulness(
        mass=mass.mean(axis=0),
        error=np.zeros(0) if error is None else error.mean(axis=0),
        busiest=chosen.max(axis=-1).mean(axis=0),
        never=(chosen == 0).mean(axis=(0, 2)),
        attended=tokens_attended(selection),
        seconds=time.perf_counter() - began,
    )


def popularity(selection: llsa.Selection) -> NDArray[np.int64]:
    """(batch, heads, n_1): how many query blocks selected each finest key block."""
    blocks = selection.key_hierarchy.lengths[1]
    counts = np.zeros((selection.batch, selection.heads, blocks), np.int64)
    for n, h in np.ndindex(selection.batch, selection.heads):
        rows = selection[1][n, h]
        counts[n, h] = np.bincount(rows[rows >= 0], minlength=blocks)
    return counts


def tokens_attended(selection: llsa.Selection) -> float:
    """Tokens of all levels that a query attends to, averaged over level-wise groups of queries."""
    keys = selection.key_hierarchy
    total = float(keys.lengths[-1])
    for level, rows in enumerate(selection, 1):
        last = (rows == keys.lengths[level] - 1).sum()  # the one block whose children may be fewer
        children = (rows >= 0).sum() * keys.block_size
        missing = keys.lengths[level] * keys.block_size - keys.lengths[level - 1]
        total += float(children - last * missing) / (rows.size // rows.shape[-1])
    return total


def products(queries: llsa.Hierarchy, keys: llsa.Hierarchy, topk: tuple[int, ...]) -> int:
    """How many scalar products of a query with a key one head's selection takes, at most."""
    candidates = [min(n, kept * keys.block_size) for n, kept in zip(keys.lengths[1:-1], topk[1:], strict=True)]
    return sum(m * c for m, c in zip(queries.lengths[1:], [*candidates, keys.lengths[-1]], strict=True))


@dataclass(frozen=True)
class Choice:
    """A row of the sweep: what K and L give, or why it was left out."""

    levels: int
    topk: int
    result: Faithfulness | None
    skipped: str = ""


def sweep(
    q: Any,
    k: Any,
    v: Any,
    *,
    block_size: int,
    topks: list[int],
    most_levels: int,
    queries: int,
    backend: Any,
    seconds_per_product: float,
    step: Callable[[str], None],
) -> list[Choice]:
    """Every L of 1..most_levels with every K, but for rows that would keep everything or take too long.

    seconds_per_product: measured time of one scalar product of a query with a key, in `select`. step: called with the
    name of each row before it.
    """
    choices: list[Choice] = []
    slowest = 0.0
    for levels in range(1, most_levels + 1):
        queries_of, keys_of = (llsa.Hierarchy(x.shape[2], block_size, levels) for x in (q, k))
        for topk in topks:
            step(f"sweep: L = {levels}, K = {topk}")
            if topk >= keys_of.lengths[1]:
                choices.append(Choice(levels, topk, None, f"keeps all {keys_of.lengths[1]:,} blocks"))
                continue
            scores = q.shape[0] * q.shape[1] * products(queries_of, keys_of, (topk,) * levels)
            expected = scores * seconds_per_product + slowest
            if expected > MOST_SECONDS:
                choices.append(Choice(levels, topk, None, f"left out: it would take about {expected:,.0f} s"))
                continue
            selection = llsa.select(q, k, block_size=block_size, levels=levels, topk=topk, backend=backend)
            result = measure(q, k, v, selection, queries)
            slowest = max(slowest, result.seconds)
            choices.append(Choice(levels, topk, result))
    return choices
