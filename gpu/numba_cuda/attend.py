"""Attention of every query to its candidates on every level, in one softmax (spec.md, Attention).

The softmax runs along one list of (level, candidates). Here every level of that list is one launch, coarsest first, of
one kernel: what a query has seen so far (the largest logit, the sum of exponentials, the weighted sum of values) waits
between launches in memory, which costs two passes over an array like out and keeps the kernel free of levels.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from llsa_np.gpu.numba_cuda.cuda import (
    ELEMENT,
    accumulator,
    array,
    cuda,
    exp,
    kernel,
    launch,
    log,
    natural,
    storer,
)
from llsa_np.gpu.numba_cuda.tiles import (
    AHEAD,
    Shape,
    candidate,
    fill,
    product_functions,
    shape_for,
    stage_function,
    tiling,
)
from llsa_np.hierarchy import Hierarchy
from llsa_np.options import AttendOptions

Spaces = list[tuple[tuple[int, ...], str]]


@cache
def attend_kernel(dtype: str, shape: Shape) -> Any:
    """One level's share of the attention of all queries (spec.md, Attention: one list), by an online softmax.

    A block has one tile of at most BT queries, all of one block of b and so of one list of candidates, and BD of the
    output's dims; values with more dims take more blocks, which work the scores out again. It walks the list in tiles
    of BS candidates: scores, the largest of each row, weights, and their sum of values. A thread holds RQ x RK scores
    and RQ x RD outputs in registers.
    """
    TY, TX, RQ, RK, RD = shape
    THREADS, BT, BS, BD = shape.THREADS, shape.BT, shape.BS, shape.BD
    BD_PADDED, BS_PADDED = BD + 1, BS + 1
    acc, index, flag = ELEMENT[accumulator(dtype)], ELEMENT["int64"], ELEMENT["int32"]
    store = storer(dtype)
    stage_queries, stage_candidates = stage_function(dtype, shape, BT), stage_function(dtype, shape, BS)
    add_scores, add_rows = product_functions(shape)
    floats, sums, scores = array(dtype), array(accumulator(dtype)), accumulator(dtype)
    INFINITY = math.inf

    @kernel(
        *(floats, floats, floats, array("int32"), floats, array(scores, 3)),
        *(sums, sums, sums),
        *("int64", "int64", "int64", "int64", "int64", "int64", "int64", "int64"),
        *(scores, scores, scores, "int64", "int64"),
    )
    def attend_level(
        q, k, v, selected, out, lse,
        seen_out, seen_top, seen_z,
        BLOCK, PARTS, TILES, SPAN, COLUMNS, CHILDREN, STRIDE, PARENTS,
        scale, log_count, log_last_count, IS_FIRST, IS_LAST,
    ):  # fmt: skip
        queries = cuda.shared.array((BT, BD_PADDED), acc)  # [BT, BD]
        staged = cuda.shared.array((BS, BD_PADDED), acc)  # [BS, BD] of keys, then of values
        weights = cuda.shared.array((BT, BS_PADDED), acc)  # [BT, BS]
        reached = cuda.shared.array((BT, TX), acc)  # a thread's largest logit of a row, at the end its sum
        row_token = cuda.shared.array(BT, index)
        row_top = cuda.shared.array(BT, acc)
        row_shift = cuda.shared.array(BT, acc)
        row_fade = cuda.shared.array(BT, acc)
        token = cuda.shared.array(BS, index)
        log_weight = cuda.shared.array(BS, acc)
        s = cuda.local.array((RQ, RK), acc)
        o = cuda.local.array((RQ, RD), acc)
        part = cuda.local.array((RQ, RD), acc)
        z = cuda.local.array(RQ, acc)
        held = cuda.local.array(AHEAD, acc)

        i_thread = cuda.threadIdx.x
        i_y, i_x = i_thread // TX, i_thread % TX
        HEADS, M, D, DV = q.shape[1], q.shape[2], q.shape[3], v.shape[3]
        CHUNKS = (DV + BD - 1) // BD
        i_chunk = cuda.blockIdx.x % CHUNKS
        i_tile = cuda.blockIdx.x // CHUNKS % TILES
        i_head = cuda.blockIdx.x // CHUNKS // TILES % HEADS
        i_batch = cuda.blockIdx.x // CHUNKS // TILES // HEADS
        i_kv = i_head // (HEADS // k.shape[1])
        o_value = i_chunk * BD
        N = k.shape[2]

        o_block = i_tile // PARTS * BLOCK
        o_query = o_block + i_tile % PARTS * BT
        end = min(o_query + BT, min(o_block + BLOCK, M))
        for r in range(i_thread, BT, THREADS):
            row_token[r] = o_query + r if o_query + r < end else -1
            row_top[r] = -INFINITY
            if not IS_FIRST and o_query + r < end:
                row_top[r] = seen_top[i_batch, i_head, o_query + r, i_chunk]
        cuda.syncthreads()
        fill(o, acc(0))
        for i in range(RQ):
            z[i] = acc(0)
            i_query = row_token[i_y + TY * i]
            if not IS_FIRST and i_query >= 0:
                if i_x == 0:
                    z[i] = seen_z[i_batch, i_head, i_query, i_chunk]
                for j in range(RD):
                    if o_value + i_x + TX * j < DV:
                        o[i, j] = seen_out[i_batch, i_head, i_query, o_value + i_x + TX * j]
        if D <= BD:  # all dims at once: the queries stay
            stage_queries(queries, q[i_batch, i_head], row_token, 0, D, held, i_thread)

        parents = selected[i_batch, i_head, o_query // SPAN]
        CANDIDATES = COLUMNS * CHILDREN if COLUMNS > 0 else N
        for o_candidate in range(0, CANDIDATES, BS):
            # Which tokens these are
            some = flag(0)
            for c in range(i_thread, BS, THREADS):
                token[c] = -1
                if o_candidate + c < CANDIDATES:
                    token[c] = candidate(parents, o_candidate + c, COLUMNS, CHILDREN, STRIDE, PARENTS, N)
                log_weight[c] = log_last_count if token[c] == N - 1 else log_count
                if token[c] >= 0:
                    some = flag(1)
            if cuda.syncthreads_or(some) == 0:
                continue

            # Scores, some dims at a time
            fill(s, acc(0))
            for o_dim in range(0, D, BD):
                if D > BD:
                    stage_queries(queries, q[i_batch, i_head], row_token, o_dim, D, held, i_thread)
                stage_candidates(staged, k[i_batch, i_kv], token, o_dim, D, held, i_thread)
                cuda.syncthreads()
                add_scores(s, queries, staged, i_y, i_x)
                cuda.syncthreads()

            # The largest logit of each row, and how much of what was seen fades as it rises
            for i in range(RQ):
                largest = acc(-INFINITY)
                for j in range(RK):
                    c = natural(i_x + TX * j)
                    logit = acc(-INFINITY)
                    if token[c] >= 0:
                        logit = scale * s[natural(i), natural(j)] + log_weight[c]
                    s[natural(i), natural(j)] = logit
                    if logit > largest:
                        largest = logit
                reached[natural(i_y + TY * i), natural(i_x)] = largest
            stage_candidates(staged, v[i_batch, i_kv], token, o_value, DV, held, i_thread)
            cuda.syncthreads()
            for r in range(i_thread, BT, THREADS):
                top = row_top[r]
                for x in range(TX):
                    if reached[natural(r), natural(x)] > top:
                        top = reached[natural(r), natural(x)]
                shift = acc(0) if top == -INFINITY else top  # nothing seen yet: exp(-inf - 0) = 0
                row_fade[r] = exp(row_top[r] - shift)
                row_shift[r] = shift
                row_top[r] = top
            cuda.syncthreads()

            # Weights, and their sum of values
            for i in range(RQ):
                r = natural(i_y + TY * i)
                shift, fade = row_shift[r], row_fade[r]
                total = acc(0)
                for j in range(RK):
                    weight = exp(s[natural(i), natural(j)] - shift)
                    total += weight
                    weights[r, natural(i_x + TX * j)] = weight
                z[natural(i)] = z[natural(i)] * fade + total
                for j in range(RD):
                    o[natural(i), natural(j)] *= fade
            cuda.syncthreads()
            add_rows(o, part, weights, staged, i_y, i_x)
            cuda.syncthreads()

        # The sum of exponentials, from the columns' threads in a fixed order
        for i in range(RQ):
            reached[i_y + TY * i, i_x] = z[i]
        cuda.syncthreads()
        for i in range(RQ):
            i_query = row_token[i_y + TY * i]
            total = acc(0)
            for x in range(TX):
                total += reached[i_y + TY * i, x]
            if i_query >= 0:
                top = row_top[i_y + TY * i]
                divisor = acc(1) if total == 0 else total  # no candidates: out 0, lse -inf
                for j in range(RD):
                    d = o_value + i_x + TX * j
                    if d < DV:
                        if IS_LAST:
                            out[i_batch, i_head, i_query, d] = store(o[i, j] / divisor)
                        else:
                            seen_out[i_batch, i_head, i_query, d] = o[i, j]
                if i_x == 0:
                    if not IS_LAST:
                        seen_top[i_batch, i_head, i_query, i_chunk] = top
                        seen_z[i_batch, i_head, i_query, i_chunk] = total
                    elif i_chunk == 0:
                        lse[i_batch, i_head, i_query] = acc(-INFINITY) if total == 0 else top + log(divisor)

    return attend_level


def attend_kernels(dtype: str, block_size: int) -> list[Any]:
    """All that attention needs."""
    return [attend_kernel(dtype, shape_for(dtype, block_size))]


def attend_spaces(
    dtype: str, batch: int, heads: int, queries: int, value_dim: int, block_size: int, options: AttendOptions
) -> Spaces:
    """What queries have seen between two levels: weighted values, and per chunk of them the top and the sum."""
    chunks = -(-value_dim // shape_for(dtype, block_size).BD)
    if len(options.levels) == 1:
        queries = 0
    return [((batch, heads, queries, size), accumulator(dtype)) for size in (value_dim, chunks, chunks)]


def attend(
    q: Any,
    k_levels: list[Any],
    v_levels: list[Any],
    selected: list[Any],
    key_hierarchy: Hierarchy,
    options: AttendOptions,
    out: Any,
    lse: Any,
    spaces: list[Any],
    dtype: str,
    stream: Any,
) -> None:
    """out and lse of all queries: one launch for every level that takes part."""
    shape = shape_for(dtype, key_hierarchy.block_size)
    batch, heads, queries, _ = q.shape
    BLOCK, PARTS, TILES = tiling(queries, key_hierarchy.block_size, shape.BT)
    chunks = -(-v_levels[0].shape[3] // shape.BD)
    for level in options.levels:
        launch(
            attend_kernel(dtype, shape),
            batch * heads * TILES * chunks,
            shape.THREADS,
            stream,
            *(q, k_levels[level], v_levels[level], rows_above(level, selected), out, lse, *spaces),
            *(BLOCK, PARTS, TILES, *family(level, key_hierarchy, selected)),
            *scalars(level, key_hierarchy, options, dtype),
            int(level == options.levels[0]),
            int(level == options.levels[-1]),
        )


def rows_above(level: int, selected: list[Any]) -> Any:
    """S_{l+1}; on the coarsest level, where there is none, any array of its kind."""
    return selected[min(level, len(selected) - 1)]


def family(level: int, hierarchy: Hierarchy, selected: list[Any]) -> tuple[int, int, int, int, int]:
    """(SPAN, COLUMNS, CHILDREN, STRIDE, PARENTS) of a level: how many queries share a row of S_{l+1}, how many parents
    a row has, how many children a parent has and how far apart they start, and how many parents there are."""
    length = hierarchy.lengths[level]
    if level == hierarchy.levels:
        return 2**62, 0, length, length, 1
    parents = hierarchy.lengths[level + 1]
    columns = min(selected[level].shape[3], parents)  # a row has no more entries than there are parents
    return hierarchy.stride(level + 1), columns, min(hierarchy.block_size, length), hierarchy.block_size, parents


def scalars(level: int, hierarchy: Hierarchy, options: AttendOptions, dtype: str) -> tuple[Any, Any, Any]:
    """The scale of the logits, and the log of the count of a token and of the level's last token, as numbers of the
    accumulation type."""
    import numpy as np

    acc = np.float64 if dtype == "float64" else np.float32
    full = last = 1
    if options.reweight and level > 0:
        full, last = min(hierarchy.stride(level), hierarchy.tokens), hierarchy.last_count(level)
    return acc(options.scale), acc(math.log(full)), acc(math.log(last))
