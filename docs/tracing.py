"""Who reads and writes what: every access of every kernel that runs in Numba's simulator, recorded as it happens.

Used by the pages three_times.md and without_a_gpu.md. Global and shared arrays are watched; a thread's own (local) ones
are not.
"""

import inspect
import itertools
import linecache
import re
import sys
import threading
from collections import defaultdict
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from numba.cuda.simulator import kernel, kernelapi


class Access(NamedTuple):
    block: int
    thread: int
    epoch: int  # how many barriers the thread had passed
    line: int
    array: str
    index: tuple
    writes: bool
    shared: bool  # shared memory of the block, or else global memory


class Launch:
    """One launch of a kernel: its grid, its block, and the accesses of its threads."""

    def __init__(self, function, grid, block):
        self.function, self.name, self.grid, self.block = function, function.__name__, grid[0], block[0]
        self.accesses = []
        lines, self.first_line = inspect.getsourcelines(function)
        self.lines = dict(enumerate(lines, self.first_line))

    def __str__(self):
        return f"{self.name}: grid of {self.grid} block{'s' * (self.grid > 1)}, {self.block} threads each"

    def line_with(self, text):
        """The number of the first line of the kernel that contains a text."""
        found = [number for number, line in self.lines.items() if text in line]
        assert found, f"{self.name} has no line with {text!r}"
        return found[0]

    def of(self, array=None, writes=None, block=None, thread=None):
        """The accesses to one array, by one block, by one thread, or that write."""
        return [
            a
            for a in self.accesses
            if (array is None or a.array == array)
            and (writes is None or a.writes == writes)
            and (block is None or a.block == block)
            and (thread is None or a.thread == thread)
        ]

    def table(self, steps, blocks=(0,), threads=None):
        """Prints what threads read and write in each step. steps: names, each with a text in the step's first line; a
        name that begins with "-" ends the step before it and is not printed."""
        starts = [(self.line_with(text), name) for name, text in steps.items()]
        assert starts == sorted(starts), "steps stand in the kernel's order"
        told = defaultdict(lambda: defaultdict(list))
        for a in self.accesses:
            begun = [i for i, (line, _) in enumerate(starts) if line <= a.line]
            if not begun or starts[begun[-1]][1].startswith("-"):
                continue
            if a.block in blocks and (threads is None or a.thread in threads):
                told[begun[-1], a.block, a.thread][a.writes, a.array].append(a.index)
        rows = [("step", "block", "thread", "reads", "writes")]
        for key in sorted(told):
            i_step, block, thread = key
            texts = [
                ", ".join(
                    dict.fromkeys(t for (w, array), at in told[key].items() if w == writes for t in short(array, at))
                )
                for writes in (False, True)
            ]
            rows.append((starts[i_step][1], str(block), str(thread), *texts))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        before = None
        print(self)
        for row in rows:
            name = "" if row[0] == before else row[0]
            cells = [cell.ljust(width) for cell, width in zip((name, *row[1:4]), widths)]
            print("  ".join((*cells, row[4])).rstrip())
            before = row[0]

    def races(self, barriers=True):
        """Pairs of accesses of two threads of a block to one place of shared memory, at least one of them a write, with
        no barrier between; barriers=False: as if there were no barriers at all."""
        places = defaultdict(list)
        for a in self.accesses:
            if a.shared:
                places[a.block, a.epoch if barriers else 0, a.array, a.index].append(a)
        return [
            (a, b)
            for at_once in places.values()
            if len({a.thread for a in at_once}) > 1 and any(a.writes for a in at_once)
            for a, b in itertools.combinations(at_once, 2)
            if a.thread != b.thread and (a.writes or b.writes)
        ]


def short(array, indices):
    """'x[0, 2..3]' for accesses to x[0, 2] and x[0, 3]: one text if they are a grid, else one per number of an axis."""
    unique = sorted(set(indices))
    axes = [sorted(set(axis)) for axis in zip(*unique)]
    if len(unique) == np.prod([len(axis) for axis in axes]):
        return [f"{array}[{', '.join(map(span, axes))}]"]
    axis = next(i for i, numbers in enumerate(axes) if len(numbers) > 1)
    return [text for n in axes[axis] for text in short(array, [at for at in unique if at[axis] == n])]


def span(numbers):
    """'3', '0..3' or '0..1/4..5'."""
    runs = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return "/".join(f"{first}..{last}" if last > first else f"{first}" for first, last in runs)


class Watched:
    """An array, or a row of one, that writes down who reads and writes what. It stands in for the kernel's own."""

    def __init__(self, of, name, data, shared, before=()):
        self.of, self.name, self.data, self.shared, self.before = of, name, data, shared, before
        self.shape = data.shape

    def note(self, index, writes):
        thread = threading.current_thread()
        frame = sys._getframe(2)
        while frame.f_code is not self.of.function.__code__:
            frame = frame.f_back
        place = tuple(map(int, (*self.before, *index)))
        self.of.accesses.append(
            Access(
                thread.blockIdx.x,
                thread.threadIdx.x,
                getattr(thread, "passed", 0),
                frame.f_lineno,
                self.name,
                place,
                writes,
                self.shared,
            )
        )

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        if len(index) < self.data.ndim:
            return Watched(self.of, self.name, self.data[index], self.shared, (*self.before, *index))
        self.note(index, False)
        return self.data[index]

    def __setitem__(self, index, value):
        index = index if isinstance(index, tuple) else (index,)
        self.note(index, True)
        self.data[index] = value


@contextmanager
def traced():
    """`with traced() as launches:` makes a list of all that is launched inside."""
    launches = []
    plain_call, plain_barrier, plain_shared = (
        kernel.FakeCUDAKernel.__call__,
        kernel.BlockThread.syncthreads,
        kernelapi.FakeCUDAShared.array,
    )

    def call(self, *arguments):
        launch = Launch(self.fn, self.grid_dim, self.block_dim)
        launches.append(launch)
        watched = []
        for name, x in zip(inspect.signature(self.fn).parameters, arguments):
            data = x if isinstance(x, np.ndarray) else getattr(x, "_ary", None)
            watched.append(x if data is None else Watched(launch, name, data, shared=False))
        return plain_call(self, *watched)

    def barrier(self):
        plain_barrier(self)
        self.passed = getattr(self, "passed", 0) + 1

    def shared_array(self, shape, dtype):
        frame = sys._getframe(1)
        key = frame.f_code, frame.f_lineno
        if key not in self._allocations:
            name = re.match(r"\s*(\w+) =", linecache.getline(frame.f_code.co_filename, frame.f_lineno)).group(1)
            dtype = kernelapi.numpy_support.as_dtype(dtype) if isinstance(dtype, kernelapi.types.Type) else dtype
            self._allocations[key] = Watched(launches[-1], name, np.empty(shape, dtype), shared=True)
        return self._allocations[key]

    kernel.FakeCUDAKernel.__call__ = call
    kernel.BlockThread.syncthreads = barrier
    kernelapi.FakeCUDAShared.array = shared_array
    try:
        yield launches
    finally:
        kernel.FakeCUDAKernel.__call__ = plain_call
        kernel.BlockThread.syncthreads = plain_barrier
        kernelapi.FakeCUDAShared.array = plain_shared
