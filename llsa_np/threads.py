"""Running the NumPy reference's independent pieces on every core."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
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


_lock = threading.Lock()
_callers = 0
_controller: Any = None
_limit: Any = None


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """A context in which BLAS uses one thread, if threadpoolctl is there to ask for it.

    The number is the process's, so of several callers at once the first sets it and the last puts it back.
    """
    global _callers, _controller, _limit
    if find_spec("threadpoolctl") is None:
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
