"""Top-K for any K, without a list: the K-th largest score is worked out bit by bit."""

from __future__ import annotations

from functools import cache
from typing import Any

from llsa_np.gpu.numba_cuda.cuda import ELEMENT, SIMULATED, accumulator, array, cuda, kernel, loader
from llsa_np.gpu.numba_cuda.order import least_order, order_function
from llsa_np.gpu.numba_cuda.tiles import candidate

BITS_THREADS = 4 if SIMULATED else 128
BITS_BLOCKS = 6 if SIMULATED else 1024
"""Blocks of `select_by_bits_kernel`, each with room for one query's scores: enough to fill a large GPU."""


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
    LOWEST = least_order(dtype)
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
