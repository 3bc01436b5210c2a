"""Frameworks that differentiate: which of them wraps a call, so that it becomes one of its own operations."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import numpy as np

from llsa_np.adapters import half_installed
from llsa_np.adapters.dlpack_arrays import through_dlpack
from llsa_np.copies import copied_to_the_device

Function = TypeVar("Function", bound=Callable[..., Any])


def _pytorch() -> Any:
    try:
        from llsa_np.adapters import pytorch
    except (ImportError, AttributeError) as error:
        raise half_installed("torch", error) from error
    return pytorch


def _jax() -> Any:
    try:
        from llsa_np.adapters import jax_arrays
    except (ImportError, AttributeError) as error:
        raise half_installed("jax", error) from error
    return jax_arrays


WRAPPERS = {"torch": ("Tensor", _pytorch), "jax": ("Array", _jax)}
"""Top module of a framework -> its type of arrays, and the module whose functions, of the same names as the public
ones, take calls with such arrays."""


def wrapped_by_frameworks(function: Function) -> Function:
    """The function, whose calls with arrays of a framework that differentiates go through that framework's wrapper,
    those with NumPy arrays for a GPU through copies, and those with arrays of a framework that nothing here names
    through DLPack; `.plain` is the function without."""

    name, copied = function.__name__, copied_to_the_device(through_dlpack(function))

    # A compiler may read through this: no import by name, no table of imported modules.
    @wraps(function)
    def call(*arrays: Any, **options: Any) -> Any:
        if len(arrays) > 0 and type(arrays[0]) is np.ndarray and "backend" not in options:
            return function(*arrays, **options)  # what is mixed it judges itself; 5 us less of a slow host
        for package, (kind, wrapper) in WRAPPERS.items():
            framework = sys.modules.get(package)
            if framework is not None:
                arrays_type = getattr(framework, kind, ())  # half imported, it has none
                # The first alone, of which most calls have enough: 1.3 us less of the host
                first = len(arrays) > 0 and isinstance(arrays[0], arrays_type)
                if first or any(isinstance(x, arrays_type) for x in (*arrays, *options.values())):
                    return getattr(wrapper(), name)(*arrays, **options)
        return copied(*arrays, **options)

    call.plain = function  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]
