"""Dense attention on the CPU, as what LLSA is timed against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import llsa_np as llsa
from llsa_np.cli.words import count

Array = NDArray[Any]

FEW = 512
"""Fewer queries than this do not fill matrix products, so what they take, scaled up, is more than all queries take."""


class DenseTime(NamedTuple):
    """What dense attention takes, forward."""

    by: str
    """Who computed it: "torch" or "numpy"."""
    queries: int
    """How many queries of every head were timed."""
    seconds: float
    """For all queries: the median of the repeats, scaled up."""


def time_dense(q: Array, k: Array, v: Array, queries: int, repeats: int, scale: float | None = None) -> DenseTime:
    """Time dense attention in float32 on some queries over all keys: PyTorch's where installed, else NumPy's.

    q: (batch, heads, M, D), k and v: (batch, kv_heads, N, D or Dv). scale: of the logits, None for 1 / sqrt(D).
    """
    some = np.ascontiguousarray(q[:, :, : min(queries, q.shape[2])], np.float32)
    k, v = (np.ascontiguousarray(x, np.float32) for x in (k, v))
    by, attend = (
        ("torch", torch_dense(some, k, v, scale))
        if find_spec("torch")
        else ("numpy", lambda: numpy_dense(some, k, v, scale))
    )
    return DenseTime(by, some.shape[2], median_seconds(attend, repeats) * q.shape[2] / some.shape[2])


def torch_dense(q: Array, k: Array, v: Array, scale: float | None = None) -> Callable[[], Any]:
    """PyTorch's attention, on as many cores as it finds."""
    import torch

    grouped = q.shape[1] != k.shape[1]
    tensors = [torch.from_numpy(x) for x in (q, k, v)]
    return lambda: torch.nn.functional.scaled_dot_product_attention(*tensors, scale=scale, enable_gqa=grouped)


def numpy_dense(q: Array, k: Array, v: Array, scale: float | None = None) -> Array:
    """Softmax attention over all keys by the package's own code: one block holds all keys, and every query keeps it."""
    everything = max(2, k.shape[2])
    out: Array = llsa.attention(
        q, k, v, block_size=everything, levels=1, topk=1, enrich=(), scale=scale, backend="numpy"
    )
    return out


def caution(queries: int, of: int) -> str:
    """A line on what is timed on so few of all queries that scaling it up overstates dense attention; else nothing."""
    if queries >= min(FEW, of):
        return ""
    return (
        f"Caution: dense attention timed on {count(queries, 'query', 'queries')} and scaled up to {of:,} looks slower "
        f"than it is; {FEW} or more are fair."
    )


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Of the repeats, after one call that warms up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
