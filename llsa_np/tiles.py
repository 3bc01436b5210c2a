"""How the NumPy reference walks through queries and their candidates without ever holding them all.

Queries come in tiles. A tile starts at a multiple of some b**j, is a multiple of b**j long, and lies inside one block
of b**(j + 1): on every level up to j it is a whole number of query groups, and on every level above it lies inside one,
so the same small matrix products serve every level. Candidates of a group are whole sibling blocks: the children of the
tokens it selected one level up (spec.md, Attention).

Sizes: T queries of a tile, G groups of a tile, S strips of a group, W queries of a strip (T = G S W), C candidates of a
group, D and Dv head dims of keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llsa_np.hierarchy import Hierarchy

Floats = NDArray[Any]  # of any of the four dtypes, bfloat16 among them
Ints = NDArray[np.int64]

MOST_QUERIES = 1024
"""Most queries of a tile: enough that NumPy's call overhead is a few percent of the time, few enough for the cache."""

STRIP = 32
"""Queries of one matrix product, where b allows: products this small run at full speed and stay below OpenBLAS's
threshold for threads, so they run on the thread that asked."""

PIECE_BYTES = 8 * 2**20
"""What the candidates' keys, values and scores of one piece may take, on each of at most 16 threads. It is the same on
every machine, since where pieces end decides in which order sums are taken."""

MOST_CANDIDATES = 4096
"""Most candidates of a piece: BLAS adds them one after another, and with very many the rounding of each adds up."""


class Tile(NamedTuple):
    """Queries first .. first + size - 1 of one level."""

    first: int
    size: int

    def ancestors(self, span: int) -> slice:
        """The tokens that stand for its queries on the level where one token stands for `span` of them."""
        first = self.first // span
        return slice(first, first + max(1, self.size // span))


def tiles(length: int, block_size: int, most: int = MOST_QUERIES) -> Iterator[Tile]:
    """Tiles of at most `most` queries over 0 .. length - 1, each as large as may be."""
    first = 0
    while first < length:
        unit = 1
        while first % (unit * block_size) == 0 and unit * block_size <= min(most, length - first):
            unit *= block_size
        rest_of_parent = block_size - first // unit % block_size
        size = unit * min(rest_of_parent, min(most, length - first) // unit)
        yield Tile(first, size)
        first += size


def most_queries(dims: int, dtype: Any) -> int:
    """How many queries a tile may have, so that some eight arrays of (T, dims) take no more than a piece."""
    row_bytes: int = 8 * dims * np.dtype(dtype).itemsize
    return max(1, min(MOST_QUERIES, PIECE_BYTES // row_bytes))


class Siblings(NamedTuple):
    """The candidates of a level, block by block: the children of the tokens that each group selected one level up."""

    parents: Ints
    """(groups, K): tokens of the level above, -1 where there is none."""
    children: int
    """How many children a parent has, at most."""
    stride: int
    """From a parent's first child to the next parent's first child."""
    length: int
    """Tokens of this level."""


def strip(group_size: int, block_size: int) -> int:
    """W: STRIP if it divides a group of queries, else the largest power of b up to STRIP that does, and at least b."""
    if group_size % STRIP == 0:
        return STRIP
    size = min(group_size, block_size)
    while size * block_size <= STRIP and group_size % (size * block_size) == 0:
        size *= block_size
    return size if group_size % size == 0 else group_size


def siblings(level: int, hierarchy: Hierarchy, selected: NDArray[np.int32] | None) -> Siblings:
    """C_l for a run of groups. selected: their rows of S_{l+1}, (groups, K); None on the coarsest level, where one
    parent stands for the whole level and every query shares it."""
    length = hierarchy.lengths[level]
    if selected is None:
        return Siblings(np.zeros((1, 1), np.int64), length, length, length)
    there = (selected >= 0) & (selected < hierarchy.lengths[level + 1])
    used = there.any(axis=0)  # a long row may hold few entries
    parents = np.where(there, selected, -1)[:, used].astype(np.int64)
    return Siblings(parents, min(hierarchy.block_size, length), hierarchy.block_size, length)


class Piece(NamedTuple):
    """Some of the candidates of every group: columns of `parents`, and a range of each one's children."""

    columns: slice
    offsets: slice
    tokens: Ints
    """(G, C): the candidates, within the level even where absent."""
    absent: NDArray[np.bool_] | None
    """(G, C): where there is no such candidate; None if all are there."""


def pieces(blocks: Siblings, bytes_per_candidate: int) -> Iterator[Piece]:
    """All candidates of a run of groups, in pieces of at most PIECE_BYTES: whole blocks, or parts of one block."""
    groups, columns = blocks.parents.shape
    most = max(1, min(MOST_CANDIDATES, PIECE_BYTES // bytes_per_candidate))
    column_step = max(1, most // blocks.children)
    offset_step = min(blocks.children, most)
    for first_column in range(0, columns, column_step):
        cols = slice(first_column, min(first_column + column_step, columns))
        for first_offset in range(0, blocks.children, offset_step):
            offs = slice(first_offset, min(first_offset + offset_step, blocks.children))
            parents = blocks.parents[:, cols, None]
            tokens = parents * blocks.stride + np.arange(offs.start, offs.stop)
            there = (parents >= 0) & (tokens < blocks.length)
            tokens, there = tokens.reshape(groups, -1), there.reshape(groups, -1)
            absent = None if there.all() else ~there
            if absent is not None:
                tokens[absent] = 0
            yield Piece(cols, offs, tokens, absent)


def gather(level: Floats, piece: Piece, dtype: Any) -> Floats:
    """Rows of a level (n_l, D) for a piece's candidates, (G, C, D) in the accumulation type; zeros where absent."""
    # take is twice as fast as indexing, but would copy the whole level first if it is not contiguous
    rows = np.take(level, piece.tokens, axis=0) if level.flags.c_contiguous else level[piece.tokens]
    rows = rows.astype(dtype, order="C", copy=False)
    if piece.absent is not None:
        rows[piece.absent] = 0  # a NaN there must not reach anyone
    return rows


def log_weights(level: int, hierarchy: Hierarchy, piece: Piece) -> Floats | float:
    """log c_l of a piece's candidates, broadcasting over (C, G, queries): l log b but for the level's last token."""
    full = min(hierarchy.block_size**level, hierarchy.tokens)
    last, last_count = hierarchy.lengths[level] - 1, hierarchy.last_count(level)
    if last_count == full or not (at_end := piece.tokens.T == last).any():
        return math.log(full)
    return np.where(at_end, math.log(last_count), math.log(full))[..., None]
