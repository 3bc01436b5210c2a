"""How much of dense attention a selection sees: for choosing K and L, and for watching a training run."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llsa_np.adapters.dlpack_arrays import through_dlpack
from llsa_np.attend import attend_tile
from llsa_np.call import prepare
from llsa_np.hierarchy import Hierarchy
from llsa_np.options import Layout, check_attend_options, check_integer
from llsa_np.pool import pool
from llsa_np.selection import Selection
from llsa_np.threads import run
from llsa_np.tiles import Tile, siblings

Doubles = NDArray[np.float64]

CHUNK_SCORES = 2**21
"""How many scores of dense attention are held at a time, per thread."""


@partial(through_dlpack, gives_arrays=False)
def coverage(
    q: Any,
    k: Any,
    selection: Selection,
    v: Any | None = None,
    *,
    enrich: Iterable[int] | None = None,
    reweight: bool = True,
    scale: float | None = None,
    layout: Layout = "bhnd",
    queries: int = 256,
    seed: int = 0,
) -> tuple[Doubles, Doubles | None]:
    """The share of dense attention's probability that falls on tokens attended at each resolution, and what that costs.

    mass[.., l] = mean over the sampled queries t of the sum of softmax(scale q_t k^T) over the tokens whose finest
    attended level is l; level 0 is full resolution, and levels not in `enrich` do not count.
    error = ||out - dense|| / ||dense||, Frobenius norms over the sampled queries.

    q: (batch, heads, M, D). k: (batch, kv_heads, N, D). v: (batch, kv_heads, N, Dv) or None. selection: for these.
    queries: how many to sample without replacement (all if M is not larger). seed: of the sample. Other arguments as in
    `attention`.
    Returns (mass, error): float64 NumPy arrays (batch, heads, L + 1) and (batch, heads), error None without v.
    Copies q, k, v and the selection to the host where they lie elsewhere. Not differentiable. Cost: N times the number
    of sampled queries. Raises as `attend`. Source: spec.md, Attention.
    """
    who = "coverage"
    arrays = {"q": q, "k": k} | ({} if v is None else {"v": v})
    call = prepare(who, "auto", layout, arrays, selection)
    of = call.sizes
    options = check_attend_options(who, enrich, reweight, scale, "full", levels=selection.levels, dim=of["q"].dim)
    queries = check_integer(who, "queries", queries, 1, None)
    seed = check_integer(who, "seed", seed, 0, None)

    host = {name: call.adapter.to_numpy(array) for name, array in arrays.items()}
    if layout == "bnhd":
        host = {name: array.swapaxes(1, 2) for name, array in host.items()}
    selected = [call.adapter.to_numpy(level) for level in selection]
    batch, heads, query_tokens, _ = of["q"]
    sample = np.arange(query_tokens)
    if query_tokens > queries:
        sample = np.sort(np.random.default_rng(seed).choice(query_tokens, queries, replace=False))

    hierarchy = selection.key_hierarchy
    mass = np.zeros((batch, heads, selection.levels + 1))
    error = None if v is None else np.zeros((batch, heads))
    per_kv_head = max(1, heads // max(1, of["k"].heads))

    def cover_head(head: tuple[int, ...]) -> None:
        n, h = head
        keys = levels_of(host["k"][n, h // per_kv_head], hierarchy)
        values = levels_of(host["v"][n, h // per_kv_head], hierarchy) if "v" in host else None
        rows = [level[n, h] for level in selected]
        difference = dense_norm = 0.0
        step = max(1, CHUNK_SCORES // len(keys[0]))
        for some in (sample[i : i + step] for i in range(0, len(sample), step)):
            chunk = host["q"][n, h, some].astype(np.float64)
            probability = softmax(options.scale * (chunk @ keys[0].T))
            dense = probability @ values[0] if values is not None else None
            for i, t in enumerate(some):
                tile = Tile(int(t), 1)
                finest = finest_level(rows, tile, hierarchy, options.levels)
                mass[n, h] += np.bincount(finest + 1, probability[i], minlength=selection.levels + 2)[1:]
                if values is not None and dense is not None:
                    out, _ = attend_tile(chunk[i, None], keys, values, rows, tile, hierarchy, options)
                    difference += float(((out[0] - dense[i]) ** 2).sum())
                    dense_norm += float((dense[i] ** 2).sum())
        mass[n, h] /= len(sample)
        if error is not None:
            error[n, h] = np.sqrt(difference / dense_norm) if dense_norm > 0 else np.sqrt(difference)

    run(cover_head, list(np.ndindex(batch, heads)), len(sample) * host["k"].size)
    return mass, error


def softmax(logits: Doubles) -> Doubles:
    """Along the last axis, in place."""
    logits -= logits.max(axis=-1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=-1, keepdims=True)
    return logits


def levels_of(x: NDArray[Any], hierarchy: Hierarchy) -> list[Doubles]:
    """Levels 0..L of one head's keys or values (N, D), in float64."""
    x = x.astype(np.float64)
    pooled = [np.empty((1, 1, length, x.shape[1])) for length in hierarchy.lengths[1:]]
    pool(x[None, None], hierarchy, pooled)
    return [x, *(level[0, 0] for level in pooled)]


def finest_level(
    selected: list[NDArray[np.int32]], tile: Tile, hierarchy: Hierarchy, levels: tuple[int, ...]
) -> NDArray[np.int64]:
    """For every level-0 token the finest level on which one query attends to it or to what stands for it; -1: none."""
    finest = np.full(hierarchy.tokens, -1, np.int64)
    for level in levels:  # coarsest first, so that finer ones overwrite
        if level == hierarchy.levels:
            finest[:] = level
            continue
        ancestors = tile.ancestors(hierarchy.block_size ** (level + 1))
        for parent in siblings(level, hierarchy, selected[level][ancestors]).parents[0]:
            if parent >= 0:  # its children on this level stand for all that it stands for
                span = hierarchy.span(level + 1, int(parent))
                finest[span.start : span.stop] = level
    return finest
