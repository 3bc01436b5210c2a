"""Gradients of attention, down through the levels to the tokens (spec.md, Gradients).

dq is gathered by the queries, along the same list as in the forward pass: one launch for every level. dk and dv are
gathered by the keys: here the roles swap, a tile of keys walks the list of the queries that attend to it, which
`transpose` has made. Nothing is scattered, so no two threads ever add to one number, and every sum has one order.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from llsa_np.gpu.numba_cuda.attend import family, rows_above, scalars
from llsa_np.gpu.numba_cuda.cuda import (
    ELEMENT,
    SIMULATED,
    accumulator,
    array,
    cuda,
    exp,
    kernel,
    launch,
    loader,
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
    stage_heads_function,
    tiling,
)
from llsa_np.gpu.numba_cuda.transpose import Lists, lists, transpose, transpose_kernels
from llsa_np.hierarchy import Hierarchy
from llsa_np.options import AttendOptions

Spaces = list[tuple[tuple[int, ...], str]]

THREADS = 4 if SIMULATED else 128
SPLIT = 8 if SIMULATED else 512
"""Queries of one piece of work on the key side: a key block that every query selected becomes many pieces, whose sums
are added in order. Fixed, so that the order of a sum depends on nothing but shapes and the selection."""
DENSE_PIECES = 512
"""About how many pieces the coarsest level's keys make for one head, which every query attends to."""


@cache
def delta_kernel(dtype: str) -> Any:
    """delta_t = <dO_t, out_t> - dlse_t (spec.md, Gradients). A thread takes one query."""
    acc, load = ELEMENT[accumulator(dtype)], loader(dtype)
    floats, sums = array(dtype), array(accumulator(dtype), 3)

    @kernel(floats, floats, sums, "int64", sums, "int64")
    def delta_of_queries(dout, out, dlse, HAS_DLSE, delta, QUERIES):
        i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if i < QUERIES:
            HEADS, M, DV = dout.shape[1], dout.shape[2], dout.shape[3]
            i_query, i_head, i_batch = i % M, i // M % HEADS, i // M // HEADS
            total = acc(0)
            for d in range(DV):
                total += load(dout[i_batch, i_head, i_query, d]) * load(out[i_batch, i_head, i_query, d])
            if HAS_DLSE:
                total -= dlse[i_batch, i_head, i_query]
            delta[i_batch, i_head, i_query] = total

    return delta_of_queries


@cache
def query_gradient_kernel(dtype: str, shape: Shape) -> Any:
    """One level's share of dq_t = scale sum_j dS_tj k_l[j], dS = P (<dO_t, v_l[j]> - delta_t) (spec.md, Gradients).

    Tiles, threads and list as in the forward kernel, with BD of the dims of q for each block. P comes from the scores
    and lse at once, so nothing has to be searched or rescaled. One tile of memory serves values, then keys.
    """
    TY, TX, RQ, RK, RD = shape
    THREADS, BT, BS, BD = shape.THREADS, shape.BT, shape.BS, shape.BD
    BD_PADDED, BS_PADDED = BD + 1, BS + 1
    acc, index, flag = ELEMENT[accumulator(dtype)], ELEMENT["int64"], ELEMENT["int32"]
    store = storer(dtype)
    stage_rows, stage_candidates = stage_function(dtype, shape, BT), stage_function(dtype, shape, BS)
    add_scores, add_rows = product_functions(shape)
    floats, scores = array(dtype), accumulator(dtype)
    INFINITY = math.inf

    @kernel(
        *(floats, floats, floats, floats, array(scores, 3), array(scores, 3), array("int32"), array(scores), floats),
        *("int64",) * 8,
        *(scores, scores, scores, "int64", "int64"),
    )
    def query_gradient(
        dout, q, k, v, lse, delta, selected, seen, dq,
        BLOCK, PARTS, TILES, SPAN, COLUMNS, CHILDREN, STRIDE, PARENTS,
        scale, log_count, log_last_count, IS_FIRST, IS_LAST,
    ):  # fmt: skip
        queries = cuda.shared.array((BT, BD_PADDED), acc)  # [BT, BD]
        douts = cuda.shared.array((BT, BD_PADDED), acc)  # [BT, BD]
        staged = cuda.shared.array((BS, BD_PADDED), acc)  # [BS, BD] of values, then of keys
        slopes = cuda.shared.array((BT, BS_PADDED), acc)  # [BT, BS] of dS
        row_token = cuda.shared.array(BT, index)
        row_lse = cuda.shared.array(BT, acc)
        row_delta = cuda.shared.array(BT, acc)
        token = cuda.shared.array(BS, index)
        log_weight = cuda.shared.array(BS, acc)
        s = cuda.local.array((RQ, RK), acc)
        dp = cuda.local.array((RQ, RK), acc)
        o = cuda.local.array((RQ, RD), acc)
        part = cuda.local.array((RQ, RD), acc)
        held = cuda.local.array(AHEAD, acc)

        i_thread = cuda.threadIdx.x
        i_y, i_x = i_thread // TX, i_thread % TX
        HEADS, M, D, DV = q.shape[1], q.shape[2], q.shape[3], v.shape[3]
        CHUNKS = (D + BD - 1) // BD
        i_chunk = cuda.blockIdx.x % CHUNKS
        i_tile = cuda.blockIdx.x // CHUNKS % TILES
        i_head = cuda.blockIdx.x // CHUNKS // TILES % HEADS
        i_batch = cuda.blockIdx.x // CHUNKS // TILES // HEADS
        i_kv = i_head // (HEADS // k.shape[1])
        o_result = i_chunk * BD
        N = k.shape[2]

        o_block = i_tile // PARTS * BLOCK
        o_query = o_block + i_tile % PARTS * BT
        end = min(o_query + BT, min(o_block + BLOCK, M))
        for r in range(i_thread, BT, THREADS):
            row_token[r] = -1
            row_lse[r] = -INFINITY
            row_delta[r] = 0
            if o_query + r < end:
                row_token[r] = o_query + r
                row_lse[r] = lse[i_batch, i_head, o_query + r]
                row_delta[r] = delta[i_batch, i_head, o_query + r]
        cuda.syncthreads()
        fill(o, acc(0))
        for i in range(RQ):
            i_query = row_token[i_y + TY * i]
            for j in range(RD):
                if not IS_FIRST and i_query >= 0 and o_result + i_x + TX * j < D:
                    o[i, j] = seen[i_batch, i_head, i_query, o_result + i_x + TX * j]
        if D <= BD:  # all dims at once: they stay
            stage_rows(queries, q[i_batch, i_head], row_token, 0, D, held, i_thread)
        if DV <= BD:
            stage_rows(douts, dout[i_batch, i_head], row_token, 0, DV, held, i_thread)

        parents = selected[i_batch, i_head, o_query // SPAN]
        CANDIDATES = COLUMNS * CHILDREN if COLUMNS > 0 else N
        for o_candidate in range(0, CANDIDATES, BS):
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

            # <dO, v>, then scores
            fill(dp, acc(0))
            for o_dim in range(0, DV, BD):
                if DV > BD:
                    stage_rows(douts, dout[i_batch, i_head], row_token, o_dim, DV, held, i_thread)
                stage_candidates(staged, v[i_batch, i_kv], token, o_dim, DV, held, i_thread)
                cuda.syncthreads()
                add_scores(dp, douts, staged, i_y, i_x)
                cuda.syncthreads()
            fill(s, acc(0))
            for o_dim in range(0, D, BD):
                if D > BD:
                    stage_rows(queries, q[i_batch, i_head], row_token, o_dim, D, held, i_thread)
                stage_candidates(staged, k[i_batch, i_kv], token, o_dim, D, held, i_thread)
                cuda.syncthreads()
                add_scores(s, queries, staged, i_y, i_x)
                cuda.syncthreads()

            # dS; none where there is no candidate, and none for a query that has no candidates at all
            for i in range(RQ):
                r = natural(i_y + TY * i)
                for j in range(RK):
                    c = natural(i_x + TX * j)
                    slope = acc(0)
                    if token[c] >= 0 and row_lse[r] != -INFINITY:
                        p = exp(scale * s[natural(i), natural(j)] + log_weight[c] - row_lse[r])
                        slope = p * (dp[natural(i), natural(j)] - row_delta[r])
                    slopes[r, c] = slope
            if D > BD:  # else the keys are there still
                stage_candidates(staged, k[i_batch, i_kv], token, o_result, D, held, i_thread)
            cuda.syncthreads()
            add_rows(o, part, slopes, staged, i_y, i_x)
            cuda.syncthreads()

        for i in range(RQ):
            i_query = row_token[i_y + TY * i]
            for j in range(RD):
                d = o_result + i_x + TX * j
                if i_query >= 0 and d < D:
                    if IS_LAST:
                        dq[i_batch, i_head, i_query, d] = store(scale * o[i, j])
                    else:
                        seen[i_batch, i_head, i_query, d] = o[i, j]

    return query_gradient


@cache
def key_gradient_kernel(dtype: str, shape: Shape) -> Any:
    """dk_l[j] = scale sum_t dS_tj q_t and dv_l[j] = sum_t P_tj dO_t of one level (spec.md, Gradients).

    A block has at most BT keys, all children of one parent and so with one list of queries, BD of the dims of k and of
    v, and one piece of that list: SPLIT queries. It walks them in tiles of BS: scores and P, dv with dO, dS, dk with Q,
    which take turns in one tile of memory. The first piece of a list writes into `sums`, the others into `parts`, from
    where `add_parts_kernel` adds them in order.

    On the coarsest level the list is all queries of all query heads, and "parents" are runs of BT keys.
    """
    TY, TX, RQ, RK, RD = shape
    THREADS, BT, BS, BD = shape.THREADS, shape.BT, shape.BS, shape.BD
    BD_PADDED, BS_PADDED = BD + 1, BS + 1
    acc, index, flag = ELEMENT[accumulator(dtype)], ELEMENT["int64"], ELEMENT["int32"]
    stage_keys, stage_queries = stage_function(dtype, shape, BT), stage_heads_function(dtype, shape, BS)
    add_scores, add_rows = product_functions(shape)
    floats, scores, integers = array(dtype), accumulator(dtype), array("int64", 1)
    INFINITY = math.inf

    @kernel(
        *(floats, floats, floats, floats, array(scores, 3), array(scores, 3), integers, integers, integers),
        *(array(scores), array(scores), array(scores, 1), array(scores, 1)),
        *("int64",) * 16,
        *(scores, scores, scores),
    )
    def key_gradient(
        dout, q, k, v, lse, delta, starts, rows, items,
        k_sums, v_sums, k_parts, v_parts,
        IS_COARSEST, PARENTS, CHILDREN, STRIDE, RANGES, ROWS, COLUMNS, LENGTH, SPAN, RUN, SPLIT, ITEMS, EXTRA,
        CHUNKS, NEEDS_K, NEEDS_V,
        scale, log_count, log_last_count,
    ):  # fmt: skip
        keys = cuda.shared.array((BT, BD_PADDED), acc)  # [BT, BD]
        values = cuda.shared.array((BT, BD_PADDED), acc)  # [BT, BD]
        staged = cuda.shared.array((BS, BD_PADDED), acc)  # [BS, BD] of queries, of dO, of queries again
        weights = cuda.shared.array((BT, BS_PADDED), acc)  # [BT, BS] of P, then of dS
        key_token = cuda.shared.array(BT, index)
        token = cuda.shared.array(BS, index)
        head = cuda.shared.array(BS, index)
        query_lse = cuda.shared.array(BS, acc)
        query_delta = cuda.shared.array(BS, acc)
        s = cuda.local.array((RQ, RK), acc)
        dp = cuda.local.array((RQ, RK), acc)
        o_k = cuda.local.array((RQ, RD), acc)
        o_v = cuda.local.array((RQ, RD), acc)
        part = cuda.local.array((RQ, RD), acc)
        held = cuda.local.array(AHEAD, acc)

        i_thread = cuda.threadIdx.x
        i_y, i_x = i_thread // TX, i_thread % TX
        KV_HEADS, N, D, DV, M = k.shape[1], k.shape[2], k.shape[3], v.shape[3], q.shape[2]
        GROUP = q.shape[1] // KV_HEADS
        PARTS = (CHILDREN + BT - 1) // BT
        i_chunk = cuda.blockIdx.x % CHUNKS
        i_part = cuda.blockIdx.x // CHUNKS % PARTS
        i_item = cuda.blockIdx.x // CHUNKS // PARTS % ITEMS
        i_list = cuda.blockIdx.x // CHUNKS // PARTS // ITEMS
        i_batch, i_kv = i_list // KV_HEADS, i_list % KV_HEADS
        o_result = i_chunk * BD

        # Whose piece this is, and which of its pieces
        is_there = True
        if IS_COARSEST:
            PIECES = ITEMS // PARENTS
            i_parent = i_item // PIECES
            i_piece = i_item % PIECES
            i_extra = i_item - i_parent - 1
            o_rows = index(0)
            QUERIES = GROUP * M
        else:
            o_items = i_list * (PARENTS + 1)
            is_there = i_item < items[o_items + PARENTS]
            low, high = index(0), PARENTS - 1  # the last parent whose first piece is not after this one
            while low < high:
                middle = (low + high + 1) // 2
                if items[o_items + middle] <= i_item:
                    low = middle
                else:
                    high = middle - 1
            i_parent = low
            i_piece = i_item - items[o_items + i_parent]
            i_extra = i_item - i_parent - 1
            o_starts = i_list * (PARENTS * RANGES + 1) + i_parent * RANGES
            start = index(0)
            if i_parent > 0:
                start = starts[o_starts - 1]
            o_rows = i_list * ROWS * COLUMNS + start
            QUERIES = (starts[o_starts + RANGES - 1] - start) * RUN
        first = i_piece * SPLIT
        last = min(QUERIES, first + SPLIT)
        if not is_there:
            last = first

        o_key = i_parent * STRIDE + i_part * BT
        end = min(o_key + BT, min(i_parent * STRIDE + CHILDREN, N))
        for r in range(i_thread, BT, THREADS):
            key_token[r] = o_key + r if is_there and o_key + r < end else -1
        cuda.syncthreads()
        fill(o_k, acc(0))
        fill(o_v, acc(0))
        if D <= BD:  # all dims at once: they stay
            stage_keys(keys, k[i_batch, i_kv], key_token, 0, D, held, i_thread)
        if DV <= BD:
            stage_keys(values, v[i_batch, i_kv], key_token, 0, DV, held, i_thread)

        for o_query in range(first, last, BS):
            # Which queries these are; none where it lies past the end, or has no candidates at all
            some = flag(0)
            for c in range(i_thread, BS, THREADS):
                token[c] = -1
                head[c] = 0
                query_lse[c] = 0
                query_delta[c] = 0
                if o_query + c < last:
                    if IS_COARSEST:
                        i_head = (o_query + c) // M
                        i_query = (o_query + c) % M
                    else:
                        i_row = rows[o_rows + (o_query + c) // RUN]
                        i_head = i_row // LENGTH
                        i_query = i_row % LENGTH * SPAN + (o_query + c) % RUN
                    i_head += i_kv * GROUP
                    if i_query < M and lse[i_batch, i_head, i_query] != -INFINITY:
                        token[c] = i_query
                        head[c] = i_head
                        query_lse[c] = lse[i_batch, i_head, i_query]
                        query_delta[c] = delta[i_batch, i_head, i_query]
                        some = flag(1)
            if cuda.syncthreads_or(some) == 0:
                continue

            # P
            fill(s, acc(0))
            for o_dim in range(0, D, BD):
                if D > BD:
                    stage_keys(keys, k[i_batch, i_kv], key_token, o_dim, D, held, i_thread)
                stage_queries(staged, q[i_batch], head, token, o_dim, D, held, i_thread)
                cuda.syncthreads()
                add_scores(s, keys, staged, i_y, i_x)
                cuda.syncthreads()
            for i in range(RQ):
                r = natural(i_y + TY * i)
                log_weight = log_last_count if key_token[r] == N - 1 else log_count
                for j in range(RK):
                    c = natural(i_x + TX * j)
                    p = acc(0)
                    if key_token[r] >= 0 and token[c] >= 0:
                        p = exp(scale * s[natural(i), natural(j)] + log_weight - query_lse[c])
                    s[natural(i), natural(j)] = p
                    weights[r, c] = p

            # <dO, v>, and dv += P dO
            fill(dp, acc(0))
            if NEEDS_K:
                for o_dim in range(0, DV, BD):
                    if DV > BD:
                        stage_keys(values, v[i_batch, i_kv], key_token, o_dim, DV, held, i_thread)
                    stage_queries(staged, dout[i_batch], head, token, o_dim, DV, held, i_thread)
                    cuda.syncthreads()
                    add_scores(dp, values, staged, i_y, i_x)
                    cuda.syncthreads()
            if NEEDS_V:
                if DV > BD or not NEEDS_K:  # else dO is there still
                    stage_queries(staged, dout[i_batch], head, token, o_result, DV, held, i_thread)
                cuda.syncthreads()
                add_rows(o_v, part, weights, staged, i_y, i_x)
            cuda.syncthreads()

            # dS, and dk += dS Q
            if NEEDS_K:
                for i in range(RQ):
                    r = natural(i_y + TY * i)
                    for j in range(RK):
                        c = natural(i_x + TX * j)
                        slope = acc(0)
                        if key_token[r] >= 0 and token[c] >= 0:
                            slope = s[natural(i), natural(j)] * (dp[natural(i), natural(j)] - query_delta[c])
                        weights[r, c] = slope
                stage_queries(staged, q[i_batch], head, token, o_result, D, held, i_thread)
                cuda.syncthreads()
                add_rows(o_k, part, weights, staged, i_y, i_x)
                cuda.syncthreads()

        for i in range(RQ):
            i_key = key_token[i_y + TY * i]
            if i_key >= 0:
                i_place = (i_list * EXTRA + i_extra) * CHILDREN + i_key - i_parent * STRIDE
                for j in range(RD):
                    d = o_result + i_x + TX * j
                    if NEEDS_K and d < D:
                        if i_piece == 0:
                            k_sums[i_batch, i_kv, i_key, d] = scale * o_k[i, j]
                        else:
                            k_parts[i_place * D + d] = scale * o_k[i, j]
                    if NEEDS_V and d < DV:
                        if i_piece == 0:
                            v_sums[i_batch, i_kv, i_key, d] = o_v[i, j]
                        else:
                            v_parts[i_place * DV + d] = o_v[i, j]

    return key_gradient


@cache
def add_parts_kernel(dtype: str) -> Any:
    """Adds to the first piece's sums those of the other pieces, in order. A thread takes one dim of one key."""
    scores = accumulator(dtype)

    @kernel(array(scores), array(scores, 1), array("int64", 1), *("int64",) * 7)
    def add_parts(sums, parts, items, IS_COARSEST, PARENTS, CHILDREN, STRIDE, ITEMS, EXTRA, ELEMENTS):
        i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if i < ELEMENTS:
            KV_HEADS, N, D = sums.shape[1], sums.shape[2], sums.shape[3]
            d = i % D
            i_key = i // D % N
            i_list = i // D // N
            i_parent = i_key // STRIDE
            if IS_COARSEST:
                first = i_parent * (ITEMS // PARENTS)
                last = first + ITEMS // PARENTS
            else:
                first = items[i_list * (PARENTS + 1) + i_parent]
                last = items[i_list * (PARENTS + 1) + i_parent + 1]
            total = sums[i_list // KV_HEADS, i_list % KV_HEADS, i_key, d]
            for i_item in range(first + 1, last):
                i_place = (i_list * EXTRA + i_item - i_parent - 1) * CHILDREN + i_key - i_parent * STRIDE
                total += parts[i_place * D + d]
            sums[i_list // KV_HEADS, i_list % KV_HEADS, i_key, d] = total

    return add_parts


@cache
def unpool_kernel(dtype: str) -> Any:
    """From a level down to the one below: each child receives what its parent hands down, besides its own sum divided
    by its count. On level 0 the result is rounded and stored. A thread takes one dim of one token."""
    acc, store, scores = ELEMENT[accumulator(dtype)], storer(dtype), accumulator(dtype)

    @kernel(array(scores), array(scores), array(dtype), *("int64",) * 7)
    def unpool_level(own, above, gradient, B, COUNT, LAST_COUNT, IS_OWN, HAS_ABOVE, IS_LAST, ELEMENTS):
        i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if i < ELEMENTS:
            HEADS, N, D = own.shape[1], own.shape[2], own.shape[3]
            d, i_token, i_head, i_batch = i % D, i // D % N, i // D // N % HEADS, i // D // N // HEADS
            total = acc(0)
            if IS_OWN:
                count = acc(LAST_COUNT) if i_token == N - 1 else acc(COUNT)
                total = own[i_batch, i_head, i_token, d] / count
            if HAS_ABOVE:
                total += above[i_batch, i_head, i_token // B, d]
            if IS_LAST:
                gradient[i_batch, i_head, i_token, d] = store(total)
            else:
                own[i_batch, i_head, i_token, d] = total

    return unpool_level


def backward_kernels(dtype: str, block_size: int) -> list[Any]:
    """All that gradients need."""
    shape = shape_for(dtype, block_size)
    kernels = [delta_kernel(dtype), query_gradient_kernel(dtype, shape), key_gradient_kernel(dtype, shape)]
    return [*kernels, add_parts_kernel(dtype), unpool_kernel(dtype), *transpose_kernels()]


# --- sizes


def lists_of(level: int, hierarchy: Hierarchy, queries: Hierarchy, topk: tuple[int, ...], group: int) -> Lists:
    """The lists of the queries that attend to a level below the coarsest."""
    parents = hierarchy.lengths[level + 1]
    return lists(
        rows=group * queries.lengths[level + 1],
        columns=min(topk[level], parents),
        parents=parents,
        children=min(hierarchy.block_size, hierarchy.lengths[level]),
        run=min(hierarchy.stride(level + 1), queries.tokens),
        split=SPLIT,
    )


def dense_pieces(hierarchy: Hierarchy, queries: int, group: int, BT: int) -> tuple[int, int, int]:
    """(parents, pieces, split) on the coarsest level: runs of BT keys, pieces of all queries, queries of a piece."""
    parents = -(-hierarchy.lengths[-1] // BT)
    pieces = max(1, min(-(-group * queries // SPLIT), DENSE_PIECES // parents))
    split = -(-group * queries // pieces)
    return parents, -(-group * queries // split), split


def backward_spaces(
    dtype: str,
    batch: int,
    heads: int,
    kv_heads: int,
    dim: int,
    value_dim: int,
    query_hierarchy: Hierarchy,
    hierarchy: Hierarchy,
    topk: tuple[int, ...],
    options: AttendOptions,
    needs: frozenset[str],
) -> Spaces:
    """delta; dq of the levels so far; the lists (starts, rows, items); parts of dk and dv; their sums, by level."""
    acc, queries = accumulator(dtype), query_hierarchy.tokens
    group, number = heads // max(1, kv_heads), batch * kv_heads
    counts = pairs = parents = places = 0
    if needs & {"k", "v"} and group:
        for level in options.levels:
            if level == hierarchy.levels:
                BT = shape_for(dtype, hierarchy.block_size).BT
                runs, pieces, _ = dense_pieces(hierarchy, queries, group, BT)
                places = max(places, runs * (pieces - 1) * BT)
            else:
                of = lists_of(level, hierarchy, query_hierarchy, topk, group)
                counts, pairs, parents = max(counts, of.COUNTS), max(pairs, of.PAIRS), max(parents, of.PARENTS + 1)
                places = max(places, (of.ITEMS - of.PARENTS) * of.CHILDREN)
    spaces: Spaces = [
        ((batch, heads, queries), acc),
        ((batch, heads, queries if "q" in needs and len(options.levels) > 1 else 0, dim), acc),
        *(((number * size,), "int64") for size in (counts, pairs, parents)),
    ]
    dims = {"k": dim, "v": value_dim}
    spaces += [((number * places * dims[name] if name in needs else 0,), acc) for name in ("k", "v")]
    for name in ("k", "v"):
        spaces += [((batch, kv_heads, length if name in needs else 0, dims[name]), acc) for length in hierarchy.lengths]
    return spaces


# --- the operation


def attend_backward(
    dout: Any,
    q: Any,
    k_levels: list[Any],
    v_levels: list[Any],
    out: Any,
    lse: Any,
    dlse: Any | None,
    selected: list[Any],
    query_hierarchy: Hierarchy,
    hierarchy: Hierarchy,
    options: AttendOptions,
    dq: Any | None,
    dk: Any | None,
    dv: Any | None,
    spaces: list[Any],
    dtype: str,
    stream: Any,
) -> None:
    """dq, dk and dv, each unless None."""
    batch, heads, queries, dim = q.shape
    value_dim = dout.shape[3]
    kv_heads = k_levels[0].shape[1]
    group = heads // max(1, kv_heads)
    shape = shape_for(dtype, hierarchy.block_size)
    delta, seen, *lists_room = spaces[:5]
    k_parts, v_parts = spaces[5:7]
    k_sums, v_sums = spaces[7 : 8 + hierarchy.levels], spaces[8 + hierarchy.levels :]

    rows = batch * heads * queries
    launch(
        delta_kernel(dtype),
        -(-rows // THREADS),
        THREADS,
        stream,
        *(dout, out, lse if dlse is None else dlse, int(dlse is not None), delta, rows),
    )
    if dq is not None:
        BLOCK, PARTS, TILES = tiling(queries, hierarchy.block_size, shape.BT)
        for level in options.levels:
            launch(
                query_gradient_kernel(dtype, shape),
                batch * heads * TILES * -(-dim // shape.BD),
                shape.THREADS,
                stream,
                *(dout, q, k_levels[level], v_levels[level], lse, delta, rows_above(level, selected), seen, dq),
                *(BLOCK, PARTS, TILES, *family(level, hierarchy, selected)),
                *scalars(level, hierarchy, options, dtype),
                int(level == options.levels[0]),
                int(level == options.levels[-1]),
            )
    if dk is None and dv is None:
        return

    topk = tuple(level.shape[3] for level in selected)
    chunks = -(-max(dim if dk is not None else 0, value_dim if dv is not None else 0) // shape.BD)
    levels = options.levels if group else ()  # keys that no query head reads have zero gradients
    for level in levels:
        is_coarsest = level == hierarchy.levels
        if is_coarsest:
            parents, pieces, split = dense_pieces(hierarchy, queries, group, shape.BT)
            children = stride = shape.BT
            items = parents * pieces
            of = Lists(1, 1, parents, 1, 1, children, 1, items)
        else:
            of = lists_of(level, hierarchy, query_hierarchy, topk, group)
            stride, split = hierarchy.block_size, SPLIT
            transpose(selected[level], of, split, kv_heads, lists_room, stream)
        family_sizes = (int(is_coarsest), of.PARENTS, of.CHILDREN, stride)
        extra = of.ITEMS - of.PARENTS
        span = 1 if is_coarsest else hierarchy.stride(level + 1)
        length = 1 if is_coarsest else query_hierarchy.lengths[level + 1]
        launch(
            key_gradient_kernel(dtype, shape),
            batch * kv_heads * of.ITEMS * -(-of.CHILDREN // shape.BT) * chunks,
            shape.THREADS,
            stream,
            *(dout, q, k_levels[level], v_levels[level], lse, delta, *lists_room),
            *(k_sums[level], v_sums[level], k_parts, v_parts),
            *(*family_sizes, of.RANGES, of.ROWS, of.COLUMNS, length, span, of.RUN, split, of.ITEMS, extra),
            *(chunks, int(dk is not None), int(dv is not None)),
            *scalars(level, hierarchy, options, dtype),
        )
        for gradient, sums, parts in ((dk, k_sums[level], k_parts), (dv, v_sums[level], v_parts)):
            if gradient is not None and extra:
                elements = batch * kv_heads * sums.shape[2] * sums.shape[3]
                launch(
                    add_parts_kernel(dtype),
                    -(-elements // THREADS),
                    THREADS,
                    stream,
                    *(sums, parts, lists_room[2], *family_sizes, of.ITEMS, extra, elements),
                )

    for gradient, sums in ((dk, k_sums), (dv, v_sums)):
        if gradient is None:
            continue
        has_above = False
        for level in range(options.levels[0], -1, -1):
            own = sums[level]
            elements = batch * kv_heads * own.shape[2] * own.shape[3]
            launch(
                unpool_kernel(dtype),
                -(-elements // THREADS),
                THREADS,
                stream,
                *(own, sums[level + 1] if has_above else own, gradient, hierarchy.block_size),
                *(min(hierarchy.stride(level), hierarchy.tokens), hierarchy.last_count(level)),
                *(int(level in levels), int(has_above), int(level == 0), elements),
            )
            has_above = True
