"""What the kernels share: how queries fall into tiles, where candidates stand, and products of two tiles.

A block of threads holds a tile of BT rows against tiles of BS columns, as a grid of TY x TX threads: thread (i_y, i_x)
computes rows i_y, i_y + TY, ... against columns i_x, i_x + TX, ..., so that neighbouring threads read neighbouring
columns. Tiles lie in shared memory in the accumulation type, BD dims at a time, and are one number wider than that,
which puts the elements of one column into different memory banks.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from llsa_np.gpu.numba_cuda.cuda import ELEMENT, SIMULATED, accumulator, device_function, loader, natural

INT64 = ELEMENT["int64"]


class Shape(NamedTuple):
    """A tile's shape in threads and in what each thread computes."""

    TY: int
    TX: int
    RQ: int
    """Rows of a thread."""
    RK: int
    """Columns of a thread."""
    RD: int
    """Dims of a thread, where the result is (rows, dims); it divides TY."""

    @property
    def THREADS(self) -> int:
        return self.TY * self.TX

    @property
    def BT(self) -> int:
        return self.TY * self.RQ

    @property
    def BS(self) -> int:
        return self.TX * self.RK

    @property
    def BD(self) -> int:
        return self.TX * self.RD


def shape_for(dtype: str, block_size: int) -> Shape:
    """16 rows against 64 columns and dims, 16 products a thread for 8 numbers read; half the columns and dims for
    float64, whose tiles are twice as large; 4 rows where a block of queries has no more. Small ones in the simulator,
    where every thread is a thread of Python and small cases shall fill more than one tile."""
    if SIMULATED:
        return Shape(TY=2, TX=2, RQ=2, RK=2, RD=2)
    RQ = 1 if block_size <= 4 else 4
    wide = 2 if dtype == "float64" else 4
    return Shape(TY=4, TX=16, RQ=RQ, RK=wide, RD=wide)


class Tiling(NamedTuple):
    """How the tokens of a level fall into tiles of at most BT, each inside one block of siblings."""

    BLOCK: int
    """Tokens of a block: b, or all of them if there are fewer."""
    PARTS: int
    """Tiles of a block."""
    TILES: int
    """Tiles of the level."""


def tiling(length: int, block_size: int, BT: int) -> Tiling:
    """The tiles of a level of `length` tokens: tile i is part i % PARTS of block i // PARTS."""
    block = min(block_size, length)
    parts = -(-block // BT)
    return Tiling(block, parts, -(-length // block) * parts)


@device_function
def candidate(parents, i_candidate, COLUMNS, CHILDREN, STRIDE, PARENTS, LENGTH):
    """The token that stands at a place of the list of candidates, -1 if there is none.

    parents: the row of S_{l+1}, COLUMNS long, each with CHILDREN children STRIDE apart. A parent outside
    0 .. PARENTS - 1 counts as -1. On the coarsest level COLUMNS is 0: the candidates are all tokens.
    """
    token = INT64(LENGTH)
    if COLUMNS == 0:
        token = INT64(i_candidate)
    else:
        parent = INT64(parents[i_candidate // CHILDREN])
        if parent >= 0 and parent < PARENTS:
            token = parent * STRIDE + i_candidate % CHILDREN
    if token >= LENGTH:
        token = INT64(-1)
    return token


AHEAD = 8
"""How many numbers a thread reads before it writes the first of them down, so that many reads are under way."""


@cache
def stage_function(dtype: str, shape: Shape, ROWS: int) -> Any:
    """A device function that brings dims o_d .. o_d + BD - 1 of ROWS tokens into shared memory, [ROWS, BD].

    Zeros stand where there is no token (-1) and past the last dim: a NaN there must not reach anyone. A thread has one
    dim of every (THREADS / BD)-th row, so that neighbouring threads read neighbouring dims.
    """
    load, acc = loader(dtype), ELEMENT[accumulator(dtype)]
    BD, ROW_STEP = shape.BD, shape.THREADS // shape.BD
    EACH = ROWS // ROW_STEP
    AT_ONCE = min(AHEAD, EACH)

    @device_function
    def stage(tile, x, tokens, o_d, D, held, i_thread):
        i_d, i_row = i_thread % BD, i_thread // BD
        d = o_d + i_d
        for o_step in range(0, EACH, AT_ONCE):
            for u in range(AT_ONCE):
                token = tokens[natural(i_row + (o_step + u) * ROW_STEP)]
                value = acc(0)
                if token >= 0 and d < D:
                    value = load(x[natural(token), natural(d)])
                held[natural(u)] = value
            for u in range(AT_ONCE):
                tile[natural(i_row + (o_step + u) * ROW_STEP), natural(i_d)] = held[natural(u)]

    return stage


@cache
def stage_heads_function(dtype: str, shape: Shape, ROWS: int) -> Any:
    """As `stage_function`, of tokens that each come from a head of their own: x (heads, tokens, dims)."""
    load, acc = loader(dtype), ELEMENT[accumulator(dtype)]
    BD, ROW_STEP = shape.BD, shape.THREADS // shape.BD
    EACH = ROWS // ROW_STEP
    AT_ONCE = min(AHEAD, EACH)

    @device_function
    def stage(tile, x, heads, tokens, o_d, D, held, i_thread):
        i_d, i_row = i_thread % BD, i_thread // BD
        d = o_d + i_d
        for o_step in range(0, EACH, AT_ONCE):
            for u in range(AT_ONCE):
                r = i_row + (o_step + u) * ROW_STEP
                token = tokens[natural(r)]
                value = acc(0)
                if token >= 0 and d < D:
                    value = load(x[natural(heads[natural(r)]), natural(token), natural(d)])
                held[natural(u)] = value
            for u in range(AT_ONCE):
                tile[natural(i_row + (o_step + u) * ROW_STEP), natural(i_d)] = held[natural(u)]

    return stage


@cache
def product_functions(shape: Shape) -> tuple[Any, Any]:
    """Two device functions on a thread's own part of a result, both summing in ascending order:

    add_scores(s, a, x): s[r, c] += sum_d a[r, d] x[c, d], for a [BT, BD] and x [BS, BD];
    add_rows(o, part, w, x): o[r, d] += sum_c w[r, c] x[c, d], for w [BT, BS] and x [BS, BD]. The tile's sum is made by
    itself, in `part`, and then added, so that rounding grows with the number of tiles and not of tokens.
    """
    TY, TX, RQ, RK, RD = shape
    BS, BD = shape.BS, shape.BD

    @device_function
    def add_scores(s, a, x, i_y, i_x):
        for d in range(BD):
            for j in range(RK):
                number = x[natural(i_x + TX * j), natural(d)]
                for i in range(RQ):
                    s[natural(i), natural(j)] += a[natural(i_y + TY * i), natural(d)] * number

    @device_function
    def add_rows(o, part, w, x, i_y, i_x):
        for i in range(RQ):
            for j in range(RD):
                part[natural(i), natural(j)] = 0
        for c in range(BS):
            for j in range(RD):
                number = x[natural(c), natural(i_x + TX * j)]
                for i in range(RQ):
                    part[natural(i), natural(j)] += w[natural(i_y + TY * i), natural(c)] * number
        for i in range(RQ):
            for j in range(RD):
                o[natural(i), natural(j)] += part[natural(i), natural(j)]

    return add_scores, add_rows


@device_function
def fill(x, value):
    """x[:, :] = value, for a thread's own numbers."""
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            x[natural(i), natural(j)] = value
