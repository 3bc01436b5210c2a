"""One query's way down the levels: what it looks at on each, what it keeps, and how its attention is shared out."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import llsa_np as llsa
from llsa_np.options import AttendOptions

Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]


class Step(NamedTuple):
    """What one query does on one level."""

    level: int
    candidates: Ints
    """C_l: the tokens it attends to."""
    kept: Ints
    """S_l: those whose children it goes on to; on level 0, none."""
    weights: Doubles
    """Share of its attention that each candidate gets; 0 on a level that takes no part in attention."""


def descend(
    query: int,
    q: NDArray[Any],
    k: NDArray[Any],
    rows: list[NDArray[Any]],
    keys: llsa.Hierarchy,
    options: AttendOptions,
) -> list[Step]:
    """The steps of a query, coarsest level first, in float64; logits are scale <q, k_l[j]> + log c_l[j].

    q: (M, D) and k: (N, D) of one head. rows: for levels 1..L the selection (m_l, K_l) of that head. keys: of k.
    options: which levels take part, the scale, and whether counts c_l weigh.
    """
    size = keys.block_size
    doubles = k.astype(np.float64)
    pooled = llsa.pool(doubles[None, None], block_size=size, levels=keys.levels, backend="numpy")
    k_levels = [doubles, *(level[0, 0] for level in pooled)]
    scaled = q[query].astype(np.float64) * options.scale

    candidates: Ints = np.arange(keys.lengths[-1])
    found: list[tuple[int, Ints, Ints, Doubles]] = []
    for level in range(keys.levels, -1, -1):
        logits = np.full(len(candidates), -np.inf)
        if level in options.levels:
            logits = k_levels[level][candidates] @ scaled
            if options.reweight:
                logits += np.log(keys.counts(level)[candidates])
        kept = np.empty(0, np.int64)
        if level > 0:
            row = rows[level - 1][query // size**level]
            kept = row[row >= 0].astype(np.int64)
        found.append((level, candidates, kept, logits))
        if level > 0:
            candidates = np.concatenate([np.empty(0, np.int64), *(keys.children(level, int(j)) for j in kept)])
            candidates = candidates.astype(np.int64)
    largest = max(logits.max() for *_, logits in found if logits.size)
    total = sum(np.exp(logits - largest).sum() for *_, logits in found)
    return [Step(level, seen, kept, np.exp(logits - largest) / total) for level, seen, kept, logits in found]


def received(steps: list[Step], keys: llsa.Hierarchy) -> Doubles:
    """(N,): the share of the query's attention that every token gets, alone and through what stands for it."""
    shares = np.zeros(keys.tokens)
    for step in steps:
        shares += spread(step, keys)
    return shares


def spread(step: Step, keys: llsa.Hierarchy) -> Doubles:
    """(N,): one step's weights, each spread evenly over the tokens that its candidate stands for; 0 elsewhere."""
    of_level = np.zeros(keys.lengths[step.level])
    of_level[step.candidates] = step.weights / keys.counts(step.level)[step.candidates]
    shares: Doubles = of_level[np.arange(keys.tokens) // keys.block_size**step.level]
    return shares


def dense(query: int, q: NDArray[Any], k: NDArray[Any], scale: float) -> Doubles:
    """(N,): the query's attention without any sparsity, softmax(scale <q, k>), in float64."""
    logits = k.astype(np.float64) @ (q[query].astype(np.float64) * scale)
    weights = np.exp(logits - logits.max())
    shares: Doubles = weights / weights.sum()
    return shares
