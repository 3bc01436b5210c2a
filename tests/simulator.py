"""Numba's CUDA simulator, made quicker and stricter for the suite.

Quicker: its threads take turns, one running at a time until it comes to a barrier or ends, instead of all at once under
a manager that polls them. Stricter, as a GPU is: in every block all threads come to the same barriers, in the same
lines, and no index is negative. (NumPy counts a negative index from the end, Numba's simulator lets threads that have
returned miss a barrier.)
"""

import sys
import threading

import numpy as np
from numba.cuda.simulator import kernel, kernelapi
from numba.cuda.simulator.cudadrv import devicearray


class DivergentBarrierError(AssertionError):
    """Threads of one block are at different barriers, or some have ended while others wait."""


class Turn(kernel.BlockThread):
    """A thread of a block: runs when it is given the turn and hands it back at a barrier and at its end."""

    def __init__(self, *args):
        super().__init__(*args)
        self.mine, self.back = threading.Lock(), threading.Lock()
        self.mine.acquire()
        self.back.acquire()
        self.line = None
        self.ended = False

    def run(self):
        self.mine.acquire()
        try:
            if not self.abort:
                super().run()
        finally:
            self.ended = True
            self.back.release()

    def syncthreads(self):
        frame = sys._getframe(1)
        while "simulator" in frame.f_code.co_filename:
            frame = frame.f_back
        self.line = frame.f_lineno
        self.back.release()
        self.mine.acquire()
        if self.abort:
            raise RuntimeError("another thread of the block failed")

    def go_on(self):
        """Run until the next barrier or the end."""
        self.mine.release()
        self.back.acquire()


def run_block(self, grid_point, *args):
    """In place of BlockManager.run."""
    threads = [
        Turn(lambda: self._f(*args), self, grid_point, point, self._debug) for point in np.ndindex(*self._block_dim)
    ]
    for thread in threads:
        thread.start()
    failure = None
    while failure is None and not threads[0].ended:
        for thread in threads:
            thread.go_on()
        failure = next((thread.exception for thread in threads if thread.exception), None)
        if failure is None and len({(thread.ended, thread.ended or thread.line) for thread in threads}) > 1:
            where = [f"thread {t.thread_id} " + ("has ended" if t.ended else f"is at line {t.line}") for t in threads]
            failure = DivergentBarrierError(f"{self._f.__name__}: {', '.join(where)}"), None
    for thread in threads:
        while not thread.ended:
            thread.abort = True
            thread.go_on()
        thread.join()
    if failure:
        raise failure[0].with_traceback(failure[1])


def shared_array(self, shape, dtype, alignment=None):
    """In place of FakeCUDAShared.array, which reads the source file to tell one array from another."""
    frame = sys._getframe(1)
    key = frame.f_code, frame.f_lineno
    if key not in self._allocations:
        self._allocations[key] = new_array(shape, dtype)
    return self._allocations[key]


def local_array(self, shape, dtype, alignment=None):
    return new_array(shape, dtype)


def new_array(shape, dtype):
    """Full of NaN or of nonsense, as uninitialised memory may be."""
    dtype = kernelapi.numpy_support.as_dtype(dtype) if isinstance(dtype, kernelapi.types.Type) else np.dtype(dtype)
    array = np.full(shape, np.nan if dtype.kind == "f" else 2**30, dtype)
    return array.view(Guarded) if guarding else array


guarding = True
"""Whether shared and local arrays are guarded too."""


def no_negative_index(index):
    for i in index if isinstance(index, tuple) else (index,):
        if not isinstance(i, slice) and i < 0:
            raise IndexError(f"negative index {index}")


class Guarded(np.ndarray):
    """An array that takes no negative index."""

    def __getitem__(self, index):
        no_negative_index(index)
        return super().__getitem__(index)

    def __setitem__(self, index, value):
        no_negative_index(index)
        super().__setitem__(index, value)


def get_item(self, index):
    no_negative_index(index)
    item = self._item._ary[index]
    return type(self)(devicearray.FakeCUDAArray(item)) if type(item) is np.ndarray else item


def set_item(self, index, value):
    no_negative_index(index)
    self._item._ary[index] = value


def install():
    """Put all this into Numba's simulator, in this process."""
    kernel.BlockManager.run = run_block
    kernelapi.FakeCUDAShared.array = shared_array
    kernelapi.FakeCUDALocal.array = local_array
    devicearray.FakeWithinKernelCUDAArray.__getitem__ = get_item
    devicearray.FakeWithinKernelCUDAArray.__setitem__ = set_item
