"""Attention with the softmax in two passes: the plain form of what `attend` does in one.

A softmax divides exponentials by their sum, and to keep them finite subtracts the largest logit first. Read literally,
that is two passes over the list of candidates: one to find the largest logit of each query, one to add exponentials and
values. `attend` makes one pass, in which the largest logit may still rise; here no sum is ever corrected, but every
score is worked out twice. Nothing else differs: the same tiles, the same list, the same launches for each level.

No backend calls this file; it is here to be read beside `attend`, and to be timed against it.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from llsa_np.gpu.numba_cuda.attend import Spaces, family, rows_above, scalars
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


@cache
def largest_logit_kernel(dtype: str, shape: Shape) -> Any:
    """The first pass over one level: top_t = max(top_t, max_j scale <q_t, k_l[j]> + log c_l[j]).

    A block has one tile of at most BT queries, all of one block of b and so of one list of candidates, which it walks
    in tiles of BS. A thread holds RQ x RK scores and the largest logit so far of each of its RQ rows, over its columns.
    """
    TY, TX, RQ, RK, _ = shape
    THREADS, BT, BS, BD = shape.THREADS, shape.BT, shape.BS, shape.BD
    BD_PADDED = BD + 1
    acc, index, flag = ELEMENT[accumulator(dtype)], ELEMENT["int64"], ELEMENT["int32"]
    stage_queries, stage_candidates = stage_function(dtype, shape, BT), stage_function(dtype, shape, BS)
    add_scores, _ = product_functions(shape)
    floats, scores = array(dtype), accumulator(dtype)
    INFINITY = math.inf

    @kernel(
        *(floats, floats, array("int32"), array(scores, 3)),
        *("int64",) * 8,
        *(scores, scores, scores, "int64"),
    )
    def largest_logit(
        q, k, selected, top,
        BLOCK, PARTS, TILES, SPAN, COLUMNS, CHILDREN, STRIDE, PARENTS,
        scale, log_count, log_last_count, IS_FIRST,
    ):  # fmt: skip
        queries = cuda.shared.array((BT, BD_PADDED), acc)  # [BT, BD]
        staged = cuda.shared.array((BS, BD_PADDED), acc)  # [BS, BD] of keys
        reached = cuda.shared.array((BT, TX), acc)  # a thread's largest logit of a row
        row_token = cuda.shared.array(BT, index)
        token = cuda.shared.array(BS, index)
        s = cuda.local.array((RQ, RK), acc)
        largest = cuda.local.array(RQ, acc)
        held = cuda.local.array(AHEAD, acc)

        i_thread = cuda.threadIdx.x
        i_y, i_x = i_thread // TX, i_thread % TX
        HEADS, M, D, N = q.shape[1], q.shape[2], q.shape[3], k.shape[2]
        i_tile = cuda.blockIdx.x % TILES
        i_head = cuda.blockIdx.x // TILES % HEADS
        i_batch = cuda.blockIdx.x // TILES // HEADS
        i_kv = i_head // (HEADS // k.shape[1])

        o_block = i_tile // PARTS * BLOCK
        o_query = o_block + i_tile % PARTS * BT
        end = min(o_query + BT, min(o_block + BLOCK, M))
        for r in range(i_thread, BT, THREADS):
            row_token[r] = o_query + r if o_query + r < end else -1
        cuda.syncthreads()
        for i in range(RQ):
            largest[i] = -INFINITY
        if D <= BD:  # all dims at once: the queries stay
            stage_queries(queries, q[i_batch, i_head], row_token, 0, D, held, i_thread)

        parents = selected[i_batch, i_head, o_query // SPAN]
        CANDIDATES = COLUMNS * CHILDREN if COLUMNS > 0 else N
        for o_candidate in range(0, CANDIDATES, BS):
            some = flag(0)
            for c in range(i_thread, BS, THREADS):
                token[c] = -1
                if o_candidate + c < CANDIDATES:
                    token[c] = candidate(parents, o_candidate + c, COLUMNS, CHILDREN, STRIDE, PARENTS, N)
                if token[c] >= 0:
                    some = flag(1)
            if cuda.syncthreads_or(some) == 0:
                continue
            fill(s, acc(0))
            for o_dim in range(0, D, BD):
                if D > BD:
                    stage_queries(queries, q[i_batch, i_head], row_token, o_dim, D, held, i_thread)
                stage_candidates(staged, k[i_batch, i_kv], token, o_dim, D, held, i_thread)
                cuda.syncthreads()
                add_scores(s, queries, staged, i_y, i_x)
                cuda.syncthreads()
            for i in range(RQ):
                for j in range(RK):
                    c = natural(i_x + TX * j)
                    if token[c] >= 0:
                        log_weight = log_last_count if token[c] == N - 1 else log_count
                        logit = scale * s[natural(i), natural(j)] + log_weight
                        if logit > largest[natural(i)]:
                            largest[natural(i)] = logit
            cuda.syncthreads()

        for i in range(RQ):
            reached[i_y + TY * i, i_x] = largest[i]
        cuda.syncthreads()
        for r in range(i_thread, BT, THREADS):
            if row_token[r] >= 0:
                so_far = acc(-INFINITY) if IS_FIRST else top[i_batch, i_head, row_token[r]]
                for x in range(TX):
                    if reached[r, x] > so_far:
                        so_far = reached[r, x]
                top[i_batch, i_head, row_token[r]] = so_far

    return largest_logit


@cache
def weighted_sum_kernel(dtype: str, shape: Shape) -> Any:
    """The second pass over one level: z_t += sum_j w_tj and o_t += sum_j w_tj v_l[j], w_tj = c_l[j] exp(s_tj - top_t);
    after the last level out_t = o_t / z_t and lse_t = top_t + log z_t.

    Blocks and threads as in the first pass; values with more than BD dims take more blocks, which work the scores out
    again.
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
        *(floats, floats, floats, array("int32"), floats, array(scores, 3), array(scores, 3), sums, sums),
        *("int64",) * 8,
        *(scores, scores, scores, "int64", "int64"),
    )
    def weighted_sum(
        q, k, v, selected, out, lse, top, seen_out, seen_z,
        BLOCK, PARTS, TILES, SPAN, COLUMNS, CHILDREN, STRIDE, PARENTS,
        scale, log_count, log_last_count, IS_FIRST, IS_LAST,
    ):  # fmt: skip
        queries = cuda.shared.array((BT, BD_PADDED), acc)  # [BT, BD]
        staged = cuda.shared.array((BS, BD_PADDED), acc)  # [BS, BD] of keys, then of values
        weights = cuda.shared.array((BT, BS_PADDED), acc)  # [BT, BS]
        reached = cuda.shared.array((BT, TX), acc)  # a thread's sum of a row
        row_token = cuda.shared.array(BT, index)
        row_shift = cuda.shared.array(BT, acc)
        token = cuda.shared.array(BS, index)
        s = cuda.local.array((RQ, RK), acc)
        o = cuda.local.array((RQ, RD), acc)
        part = cuda.local.array((RQ, RD), acc)
        z = cuda.local.array(RQ, acc)
        held = cuda.local.array(AHEAD, acc)

        i_thread = cuda.threadIdx.x
        i_y, i_x = i_thread // TX, i_thread % TX
        HEADS, M, D, DV, N = q.shape[1], q.shape[2], q.shape[3], v.shape[3], k.shape[2]
        CHUNKS = (DV + BD - 1) // BD
        i_chunk = cuda.blockIdx.x % CHUNKS
        i_tile = cuda.blockIdx.x // CHUNKS % TILES
        i_head = cuda.blockIdx.x // CHUNKS // TILES % HEADS
        i_batch = cuda.blockIdx.x // CHUNKS // TILES // HEADS
        i_kv = i_head // (HEADS // k.shape[1])
        o_value = i_chunk * BD

        o_block = i_tile // PARTS * BLOCK
        o_query = o_block + i_tile % PARTS * BT
        end = min(o_query + BT, min(o_block + BLOCK, M))
        for r in range(i_thread, BT, THREADS):
            row_token[r] = -1
            row_shift[r] = 0
            if o_query + r < end:
                row_token[r] = o_query + r
                if top[i_batch, i_head, o_query + r] != -INFINITY:
                    row_shift[r] = top[i_batch, i_head, o_query + r]
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
        if D <= BD:
            stage_queries(queries, q[i_batch, i_head], row_token, 0, D, held, i_thread)

        parents = selected[i_batch, i_head, o_query // SPAN]
        CANDIDATES = COLUMNS * CHILDREN if COLUMNS > 0 else N
        for o_candidate in range(0, CANDIDATES, BS):
            some = flag(0)
            for c in range(i_thread, BS, THREADS):
                token[c] = -1
                if o_candidate + c < CANDIDATES:
                    token[c] = candidate(parents, o_candidate + c, COLUMNS, CHILDREN, STRIDE, PARENTS, N)
                if token[c] >= 0:
                    some = flag(1)
            if cuda.syncthreads_or(some) == 0:
                continue
            fill(s, acc(0))
            for o_dim in range(0, D, BD):
                if D > BD:
                    stage_queries(queries, q[i_batch, i_head], row_token, o_dim, D, held, i_thread)
                stage_candidates(staged, k[i_batch, i_kv], token, o_dim, D, held, i_thread)
                cuda.syncthreads()
                add_scores(s, queries, staged, i_y, i_x)
                cuda.syncthreads()
            stage_candidates(staged, v[i_batch, i_kv], token, o_value, DV, held, i_thread)

            # Weights relative to the largest logit of all, and their sum of values
            for i in range(RQ):
                r = natural(i_y + TY * i)
                total = acc(0)
                for j in range(RK):
                    c = natural(i_x + TX * j)
                    weight = acc(0)
                    if token[c] >= 0:
                        log_weight = log_last_count if token[c] == N - 1 else log_count
                        weight = exp(scale * s[natural(i), natural(j)] + log_weight - row_shift[r])
                    total += weight
                    weights[r, c] = weight
                z[natural(i)] += total
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
                        seen_z[i_batch, i_head, i_query, i_chunk] = total
                    elif i_chunk == 0:
                        shift = row_shift[i_y + TY * i]
                        lse[i_batch, i_head, i_query] = acc(-INFINITY) if total == 0 else shift + log(divisor)

    return weighted_sum


def attend_two_passes_kernels(dtype: str, block_size: int) -> list[Any]:
    """Both passes."""
    shape = shape_for(dtype, block_size)
    return [largest_logit_kernel(dtype, shape), weighted_sum_kernel(dtype, shape)]


def attend_two_passes_spaces(
    dtype: str, batch: int, heads: int, queries: int, value_dim: int, block_size: int, options: AttendOptions
) -> Spaces:
    """The largest logits; and between two levels the weighted values and, per chunk of them, the sum."""
    chunks = -(-value_dim // shape_for(dtype, block_size).BD)
    acc = accumulator(dtype)
    rows = queries if len(options.levels) > 1 else 0
    return [((batch, heads, queries), acc), *(((batch, heads, rows, size), acc) for size in (value_dim, chunks))]


def attend_two_passes(
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
    """out and lse of all queries: two launches for every level that takes part."""
    shape = shape_for(dtype, key_hierarchy.block_size)
    batch, heads, queries, _ = q.shape
    tiles = tiling(queries, key_hierarchy.block_size, shape.BT)
    chunks = -(-v_levels[0].shape[3] // shape.BD)
    top, seen_out, seen_z = spaces
    for level in options.levels:
        launch(
            largest_logit_kernel(dtype, shape),
            batch * heads * tiles.TILES,
            shape.THREADS,
            stream,
            *(q, k_levels[level], rows_above(level, selected), top),
            *(*tiles, *family(level, key_hierarchy, selected)),
            *scalars(level, key_hierarchy, options, dtype),
            int(level == options.levels[0]),
        )
    for level in options.levels:
        launch(
            weighted_sum_kernel(dtype, shape),
            batch * heads * tiles.TILES * chunks,
            shape.THREADS,
            stream,
            *(q, k_levels[level], v_levels[level], rows_above(level, selected), out, lse, top, seen_out, seen_z),
            *(*tiles, *family(level, key_hierarchy, selected)),
            *scalars(level, key_hierarchy, options, dtype),
            int(level == options.levels[0]),
            int(level == options.levels[-1]),
        )
