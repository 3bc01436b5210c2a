"""How much of dense attention a selection keeps, how evenly it selects, and how both change with K and L."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import llsa_np as llsa
from llsa_np.cli.words import count

Doubles = NDArray[np.float64]
MOST_SECONDS = 20.0
"""What one row of the sweep may take, as far as can be told beforehand."""
PARTS = 4
"""In how many samples the queries are drawn: how far these differ tells how certain the error is."""


@dataclass(frozen=True)
class Faithfulness:
    """Of one selection, per query head (batches averaged)."""

    mass: Doubles
    """(heads, L + 1): share of dense attention's probability on tokens whose finest attended level is l."""
    error: Doubles
    """(heads,): relative error of the output against dense attention."""
    error_of_parts: Doubles
    """(PARTS, heads): the same on each sample alone; (1, heads) where every query was compared."""
    busiest: Doubles
    """(heads,): share of query blocks that selected the most-selected finest key block."""
    never: Doubles
    """(heads,): share of finest key blocks that no query block selected."""
    attended: float
    """Tokens, of all levels that take part, that a query attends to, on average."""
    seconds: float
    """What measuring took."""

    @property
    def uncertainty(self) -> Doubles:
        """(heads,): standard error of the error."""
        return _standard_error(self.error_of_parts)

    @property
    def uncertainty_of_mean(self) -> float:
        """Standard error of the error's mean over heads, which see the same queries."""
        return float(_standard_error(self.error_of_parts.mean(axis=1, keepdims=True))[0])


def _standard_error(parts: Doubles) -> Doubles:
    """Of the mean over the first axis; 0 where nothing was sampled."""
    if len(parts) == 1:
        return np.zeros(parts.shape[1])
    error: Doubles = parts.std(axis=0, ddof=1) / np.sqrt(len(parts))
    return error


def measure(
    q: Any, k: Any, v: Any, selection: llsa.Selection, *, queries: int, seed: int, attend: dict[str, Any]
) -> Faithfulness:
    """Compare attention under a selection with dense attention, in float64, on `queries` queries or, if there are not
    more, on all. The same number and seed give the same queries whatever the selection.

    attend: enrich, reweight and scale, as for `llsa_np.attend`.
    """
    began = time.perf_counter()
    sizes = [queries]
    if queries < q.shape[2]:
        sizes = [len(part) for part in np.array_split(np.arange(queries), PARTS)]
    samples = [
        llsa.coverage(q, k, selection, v, queries=size, seed=PARTS * seed + part, **attend)
        for part, size in enumerate(sizes)
    ]
    mass, error = (np.array(of_parts) for of_parts in zip(*samples))  # (parts, batch, heads, ..)
    chosen = popularity(selection) / selection.query_hierarchy.lengths[1]
    return Faithfulness(
        mass=np.average(mass, axis=0, weights=sizes).mean(axis=0),
        error=np.sqrt(np.average(error**2, axis=0, weights=sizes)).mean(axis=0),
        error_of_parts=error.mean(axis=1),
        busiest=chosen.max(axis=-1).mean(axis=0),
        never=(chosen == 0).mean(axis=(0, 2)),
        attended=tokens_attended(selection, attend["enrich"]),
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


def tokens_attended(selection: llsa.Selection, enrich: Collection[int] | None = None) -> float:
    """Tokens of all levels that take part (None: every level) that a query attends to, averaged over its groups."""
    keys = selection.key_hierarchy
    levels = {0, *(range(1, keys.levels + 1) if enrich is None else enrich)}
    total = float(keys.lengths[-1]) if keys.levels in levels else 0.0
    for level, rows in enumerate(selection, 1):
        if level - 1 not in levels:
            continue
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
    seed: int,
    attend: dict[str, Any],
    backend: Any,
    known: llsa.Selection,
    known_result: Faithfulness,
    seconds_per_product: float,
    step: Callable[[str], None],
) -> list[Choice]:
    """Every L of 1..most_levels with every K, but for rows that would keep everything or take too long.

    queries, seed, attend: as in `measure`; of the levels in enrich, each row has those that there are. known: the
    selection that has been measured with these, and its result. seconds_per_product: measured time of one scalar
    product of a query with a key, in `select`. step: called with the name of each row before it.
    """
    choices: list[Choice] = []
    slowest = known_result.seconds
    for levels in range(1, most_levels + 1):
        queries_of, keys_of = (llsa.Hierarchy(x.shape[2], block_size, levels) for x in (q, k))
        enrich = attend["enrich"]
        if enrich is not None:
            enrich = [level for level in enrich if level <= levels]
        for topk in topks:
            step(f"sweep: L = {levels}, K = {topk}")
            if topk >= keys_of.lengths[1]:
                choices.append(Choice(levels, topk, None, f"keeps all there is: {count(keys_of.lengths[1], 'block')}"))
                continue
            if known.topk == (topk,) * levels:
                choices.append(Choice(levels, topk, known_result))
                continue
            scores = q.shape[0] * q.shape[1] * products(queries_of, keys_of, (topk,) * levels)
            expected = scores * seconds_per_product + slowest
            if expected > MOST_SECONDS:
                choices.append(Choice(levels, topk, None, f"left out: it would take about {expected:,.0f} s"))
                continue
            selection = llsa.select(q, k, block_size=block_size, levels=levels, topk=topk, backend=backend)
            result = measure(q, k, v, selection, queries=queries, seed=seed, attend=attend | {"enrich": enrich})
            slowest = max(slowest, result.seconds)
            choices.append(Choice(levels, topk, result))
    return choices
