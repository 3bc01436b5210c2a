"""Running the NumPy reference's independent pieces on every core."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

Task = TypeVar("Task")


def run(work: Callable[[Task], None], tasks: Sequence[Task], most_inline: int = 1) -> None:
    """Call work(task) for every task, on as many threads as there are cores; inline where there are few tasks.

    NaN, infinity and overflow in the data are results here, not warnings. BLAS is held to one thread meanwhile if
    threadpoolctl is installed: its own threads would wait for each other.
    """

    def quietly(task: Task) -> None:
        with np.errstate(all="ignore"):
            work(task)

    if len(tasks) <= most_inline or cores() == 1:
        for task in tasks:
            quietly(task)
        return
    from concurrent.futures import ThreadPoolExecutor

    with single_threaded_blas(), ThreadPoolExecutor(min(cores(), len(tasks))) as pool:
        for _ in pool.map(quietly, tasks):
            pass


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_controller: Any = None


def single_threaded_blas() -> Any:
    """A context in which BLAS uses one thread, if threadpoolctl is there to ask for it."""
    global _controller
    if _controller is None:
        try:
            from threadpoolctl import ThreadpoolController
        except ImportError:
            from contextlib import nullcontext

            return nullcontext()
        _controller = ThreadpoolController()
    return _controller.limit(limits=1, user_api="blas")
