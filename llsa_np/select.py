"""Hierarchical Top-K: which tokens of every level a query keeps (spec.md, Selection)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from llsa_np.hierarchy import Hierarchy
from llsa_np.pool import accumulator
from llsa_np.threads import run
from llsa_np.tiles import MOST_QUERIES, PIECE_BYTES, Floats, Siblings, gather, pieces, siblings, tiles

ROW_ARRAYS = 8
"""How many arrays as large as a tile's scores are alive at once, at most: scores, keys, comparisons, their sums."""

ONE_SUM = 4096
"""Dims that einsum adds in one order; of more than its buffer holds (8192) it makes parts that depend on the shape."""


def select(
    q_levels: list[Floats],
    k_levels: list[Floats],
    hierarchy: Hierarchy,
    out: list[NDArray[np.int32]],
) -> None:
    """S_l(i) = the K_l candidates of C_l(i) with the largest <Q_l[i], K_l[j]>, for l = L down to 1.

    q_levels: levels 1..L, (batch, heads, m_l, D). k_levels: levels 1..L, (batch, kv_heads, n_l, D). hierarchy: that of
    the keys. out: for l = 1..L an int32 array (batch, heads, m_l, K_l), filled here: ascending, -1 at the end.
    """
    batch, heads = q_levels[0].shape[:2]
    per_kv_head = max(1, heads // max(1, k_levels[0].shape[1]))

    def select_head(head: tuple[int, ...]) -> None:
        n, h = head
        above = None
        for level in range(hierarchy.levels, 0, -1):
            selected = out[level - 1][n, h]
            select_level(
                q_levels[level - 1][n, h], k_levels[level - 1][n, h // per_kv_head], above, hierarchy, level, selected
            )
            above = selected

    run(select_head, list(np.ndindex(batch, heads)), q_levels[0].size * hierarchy.block_size)


def select_level(
    q: Floats,
    k: Floats,
    above: NDArray[np.int32] | None,
    hierarchy: Hierarchy,
    level: int,
    out: NDArray[np.int32],
) -> None:
    """S_l of one head: q (m_l, D), k (n_l, D), above S_{l+1} (m_{l+1}, K_{l+1}) or None on the coarsest level."""
    block_size = hierarchy.block_size
    candidates = hierarchy.lengths[level]
    if above is not None:
        candidates = min(candidates, above.shape[1] * block_size)
    itemsize = np.dtype(accumulator(q.dtype)).itemsize
    most = min(MOST_QUERIES, PIECE_BYTES // (ROW_ARRAYS * candidates * itemsize))
    if above is not None:  # each group has keys of its own, a block of them at least
        most = min(most, block_size * max(1, PIECE_BYTES // (2 * block_size * q.shape[1] * itemsize)))
    for tile in tiles(len(q), block_size, max(1, most)):
        blocks = siblings(level, hierarchy, None if above is None else above[tile.ancestors(block_size)])
        rows = slice(tile.first, tile.first + tile.size)
        out[rows] = select_tile(q[rows], k, blocks, out.shape[1])


def select_tile(q: Floats, k: Floats, blocks: Siblings, count: int) -> NDArray[np.int32]:
    """S_l of one tile of level-l queries, (T, count): score all candidates, keep the best of each row."""
    acc = accumulator(q.dtype)
    groups = len(blocks.parents)
    queries = q.astype(acc, order="C").reshape(groups, -1, q.shape[1])  # (G, W, D)
    scores, tokens = [], []
    for piece in pieces(blocks, 2 * groups * q.shape[1] * queries.itemsize):
        scores.append(products(queries, gather(k, piece, acc)))  # (G, W, C)
        tokens.append(piece.tokens if piece.absent is None else np.where(piece.absent, -1, piece.tokens))
    rows = np.concatenate(scores, axis=2)  # (G, W, C)
    token = np.concatenate(tokens, axis=1)[:, None, :]  # (G, 1, C)
    best = keep_best(order(rows, token < 0), count)  # (G, W, C)
    kept = np.full((len(q), count), -1, np.int32)
    chosen = np.broadcast_to(token, rows.shape)[best].reshape(len(q), -1)
    kept[:, : chosen.shape[1]] = chosen
    return kept


def products(queries: Floats, keys: Floats) -> Floats:
    """<q, k> of queries (G, W, D) and keys (G, C, D), (G, W, C): each pair's sum in the same order, whatever the shape.

    Not by BLAS, which is six to fifteen times as fast: it sums the last rows of a matrix, and matrices of other sizes,
    in other orders, and equal keys must score equally wherever they stand.
    """
    total: Floats = np.einsum("gwd,gcd->gwc", queries[:, :, :ONE_SUM], keys[:, :, :ONE_SUM])
    for first in range(ONE_SUM, queries.shape[2], ONE_SUM):
        part = slice(first, first + ONE_SUM)
        total += np.einsum("gwd,gcd->gwc", queries[:, :, part], keys[:, :, part])
    return total


def order(scores: Floats, absent: NDArray[np.bool_]) -> NDArray[np.signedinteger[Any]]:
    """Integers that compare as scores do: +inf > finite > -inf > NaN > absent, -0 equal to +0, all NaNs equal.

    A float's bits, read as an integer, already ascend for positive numbers; for negative ones the magnitude is flipped.
    """
    integer = np.int64 if scores.dtype == np.float64 else np.int32
    limits = np.iinfo(integer)
    bits: Any = np.ascontiguousarray(scores + scores.dtype.type(0)).view(integer)  # -0 + 0 = +0
    keys: NDArray[np.signedinteger[Any]] = np.where(bits < 0, bits ^ limits.max, bits)
    keys[np.isnan(scores)] = limits.min + 1
    keys[np.broadcast_to(absent, keys.shape)] = limits.min
    return keys


def keep_best(keys: NDArray[np.signedinteger[Any]], count: int) -> NDArray[np.bool_]:
    """Where the `count` largest of each row stand, equal ones going to the lower index; all, if there are no more."""
    length = keys.shape[-1]
    if count >= length:
        return np.ones(keys.shape, np.bool_)
    threshold = np.partition(keys, length - count, axis=-1)[..., length - count, None]
    above, equal = keys > threshold, keys == threshold
    missing = count - above.sum(axis=-1, keepdims=True)
    best: NDArray[np.bool_] = above | (equal & (np.cumsum(equal, axis=-1, dtype=np.int32) <= missing))
    return best
