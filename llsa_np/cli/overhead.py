"""What the public call adds to the NumPy reference's own work, where that work is small."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import llsa_np as llsa
from llsa_np.backends import Room
from llsa_np.hierarchy import hierarchy_of
from llsa_np.numpy_backend import backend
from llsa_np.options import check_attend_options

OPTIONS: dict[str, Any] = {"block_size": 4, "levels": 1, "topk": 2}
DIM = 8
SHAPE = {"dtype": "float32", "batch": 1, "heads": 1, "dim": DIM} | OPTIONS
LENGTHS = (8, 64)
CALLS = 2000


def rows() -> list[dict[str, Any]]:
    """Microseconds of the operations alone, and of `attention`, which checks, allocates and calls them."""
    found = []
    for tokens in LENGTHS:
        alone, public = calls(tokens)
        if alone().tobytes() != public().tobytes():
            raise ValueError("bench: the operations alone and the public call differ, so neither is timed")
        of = {"operations": alone, "public": public}
        found.append({"backend": "numpy"} | SHAPE | {"tokens": tokens} | in_turn(of))
    return found


def calls(tokens: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The four operations on arrays that are allocated for them, in the order in which `attention` has them; and it."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 1, tokens, DIM), dtype=np.float32) for _ in range(3))
    hierarchy = hierarchy_of(tokens, OPTIONS["block_size"], OPTIONS["levels"])
    selection = llsa.select(q, k, **OPTIONS)
    options = check_attend_options("bench", None, True, None, "full", levels=OPTIONS["levels"], dim=DIM)
    room = Room([], 0, "cpu", "float32")

    def levels(x: Any) -> list[Any]:
        pooled = [np.empty((1, 1, length, x.shape[3]), x.dtype) for length in hierarchy.lengths[1:]]
        backend.pool(x, hierarchy, pooled, room)
        return [x, *pooled]

    def alone() -> Any:
        q_levels, k_levels = levels(q), levels(k)
        selected = [np.empty(x.shape, np.int32) for x in selection]
        backend.select(q_levels[1:], k_levels[1:], hierarchy, selected, room)
        # Here, as `attention` does it: right after the others it would be 15 us faster, its code being in the caches
        v_levels = levels(v)
        out, lse = np.empty(v.shape, v.dtype), np.empty(v.shape[:3], np.float32)
        backend.attend(q, k_levels, v_levels, selection._with_arrays(selected), options, out, lse, room)
        return out

    return alone, lambda: llsa.attention(q, k, v, **OPTIONS)


def in_turn(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Medians in microseconds of calls that take turns, so that what slows the machine down slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(CALLS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e6 * (time.perf_counter() - start))
    return {f"{name}_us": round(statistics.median(of), 1) for name, of in times.items()}
