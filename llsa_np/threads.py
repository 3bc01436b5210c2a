"""Running the NumPy reference's independent pieces on every core."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVar

import numpy as np

Task = TypeVar("Task")


def run(work: Callable[[Task], None], tasks: Sequence[Task], numbers: int) -> None:
    """Call work(task) for every task, on as many threads as there are cores.

    numbers: how many the work is about, in all; where they are few, everything stays on the calling thread.

    NaN, infinity and overflow in the data are results here, not warnings. BLAS is held to one thread meanwhile if
    threadpoolctl is installed: its own threads would wait for each other.
    """

    def quietly(task: Task) -> None:
        with np.errstate(all="ignore"):
            work(task)

    if len(tasks) <= 1 or cores() == 1 or numbers < FEW_NUMBERS:
        for task in tasks:
            quietly(task)
        return
    from concurrent.futures import ThreadPoolExecutor

    with single_threaded_blas(), ThreadPoolExecutor(min(cores(), len(tasks))) as pool:
        for _ in pool.map(quietly, tasks):
            pass


FEW_NUMBERS = 2**19
"""With fewer, most of the work is Python's, at which threads take turns: one was faster, on 2 cores up to twice, on 16
up to four times."""

MOST_THREADS = 16
"""So many threads, each with its piece of work, stay within the memory that is promised (256 MiB)."""


def cores() -> int:
    """How many threads to use: as many as the process may use cores, up to MOST_THREADS."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, MOST_THREADS)


_lock = threading.Lock()
_callers = 0
_controller: Any = None
_limit: Any = None


@cache
def _has_threadpoolctl() -> bool:
    return find_spec("threadpoolctl") is not None


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """A context in which BLAS uses one thread, if threadpoolctl is there to ask for it.

    The number is the process's, so of several callers at once the first sets it and the last puts it back.
    """
    global _callers, _controller, _limit
    if not _has_threadpoolctl():
        yield
        return
    from threadpoolctl import ThreadpoolController

    with _lock:
        if _callers == 0:
            _controller = _controller or ThreadpoolController()
            _limit = _controller.limit(limits=1, user_api="blas")
        _callers += 1
    try:
        yield
    finally:
        with _lock:
            _callers -= 1
            if _callers == 0:
                _limit.restore_original_limits()
