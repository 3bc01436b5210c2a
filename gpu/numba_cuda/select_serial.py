"""Top-K with one thread for each query, which keeps a short sorted list: the plain form, and fast where K is small."""

from __future__ import annotations

from functools import cache
from typing import Any

from llsa_np.gpu.numba_cuda.cuda import ELEMENT, SIMULATED, accumulator, array, cuda, kernel, natural
from llsa_np.gpu.numba_cuda.order import order_function
from llsa_np.gpu.numba_cuda.tiles import AHEAD, Shape, candidate, fill, product_functions, stage_function

LIST = 4 if SIMULATED else 64
"""The longest list: 16 lists of 64 take 12 KiB of shared memory."""


@cache
def select_serial_kernel(dtype: str, shape: Shape) -> Any:
    """S_l for K_l up to LIST (spec.md, Selection).

    A block has one tile of at most BT queries of level l, all children of one token of level l + 1 and so with one list
    of candidates. Scores come in tiles of BS candidates, as in attention; then one thread for each query goes through
    them in ascending order and puts each that beats the last of its sorted list where it belongs, behind its equals.
    """
    TY, TX, RQ, RK, _ = shape
    THREADS, BT, BS, BD = shape.THREADS, shape.BT, shape.BS, shape.BD
    BD_PADDED, BS_PADDED = BD + 1, BS + 1
    acc, index, flag = ELEMENT[accumulator(dtype)], ELEMENT["int64"], ELEMENT["int32"]
    stage_queries, stage_candidates = stage_function(dtype, shape, BT), stage_function(dtype, shape, BS)
    add_scores, _ = product_functions(shape)
    order = order_function(dtype)
    floats, indices = array(dtype), array("int32")

    @kernel(floats, floats, indices, indices, *("int64",) * 9)
    def select_level_serially(q, k, above, selected, BLOCK, PARTS, TILES, K, B, COLUMNS, CHILDREN, STRIDE, PARENTS):
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

    return select_level_serially
