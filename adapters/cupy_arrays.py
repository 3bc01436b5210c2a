"""CuPy: arrays on any device, new ones beside them from CuPy's memory pool, work on CuPy's current stream."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import cupy
import numpy as np
from cupy import ndarray
from numpy.typing import NDArray

from llsa_np.adapters import PIECE, View
from llsa_np.adapters.numpy_arrays import dtype_name


@cache
def device_named(name: str) -> Any:
    """The device called e.g. "cuda:1", as a context."""
    return cupy.cuda.Device(int(name.partition(":")[2]))


class CupyAdapter:
    """Arrays of type cupy.ndarray, in any memory order."""

    name = "CuPy"

    def owns(self, array: Any) -> bool:
        return isinstance(array, ndarray)

    def view(self, array: Any, layout: str = "bhnd") -> View:
        data = array.swapaxes(1, 2) if layout == "bnhd" and array.ndim == 4 else array
        return View(array.shape, dtype_name(array.dtype), f"cuda:{array.device.id}", data)

    def empty(self, shape: tuple[int, ...], dtype: Any, like: View, layout: str = "bhnd") -> tuple[Any, View]:
        if layout == "bnhd":
            shape = (shape[0], shape[2], shape[1], *shape[3:])
        array = self.maker(shape, like.array.dtype if dtype is None else np.dtype(dtype), like)()
        data = array.swapaxes(1, 2) if layout == "bnhd" and array.ndim == 4 else array
        return array, View(shape, dtype or like.dtype, like.device, data)

    def maker(self, shape: tuple[int, ...], dtype: np.dtype[Any], like: View) -> Callable[[], Any]:
        device = device_named(like.device)

        def make() -> Any:
            with device:
                return ndarray(shape, dtype)

        return make

    def key(self, array: Any) -> tuple[Any, ...] | None:
        data = array.data
        return data.device_id, array.dtype, array.shape, array.strides, data.ptr % PIECE

    def pointer(self, array: Any) -> int:
        address: int = array.data.ptr
        return address

    def stream(self, like: View) -> int:
        with device_named(like.device):
            address: int = cupy.cuda.get_current_stream().ptr
        return address

    def namespace(self, array: Any) -> Any:
        return cupy

    def to_numpy(self, array: Any) -> NDArray[Any]:
        host: NDArray[Any] = np.asarray(cupy.asnumpy(array))
        return host


adapter = CupyAdapter()
