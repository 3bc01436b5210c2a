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

Array = NDArray[Any]


class DenseTime(NamedTuple):
    """What dense attention takes, forward."""

    by: str
    """Who computed it: "torch" or "numpy"."""
    queries: int
    """How many queries of every head were timed."""
    seconds: float
    """For all queries: the median of the repeats, scaled up."""


def time_dense(q: Array, k: Array, v: Array, queries: int, repeats: int) -> DenseTime:
    """Time dense attention in float32 on some queries over all keys: PyTorch's where installed, else NumPy's.

    q: (batch, heads, M, D), k and v: (batch, kv_heads, N, D or Dv).
    """
    some = np.ascontiguousarray(q[:, :, : min(queries, q.shape[2])], np.float32)
    k, v = (np.ascontiguousarray(x, np.float32) for x in (k, v))
    by, attend = (
        ("torch", torch_dense(some, k, v)) if find_spec("torch") else ("numpy", lambda: numpy_dense(some, k, v))
    )
    return DenseTime(by, some.shape[2], median_seconds(attend, repeats) * q.shape[2] / some.shape[2])


def torch_dense(q: Array, k: Array, v: Array) -> Callable[[], Any]:
    """PyTorch's attention, on as many cores as it finds."""
    import torch

    grouped = q.shape[1] != k.shape[1]
    tensors = [torch.from_numpy(x) for x in (q, k, v)]
    return lambda: torch.nn.functional.scaled_dot_product_attention(*tensors, enable_gqa=grouped)


def numpy_dense(q: Array, k: Array, v: Array) -> Array:
    """Softmax attention over all keys by the package's own code: one block holds all keys, and every query keeps it."""
    out: Array = llsa.attention(q, k, v, block_size=max(2, k.shape[2]), levels=1, topk=1, enrich=(), backend="numpy")
    return out


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Of the repeats, after one call that warms up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
