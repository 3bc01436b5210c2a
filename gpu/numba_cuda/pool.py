"""Pooling: the levels of a sequence as means of the tokens they stand for (spec.md, Pooling)."""

from __future__ import annotations

from functools import cache
from typing import Any

from llsa_np.gpu.numba_cuda.cuda import (
    ELEMENT,
    SIMULATED,
    accumulator,
    array,
    cuda,
    device_array,
    kernel,
    launch,
    loader,
    storer,
)
from llsa_np.hierarchy import Hierarchy

Spaces = list[tuple[tuple[int, ...], str]]

THREADS = 4 if SIMULATED else 128
RUN = 64


@cache
def pool_kernel(dtype: str, child_dtype: str) -> Any:
    """Means of one level from the sums of the level below.

    A thread makes one dim of one token: it adds the token's b children in ascending order and divides by the count.
    Children enter as unrounded sums (at level 1 as the tokens themselves), and the mean is rounded once, when stored.
    Neighbouring threads have neighbouring dims, so a warp reads whole rows.
    """
    acc, load, store = ELEMENT[accumulator(dtype)], loader(child_dtype), storer(dtype)
    sums_type = array(accumulator(dtype))

    @kernel(array(child_dtype), sums_type, array(dtype), "int64", "int64", "int64", "int64", "int64")
    def pool_level(children, sums, means, B, COUNT, LAST_COUNT, KEEPS_SUMS, ELEMENTS):
        i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
        if i < ELEMENTS:
            HEADS, LENGTH, D = means.shape[1], means.shape[2], means.shape[3]
            d = i % D
            i_token = i // D % LENGTH
            i_head = i // D // LENGTH % HEADS
            i_batch = i // D // LENGTH // HEADS

            total = acc(0)
            part = acc(0)  # of RUN children: many added one after another would add up the rounding of each
            o_child = i_token * B
            for i_child in range(o_child, min(o_child + B, children.shape[2])):
                part += load(children[i_batch, i_head, i_child, d])
                if (i_child - o_child) % RUN == RUN - 1:
                    total += part
                    part = acc(0)
            total += part
            if KEEPS_SUMS:
                sums[i_batch, i_head, i_token, d] = total
            count = acc(LAST_COUNT) if i_token == LENGTH - 1 else acc(COUNT)
            means[i_batch, i_head, i_token, d] = store(total / count)

    return pool_level


def pool_kernels(dtype: str, block_size: int) -> list[Any]:
    """All that pooling needs: from the tokens, and from the sums of a level."""
    return [pool_kernel(dtype, dtype), pool_kernel(dtype, accumulator(dtype))]


def pool_spaces(dtype: str, batch: int, heads: int, dim: int, hierarchy: Hierarchy) -> Spaces:
    """The sums of every level that has one above it."""
    lengths = hierarchy.lengths[1:-1] or (0,)
    return [((batch, heads, length, dim), accumulator(dtype)) for length in lengths]


def pool(x: Any, hierarchy: Hierarchy, out: list[Any], spaces: list[Any], dtype: str, stream: Any) -> None:
    """out[l - 1] = level l of x, l = 1..L: one launch a level."""
    children, child_dtype = x, dtype
    for level in range(1, hierarchy.levels + 1):
        means = device_array(out[level - 1])
        keeps_sums = level < hierarchy.levels
        sums = spaces[level - 1] if keeps_sums else spaces[0]
        batch, heads, length, dim = means.shape
        elements = batch * heads * length * dim
        launch(
            pool_kernel(dtype, child_dtype),
            -(-elements // THREADS),
            THREADS,
            stream,
            children,
            sums,
            means,
            min(hierarchy.block_size, hierarchy.lengths[level - 1]),
            min(hierarchy.stride(level), hierarchy.tokens),
            hierarchy.last_count(level),
            int(keeps_sums),
            elements,
        )
        children, child_dtype = sums, accumulator(dtype)
