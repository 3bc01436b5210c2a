"""Numba: device arrays of numba.cuda, and those that its simulator puts in their place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llsa_np.adapters import PIECE, View
from llsa_np.adapters.numpy_arrays import dtype_name
from llsa_np.gpu.numba_cuda.cuda import SIMULATED, cuda, device_index, on_device, swap_axes, to_host

OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY


def empty(shape: tuple[int, ...], dtype: Any) -> Any:
    """A new array on the current device, uninitialised."""
    with memory_error(math.prod(shape) * dtype.itemsize):
        return cuda.device_array(shape, dtype)


@contextmanager
def memory_error(size: int) -> Iterator[None]:
    """Numba's error for want of memory as Python's, with the number of bytes, which Numba does not tell."""
    try:
        yield
    except cuda.cudadrv.driver.CudaAPIError as error:
        if error.code != OUT_OF_MEMORY:
            raise
        raise MemoryError(f"the GPU has no memory left for {size:,} bytes") from error


class NumbaAdapter:
    """Arrays as numba.cuda.to_device and numba.cuda.device_array return them, on the default stream."""

    name = "Numba"

    def owns(self, array: Any) -> bool:
        # In another byte order its numbers are not what a kernel reads.
        return bool(getattr(array, "__cuda_ndarray__", False)) and array.dtype.isnative

    def view(self, array: Any, layout: str = "bhnd") -> View:
        data = swap_axes(array) if layout == "bnhd" and array.ndim == 4 else array
        return View(tuple(array.shape), dtype_name(array.dtype), f"cuda:{device_index(array)}", data)

    def empty(self, shape: tuple[int, ...], dtype: Any, like: View, layout: str = "bhnd") -> tuple[Any, View]:
        if layout == "bnhd":
            shape = (shape[0], shape[2], shape[1], *shape[3:])
        array = self.maker(shape, like.array.dtype if dtype is None else np.dtype(dtype), like)()
        return array, self.view(array, layout)

    def maker(self, shape: tuple[int, ...], dtype: np.dtype[Any], like: View) -> Callable[[], Any]:
        device = like.device

        def make() -> Any:
            with on_device(device):
                return empty(shape, dtype)

        return make

    def key(self, array: Any) -> tuple[Any, ...] | None:
        if not self.owns(array) or SIMULATED:  # the simulator's arrays are nowhere
            return None
        return device_index(array), array.dtype, array.shape, array.strides, self.pointer(array) % PIECE

    def pointer(self, array: Any) -> int:
        return array.__cuda_array_interface__["data"][0] or 0  # one without elements may have no memory

    def stream(self, like: View) -> int:
        return 0

    def namespace(self, array: Any) -> Any:
        return None

    def to_numpy(self, array: Any) -> NDArray[Any]:
        host: NDArray[Any] = to_host(array)
        return host


adapter = NumbaAdapter()
