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
from llsa_np.plans import plan_for

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


TENSORS = "as_subclass"
"""A method of PyTorch's tensors that no other framework's arrays have."""


def wrapped_by_frameworks(function: Function) -> Function:
    """The function, whose calls with arrays of a framework that differentiates go through that framework's wrapper,
    those with NumPy arrays for a GPU through copies, and those with arrays of a framework that nothing here names
    through DLPack; `.plain` is the function without."""

    name, copied = function.__name__, copied_to_the_device(through_dlpack(function))

    # torch.compile reads through this for tensors. So before them nothing looks into `sys.modules`, which other threads
    # write, and nothing is imported by name.
    @wraps(function)
    def call(*arrays: Any, **options: Any) -> Any:
        if len(arrays) > 0 and type(arrays[0]) is np.ndarray:
            plan = plan_for(function, arrays, options)
            if plan is not None:
                return plan.run(arrays, name)
            if "backend" not in options:
                return function(*arrays, **options)  # what is mixed it judges itself
        for x in (*arrays, *options.values()):
            if hasattr(type(x), TENSORS):
                framework = _pytorch()
                if isinstance(x, framework.torch.Tensor):
                    return getattr(framework, name)(*arrays, **options)
        kind = getattr(sys.modules.get("jax"), "Array", ())  # half imported, it has none
        if any(isinstance(x, kind) for x in (*arrays, *options.values())):
            return getattr(_jax(), name)(*arrays, **options)
        return copied(*arrays, **options)

    call.plain = function  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]
