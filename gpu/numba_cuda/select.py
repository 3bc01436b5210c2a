"""Hierarchical Top-K: which tokens of every level a query keeps (spec.md, Selection).

Two kernels tell it. `select_kernel` keeps a short sorted list for each query while the scores go by: simple, and fast
where K is small. `select_by_bits_kernel` has no list: it works out the K-th largest score bit by bit, all threads
counting, and keeps what lies above, which serves any K.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llsa_np.gpu.numba_cuda.attend import family, rows_above
from llsa_np.gpu.numba_cuda.cuda import (
    ELEMENT,
    SIMULATED,
    accumulator,
    array,
    bits_of,
    cuda,
    device_function,
    kernel,
    launch,
    loader,
    natural,
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

Spaces = list[tuple[tuple[int, ...], str]]

LIST_MOST = 4 if SIMULATED else 64
"""The largest K that is kept in a sorted list: 16 lists of 64 take 16 KiB of shared memory."""

BITS_THREADS = 4 if SIMULATED else 128
BITS_BLOCKS = 6 if SIMULATED else 1024
"""Blocks of `select_by_bits_kernel`, each with room for one query's scores: enough to fill a large GPU."""


@cache
def order_function(dtype: str) -> Any:
    """A device function: an integer that compares as the score does, +inf > finite > -inf > NaN, -0 equal to +0.

    A float's bits, read as an integer, already ascend for positive numbers; for negative ones the magnitude is flipped.
    The least integer is left for what is absent, the next is NaN.
    """
    bits_of_score = bits_of(accumulator(dtype))
    acc, integer = ELEMENT[accumulator(dtype)], ELEMENT["int64"]
    LARGEST = 2**63 - 1 if dtype == "float64" else 2**31 - 1

    @device_function
    def order(score):
        bits = integer(bits_of_score(score + acc(0)))  # -0 + 0 = +0
        if score != score:
            bits = integer(-LARGEST)
        elif bits < 0:
            bits = bits ^ integer(LARGEST)
        return bits

    return order


@cache
def select_kernel(dtype: str, shape: Shape) -> Any:
    """S_l for K_l up to LIST_MOST (spec.md, Selection).

    A block has one tile of at most BT queries of level l, all children of one token of level l + 1 and so with one list
    of candidates. Scores come in tiles of BS candidates, as in attention; then one thread for each query goes through
    them in ascending order and puts each that beats the last of its sorted list where it belongs, behind its equals.
    """
    TY, TX, RQ, RK, _ = shape
    THREADS, BT, BS, BD = shape.THREADS, shape.BT, shape.BS, shape.BD
    BD_PADDED, BS_PADDED, LIST = BD + 1, BS + 1, LIST_MOST
    acc, index, flag = ELEMENT[accumulator(dtype)], ELEMENT["int64"], ELEMENT["int32"]
    stage_queries, stage_candidates = stage_function(dtype, shape, BT), stage_function(dtype, shape, BS)
    add_scores, _ = product_functions(shape)
    order = order_function(dtype)
    floats, indices = array(dtype), array("int32")

    @kernel(floats, floats, indices, indices, *("int64",) * 9)
    def select_level(q, k, above, selected, BLOCK, PARTS, TILES, K, B, COLUMNS, CHILDREN, STRIDE, PARENTS):
        queries = cuda.shared.array((BT, BD_PADDED), acc)  # [BT, BD]
        staged = cuda.shared.array((BS, BD_PADDED), acc)  # [BS, BD] of keys
        scores = cuda.shared.array((BT, BS_PADDED), acc)  # [BT, BS]
        list_order = cuda.shared.array((BT, LIST), index)  # [BT, K], descending
        list_token = cuda.shared.array((BT, LIST), flag)
        list_length = cuda.shared.array(BT, flag)
        row_token = cuda.shared.array(BT, index)
        token = cuda.shared.array(BS, index)
        s = cuda.local.array((RQ, RK), acc)
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
            list_length[r] = 0
        cuda.syncthreads()
        if D <= BD:
            stage_queries(queries, q[i_batch, i_head], row_token, 0, D, held, i_thread)

        parents = above[i_batch, i_head, o_query // B]
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
                    scores[natural(i_y + TY * i), natural(i_x + TX * j)] = s[natural(i), natural(j)]
            cuda.syncthreads()

            for r in range(i_thread, BT, THREADS):
                length = list_length[r]
                for c in range(BS):
                    this = order(scores[natural(r), natural(c)])
                    if token[natural(c)] >= 0 and (length < K or this > list_order[r, K - 1]):
                        place = length if length < K else K - 1
                        while place > 0 and list_order[r, place - 1] < this:
                            list_order[r, place] = list_order[r, place - 1]
                            list_token[r, place] = list_token[r, place - 1]
                            place -= 1
                        list_order[r, place] = this
                        list_token[r, place] = token[c]
                        length = min(length + 1, K)
                list_length[r] = length
            cuda.syncthreads()

        # Ascending by token, -1 at the end
        for r in range(i_thread, BT, THREADS):
            if row_token[r] >= 0:
                length = list_length[r]
                for i_sorted in range(1, length):
                    this = list_token[r, i_sorted]
                    place = i_sorted
                    while place > 0 and list_token[r, place - 1] > this:
                        list_token[r, place] = list_token[r, place - 1]
                        place -= 1
                    list_token[r, place] = this
                for i_kept in range(K):
                    kept = list_token[r, i_kept] if i_kept < length else -1
                    selected[i_batch, i_head, row_token[r], i_kept] = kept

    return select_level


@cache
def select_by_bits_kernel(dtype: str) -> Any:
    """S_l for any K_l (spec.md, Selection).

    A block takes one query after another. Its threads score the candidates, each a share of them, and write the scores
    down as integers that compare alike. The K-th largest of these is found bit by bit from the top: a bit stays set if
    K of them are at least as large. Each thread then counts, in its own run of the list, what lies above and what is
    equal; the sums over the threads before it tell where its kept candidates go, in ascending order.
    """
    THREADS = BITS_THREADS
    BITS = 63 if dtype == "float64" else 31
    LOWEST = -(2**BITS)
    acc, index = ELEMENT[accumulator(dtype)], ELEMENT["int64"]
    load, order = loader(dtype), order_function(dtype)
    floats, indices, integers = array(dtype), array("int32"), array("int64", 2)

    @kernel(floats, floats, indices, indices, integers, *("int64",) * 8)
    def select_level_by_bits(q, k, above, selected, orders, ROWS, K, B, COLUMNS, CHILDREN, STRIDE, PARENTS, BLOCKS):
        count_above = cuda.shared.array(THREADS, index)
        count_equal = cuda.shared.array(THREADS, index)

        i_thread, i_block = cuda.threadIdx.x, cuda.blockIdx.x
        HEADS, M, D, N = q.shape[1], q.shape[2], q.shape[3], k.shape[2]
        CANDIDATES = COLUMNS * CHILDREN if COLUMNS > 0 else N
        EACH = (CANDIDATES + THREADS - 1) // THREADS
        for i_row in range(i_block, ROWS, BLOCKS):
            i_query = i_row % M
            i_head = i_row // M % HEADS
            i_batch = i_row // M // HEADS
            i_kv = i_head // (HEADS // k.shape[1])
            parents = above[i_batch, i_head, i_query // B]

            for c in range(i_thread, CANDIDATES, THREADS):
                token = candidate(parents, c, COLUMNS, CHILDREN, STRIDE, PARENTS, N)
                this = index(LOWEST)
                if token >= 0:
                    score = acc(0)
                    for d in range(D):
                        score += load(q[i_batch, i_head, i_query, d]) * load(k[i_batch, i_kv, token, d])
                    this = order(score)
                orders[i_block, c] = this
            cuda.syncthreads()

            threshold = index(LOWEST)
            for i_bit in range(BITS, -1, -1):
                higher = index(0) if i_bit == BITS else threshold + (index(1) << i_bit)  # the sign bit comes first
                count = index(0)
                for c in range(i_thread, CANDIDATES, THREADS):
                    if orders[i_block, c] >= higher:
                        count += 1
                count_above[i_thread] = count
                cuda.syncthreads()
                total = index(0)
                for i in range(THREADS):
                    total += count_above[i]
                if total >= K:
                    threshold = higher
                cuda.syncthreads()

            first, last = i_thread * EACH, min(CANDIDATES, (i_thread + 1) * EACH)
            more, equal = index(0), index(0)
            for c in range(first, last):
                if orders[i_block, c] > threshold:
                    more += 1
                elif orders[i_block, c] == threshold:
                    equal += 1
            count_above[i_thread] = more
            count_equal[i_thread] = equal
            cuda.syncthreads()
            more, equal, all_more, all_equal = index(0), index(0), index(0), index(0)
            for i in range(THREADS):
                if i < i_thread:
                    more += count_above[i]
                    equal += count_equal[i]
                all_more += count_above[i]
                all_equal += count_equal[i]
            missing = index(0) if threshold == LOWEST else K - all_more  # what is absent is never kept
            for c in range(first, last):
                this = orders[i_block, c]
                if this > threshold or (this == threshold and equal < missing):
                    token = candidate(parents, c, COLUMNS, CHILDREN, STRIDE, PARENTS, N)
                    selected[i_batch, i_head, i_query, more + min(equal, missing)] = token
                if this > threshold:
                    more += 1
                elif this == threshold:
                    equal += 1
            for i_kept in range(all_more + min(all_equal, missing) + i_thread, K, THREADS):
                selected[i_batch, i_head, i_query, i_kept] = -1
            cuda.syncthreads()

    return select_level_by_bits


def select_kernels(dtype: str, block_size: int) -> list[Any]:
    """All that selection needs, for any K."""
    return [select_kernel(dtype, shape_for(dtype, block_size)), select_by_bits_kernel(dtype)]


def select_spaces(batch: int, heads: int, query_hierarchy: Hierarchy, hierarchy: Hierarchy, topk: Any) -> Spaces:
    """Room for the scores of BITS_BLOCKS queries, if any level needs it."""
    most = 0
    for level in range(1, hierarchy.levels + 1):
        if topk[level - 1] > LIST_MOST:
            candidates = hierarchy.lengths[level]
            if level < hierarchy.levels:
                candidates = min(topk[level], hierarchy.lengths[level + 1]) * min(hierarchy.block_size, candidates)
            most = max(most, candidates)
    rows = batch * heads * query_hierarchy.lengths[1]
    return [((min(rows, BITS_BLOCKS) if most else 0, most), "int64")]


def select(
    q_levels: list[Any],
    k_levels: list[Any],
    hierarchy: Hierarchy,
    selected: list[Any],
    spaces: list[Any],
    dtype: str,
    stream: Any,
) -> None:
    """S_l for l = L down to 1, one launch a level. q_levels, k_levels, selected: levels 1..L."""
    shape = shape_for(dtype, hierarchy.block_size)
    for level in range(hierarchy.levels, 0, -1):
        q, k, rows = q_levels[level - 1], k_levels[level - 1], selected[level - 1]
        batch, heads, queries, topk = rows.shape
        _, COLUMNS, *relations = family(level, hierarchy, selected)
        arrays = (q, k, rows_above(level, selected), rows)
        B = hierarchy.block_size
        if topk <= LIST_MOST:
            tiles = tiling(queries, hierarchy.block_size, shape.BT)
            launch(
                select_kernel(dtype, shape),
                batch * heads * tiles.TILES,
                shape.THREADS,
                stream,
                *(*arrays, *tiles, topk, B, COLUMNS, *relations),
            )
        else:
            rows_here = batch * heads * queries
            blocks = min(rows_here, BITS_BLOCKS)
            launch(
                select_by_bits_kernel(dtype),
                blocks,
                BITS_THREADS,
                stream,
                *(*arrays, spaces[0], rows_here, topk, B, COLUMNS, *relations, blocks),
            )
