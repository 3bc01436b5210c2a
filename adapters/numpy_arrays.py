"""NumPy: arrays are their own views, and new ones come from numpy.empty."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.ma import MaskedArray
from numpy.typing import NDArray

from llsa_np.adapters import View


@cache
def dtype_name(dtype: np.dtype[Any]) -> str:
    """The name of an element type; NumPy makes it anew every time, in 5 microseconds."""
    return dtype.name


class NumpyAdapter:
    """Arrays of type numpy.ndarray, in any memory order."""

    name = "NumPy"

    def owns(self, array: Any) -> bool:
        # A masked array's mask would be skipped in silence.
        return isinstance(array, np.ndarray) and not isinstance(array, MaskedArray)

    def view(self, array: NDArray[Any], layout: str = "bhnd") -> View:
        data = array.swapaxes(1, 2) if layout == "bnhd" and array.ndim == 4 else array
        return View(array.shape, dtype_name(array.dtype), "cpu", data)

    def empty(self, shape: tuple[int, ...], dtype: Any, like: View, layout: str = "bhnd") -> tuple[NDArray[Any], View]:
        if layout == "bnhd":
            shape = (shape[0], shape[2], shape[1], *shape[3:])
        array = self.maker(shape, like.array.dtype if dtype is None else np.dtype(dtype), like)()
        return array, self.view(array, layout)

    def maker(self, shape: tuple[int, ...], dtype: np.dtype[Any], like: View) -> Callable[[], NDArray[Any]]:
        return partial(np.empty, shape, dtype)

    def key(self, array: NDArray[Any]) -> tuple[Any, ...] | None:
        if not isinstance(array, np.ndarray) or isinstance(array, MaskedArray):
            return None
        return array.dtype, array.shape  # to the reference, strides and alignment are all the same

    def pointer(self, array: NDArray[Any]) -> int:
        address: int = array.__array_interface__["data"][0]
        return address

    def stream(self, like: View) -> int:
        return 0

    def namespace(self, array: NDArray[Any]) -> Any:
        return np

    def to_numpy(self, array: NDArray[Any]) -> NDArray[Any]:
        return array


adapter = NumpyAdapter()
