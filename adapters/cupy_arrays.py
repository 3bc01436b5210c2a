"""CuPy: arrays on any device, new ones beside them from CuPy's memory pool, work on CuPy's current stream."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np
from numpy.typing import NDArray

from llsa_np.adapters import View
from llsa_np.adapters.numpy_arrays import dtype_name


class CupyAdapter:
    """Arrays of type cupy.ndarray, in any memory order."""

    name = "CuPy"

    def owns(self, array: Any) -> bool:
        return isinstance(array, cupy.ndarray)

    def view(self, array: Any, layout: str = "bhnd") -> View:
        data = array.swapaxes(1, 2) if layout == "bnhd" and array.ndim == 4 else array
        return View(array.shape, dtype_name(array.dtype), f"cuda:{array.device.id}", data)

    def empty(self, shape: tuple[int, ...], dtype: Any, like: View, layout: str = "bhnd") -> tuple[Any, View]:
        if layout == "bnhd":
            shape = (shape[0], shape[2], shape[1], *shape[3:])
        with like.array.device:
            array = cupy.empty(shape, like.array.dtype if dtype is None else dtype)
        data = array.swapaxes(1, 2) if layout == "bnhd" and array.ndim == 4 else array
        return array, View(shape, dtype or like.dtype, like.device, data)

    def stream(self, like: View) -> int:
        with like.array.device:
            pointer: int = cupy.cuda.get_current_stream().ptr
        return pointer

    def namespace(self, array: Any) -> Any:
        return cupy

    def to_numpy(self, array: Any) -> NDArray[Any]:
        host: NDArray[Any] = np.asarray(cupy.asnumpy(array))
        return host


adapter = CupyAdapter()
