"""NumPy arrays on a GPU backend that was named: copied to the device and back, in this one place.

`backend="auto"` never moves an array. A GPU backend named for NumPy arrays gets copies of them, and its results come
back as NumPy arrays, so that a first try or a comparison needs no other framework. It costs two copies a call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, TypeVar

import numpy as np

from llsa_np.adapters.numpy_arrays import adapter, dtype_name
from llsa_np.backends import BackendName, backends
from llsa_np.checks import FLOATS
from llsa_np.selection import Selection

Function = TypeVar("Function", bound=Callable[..., Any])

ARRAYS = ("x", "q", "k", "v", "dout", "out", "lse", "selection", "dlse")
"""The arguments that lie on a device or on the host; the others are options."""

ON_A_DEVICE: tuple[BackendName, ...] = ("numba_cuda", "cupy_raw")
"""Backends that serve Numba's device arrays, as which the copies go in."""


def copied_to_the_device(function: Function) -> Function:
    """The function, with its NumPy arrays copied to the device and its results back if it is called with such arrays
    alone and a GPU backend's name. Whatever else it is called with it judges itself."""

    names = [name for name in signature(function).parameters if name in ARRAYS]

    @wraps(function)
    def call(*arrays: Any, **options: Any) -> Any:
        if arrays and not isinstance(arrays[0], np.ndarray):  # nothing to copy, or a mixture, which it judges itself
            return function(*arrays, **options)
        backend = options.get("backend", "auto")
        if not isinstance(backend, str) or backend not in ON_A_DEVICE or backends()[backend]:
            return function(*arrays, **options)
        given = dict(zip(names, arrays)) | {name: options[name] for name in ARRAYS if options.get(name) is not None}
        if not all(map(is_host, given.values())):
            return function(*arrays, **options)
        copies = {name: to_device(value) for name, value in given.items() if name in options}
        return to_host(function(*map(to_device, arrays), **options | copies))

    return call  # type: ignore[return-value]


def is_host(value: Any) -> bool:
    """Whether this is a NumPy array of floats, or a Selection of NumPy arrays."""
    if isinstance(value, Selection):
        return isinstance(value[1], np.ndarray)
    return isinstance(value, np.ndarray) and adapter.owns(value) and dtype_name(value.dtype) in FLOATS


def to_device(value: Any) -> Any:
    """A copy on the device of a NumPy array, or of a Selection's; anything else as it is."""
    from llsa_np.adapters.numba_arrays import memory_error
    from llsa_np.gpu.numba_cuda import cuda

    if isinstance(value, Selection):
        return value._with_arrays(map(to_device, value))
    if not isinstance(value, np.ndarray):
        return value
    with memory_error(value.nbytes):
        return cuda.to_device(value)


def to_host(value: Any) -> Any:
    """A result with every device array in it copied to the host."""
    from llsa_np.gpu.numba_cuda import cuda

    if value is None:
        return None
    if isinstance(value, tuple):
        return tuple(map(to_host, value))
    if isinstance(value, Selection):
        return value._with_arrays(map(to_host, value))
    return cuda.to_host(value)
