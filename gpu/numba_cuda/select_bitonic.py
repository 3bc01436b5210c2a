"""Top-K by a bitonic sorting network: all threads of a block sort together, whatever the data."""

from __future__ import annotations

from functools import cache
from typing import Any

from llsa_np.gpu.numba_cuda.cuda import ELEMENT, accumulator, array, cuda, device_function, kernel, natural
from llsa_np.gpu.numba_cuda.order import least_order, order_function, order_type
from llsa_np.gpu.numba_cuda.tiles import AHEAD, Shape, candidate, fill, product_functions, stage_function


@device_function
def precedes(order_a, token_a, order_b, token_b):
    """Whether a stands before b: the larger score first, of equal ones the lower index."""
    return order_a > order_b or (order_a == order_b and token_a < token_b)


@device_function
def exchange(orders, tokens, r, low, high, descending):
    """Puts two entries of row r in order: the one that precedes to `low`, or to `high` where the row shall ascend."""
    order_low, order_high = orders[natural(r), natural(low)], orders[natural(r), natural(high)]
    token_low, token_high = tokens[natural(r), natural(low)], tokens[natural(r), natural(high)]
    if precedes(order_high, token_high, order_low, token_low) == descending:
        orders[natural(r), natural(low)], orders[natural(r), natural(high)] = order_high, order_low
        tokens[natural(r), natural(low)], tokens[natural(r), natural(high)] = token_high, token_low


@cache
def select_bitonic_kernel(dtype: str, shape: Shape) -> Any:
    """S_l for K_l up to BS (spec.md, Selection).

    A block has one tile of at most BT queries of level l, all children of one token of level l + 1 and so with one list
    of candidates, which it walks in tiles of BS. Of every tile's scores the rows are sorted, then merged with the BS
    best so far. A thread compares and exchanges every THREADS-th pair of what a step compares.

    A bitonic row first ascends and then descends (or the other way). Comparing entry i with entry i + half and putting
    each pair in order leaves two halves that are bitonic again, all of one before all of the other; so log2(BS) steps
    sort it. Sorted runs of 2, 4, ... that ascend and descend in turn make bitonic rows of twice that length.
    """
    TY, TX, RQ, RK, _ = shape
    THREADS, BT, BS, BD = shape.THREADS, shape.BT, shape.BS, shape.BD
    BD_PADDED, HALF = BD + 1, BS // 2
    acc, index, flag = ELEMENT[accumulator(dtype)], ELEMENT["int64"], ELEMENT["int32"]
    order_of_score, integer = order_function(dtype), ELEMENT[order_type(dtype)]
    LEAST, NO_TOKEN = least_order(dtype), 2**31 - 1
    stage_queries, stage_candidates = stage_function(dtype, shape, BT), stage_function(dtype, shape, BS)
    add_scores, _ = product_functions(shape)
    floats, indices = array(dtype), array("int32")

    @kernel(floats, floats, indices, indices, *("int64",) * 9)
    def select_level_bitonic(q, k, above, selected, BLOCK, PARTS, TILES, K, B, COLUMNS, CHILDREN, STRIDE, PARENTS):
        queries = cuda.shared.array((BT, BD_PADDED), acc)  # [BT, BD]
        staged = cuda.shared.array((BS, BD_PADDED), acc)  # [BS, BD] of keys
        new_order = cuda.shared.array((BT, BS), integer)  # [BT, BS]
        new_token = cuda.shared.array((BT, BS), flag)
        best_order = cuda.shared.array((BT, BS), integer)  # [BT, BS], descending
        best_token = cuda.shared.array((BT, BS), flag)
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
        for i in range(i_thread, BT * BS, THREADS):
            best_order[i // BS, i % BS] = LEAST
            best_token[i // BS, i % BS] = NO_TOKEN
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
                    r, c = natural(i_y + TY * i), natural(i_x + TX * j)
                    new_order[r, c] = order_of_score(s[natural(i), natural(j)]) if token[c] >= 0 else LEAST
                    new_token[r, c] = token[c] if token[c] >= 0 else NO_TOKEN
            cuda.syncthreads()

            # Sort the new ones: runs of 2, 4, ... BS, which ascend and descend in turn; the last descends
            run = 2
            while run <= BS:
                step = run // 2
                while step > 0:
                    for i in range(i_thread, BT * HALF, THREADS):
                        low = i % HALF // step * step * 2 + i % HALF % step
                        exchange(new_order, new_token, i // HALF, low, low + step, low // run % 2 == 0)
                    cuda.syncthreads()
                    step //= 2
                run *= 2

            # The BS best of both: of the i-th best so far and the i-th worst of the new ones the better
            for i in range(i_thread, BT * BS, THREADS):
                r, i_best, i_new = natural(i // BS), natural(i % BS), natural(BS - 1 - i % BS)
                if precedes(new_order[r, i_new], new_token[r, i_new], best_order[r, i_best], best_token[r, i_best]):
                    best_order[r, i_best] = new_order[r, i_new]
                    best_token[r, i_best] = new_token[r, i_new]
            cuda.syncthreads()
            step = HALF  # they are a bitonic row: sort it
            while step > 0:
                for i in range(i_thread, BT * HALF, THREADS):
                    low = i % HALF // step * step * 2 + i % HALF % step
                    exchange(best_order, best_token, i // HALF, low, low + step, True)
                cuda.syncthreads()
                step //= 2

        # Ascending by token, -1 at the end: a kept token's place is the number of kept tokens below it
        for i in range(i_thread, BT * K, THREADS):
            r, i_kept = i // K, i % K
            if row_token[r] >= 0:
                this = best_token[r, i_kept]
                place = index(0)
                for other in range(K):
                    if best_token[r, other] < this or (best_token[r, other] == this and other < i_kept):
                        place += 1
                selected[i_batch, i_head, row_token[r], place] = this if this < NO_TOKEN else -1

    return select_level_bitonic
