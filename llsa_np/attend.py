"""Attention of every query to its candidates on every level, in one softmax (spec.md, Attention)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llsa_np.hierarchy import Hierarchy
from llsa_np.options import AttendOptions
from llsa_np.pool import accumulator, sum_rows
from llsa_np.selection import Selection
from llsa_np.threads import cores, run
from llsa_np.tiles import Floats, Piece, Tile, gather, log_weights, most_queries, pieces, siblings, strip, tiles

TILES_A_TASK = 8
"""Most tiles a thread takes at a time: enough to keep its share of waiting small."""

Split = tuple[int, int, int]
"""(G, S, W): how a tile's T queries fall into groups, strips and queries for one level."""


def attend(
    q: Floats,
    k_levels: list[Floats],
    v_levels: list[Floats],
    selection: Selection,
    options: AttendOptions,
    out: Floats,
    lse: Floats,
) -> None:
    """out_t = sum_l sum_{j in C_l} c_l[j] exp(scale <q_t, k_l[j]>) v_l[j] / Z_t and lse_t = log Z_t.

    q: (batch, heads, M, D). k_levels, v_levels: levels 0..L, (batch, kv_heads, n_l, D or Dv). out: (batch, heads, M,
    Dv) of q's dtype and lse: (batch, heads, M) of the accumulation type, filled here. Any strides.
    """
    batch, heads, query_tokens, dim = q.shape
    most = most_queries(dim + out.shape[3], lse.dtype)
    per_kv_head = max(1, heads // max(1, k_levels[0].shape[1]))

    def work(tasks: list[tuple[int, int, Tile]]) -> None:
        for n, h, tile in tasks:
            rows = slice(tile.first, tile.first + tile.size)
            out[n, h, rows], lse[n, h, rows] = attend_tile(
                q[n, h, rows],
                [level[n, h // per_kv_head] for level in k_levels],
                [level[n, h // per_kv_head] for level in v_levels],
                [level[n, h] for level in selection],
                tile,
                selection.key_hierarchy,
                options,
            )

    spans = list(tiles(query_tokens, selection.block_size, most))
    todo = [(n, h, tile) for n in range(batch) for h in range(heads) for tile in spans]
    size = max(1, min(TILES_A_TASK, len(todo) // (4 * cores())))
    run(work, [todo[i : i + size] for i in range(0, len(todo), size)], q.size)


def attend_tile(
    q: Floats,
    keys: list[Floats],
    values: list[Floats],
    selected: list[NDArray[np.int32]],
    tile: Tile,
    hierarchy: Hierarchy,
    options: AttendOptions,
) -> tuple[Floats, Floats]:
    """out (T, Dv) and lse (T,) of one tile's queries in one head: a softmax that runs along the list of candidates."""
    acc = accumulator(q.dtype)
    queries = scaled_columns(q, options.scale)  # (D, T)
    dim, value_dim = q.shape[1], values[0].shape[1]
    top = np.full(tile.size, -np.inf, acc)  # the largest logit so far
    z = np.zeros(tile.size, acc)  # the sum of exp(logit - top)
    total = np.zeros((tile.size, value_dim), acc)  # the sum of exp(logit - top) v

    for level, piece, split in candidates(selected, tile, hierarchy, options, acc, dim + value_dim):
        logits = score(queries, gather(keys[level], piece, acc), split, level, piece, hierarchy, options)  # (C, T)
        new_top = np.maximum(top, logits.max(axis=0))
        shift = np.where(new_top == -np.inf, 0, new_top)  # while a row has seen nothing, exp(-inf - 0) = 0
        logits -= shift
        weights = np.exp(logits, out=logits)
        fade = np.exp(top - shift)
        z = z * fade + sum_rows(weights, acc)
        total *= fade[:, None]
        part = columns(weights, split).swapaxes(-1, -2) @ gather(values[level], piece, acc)[:, None]  # (G, S, W, Dv)
        total += part.reshape(total.shape)
        top = new_top

    # A row without candidates, or with logits of -inf alone, has out 0 and lse -inf.
    return total / np.where(z == 0, 1, z)[:, None], top + np.log(z)


def scaled_columns(q: Floats, scale: float) -> Floats:
    """(T, D) -> scale q^T, (D, T), in the accumulation type. K Q^T of few queries is twice as fast in BLAS as Q K^T."""
    acc = accumulator(q.dtype)
    scaled: Floats = np.multiply(q.T, acc(scale), dtype=acc, order="C")
    return scaled


def candidates(
    selected: list[NDArray[np.int32]],
    tile: Tile,
    hierarchy: Hierarchy,
    options: AttendOptions,
    acc: Any,
    row_size: int,
    strip_row_size: int = 0,
) -> Iterator[tuple[int, Piece, Split]]:
    """The one list of (level, candidates) that a tile attends to, coarsest level first.

    The caller holds about row_size numbers per candidate and group, strip_row_size per candidate and strip, and two per
    candidate and query; pieces are cut accordingly.
    """
    for level in options.levels:
        coarsest = level == hierarchy.levels
        ancestors = tile.ancestors(hierarchy.block_size ** (level + 1))
        blocks = siblings(level, hierarchy, None if coarsest else selected[level][ancestors])
        groups = len(blocks.parents)
        width = strip(tile.size // groups, hierarchy.block_size)
        split = (groups, tile.size // groups // width, width)
        numbers = groups * row_size + groups * split[1] * strip_row_size + 2 * tile.size
        for piece in pieces(blocks, numbers * np.dtype(acc).itemsize):
            yield level, piece, split


def columns(x: Floats, split: Split) -> Floats:
    """(R, T) -> a view (G, S, R, W): one matrix for every strip of queries."""
    return x.reshape(len(x), *split).transpose(1, 2, 0, 3)


def score(
    queries: Floats,
    keys: Floats,
    split: Split,
    level: int,
    piece: Piece,
    hierarchy: Hierarchy,
    options: AttendOptions,
) -> Floats:
    """Logits scale <q_t, k_l[j]> + log c_l[j], (C, T), of scaled queries (D, T) and keys (G, C, D); -inf if absent."""
    logits: Floats = np.empty((keys.shape[1], queries.shape[1]), queries.dtype)
    np.matmul(keys[:, None], columns(queries, split), out=columns(logits, split))
    by_group = logits.reshape(len(logits), len(keys), -1)  # (C, G, S W)
    if options.reweight and level > 0:
        by_group += log_weights(level, hierarchy, piece)
    if piece.absent is not None:
        by_group[piece.absent.T] = -math.inf
    return logits
