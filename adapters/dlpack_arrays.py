"""Any other framework whose arrays go through DLPack: read where they lie, and results given back in its own type.

For a call such arrays become NumPy's on the host and CuPy's on a GPU, without a copy; results return by `from_dlpack`,
of the array's namespace or else of its type's top module. DLPack carries numbers, not what a framework remembers of
them, so no gradient flows: call `attend_backward`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, wraps
from inspect import signature
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from llsa_np.adapters import View, adapter_of_type, common_adapter
from llsa_np.backends import EXTRA
from llsa_np.checks import check_devices
from llsa_np.copies import ARRAYS
from llsa_np.selection import Selection

Function = TypeVar("Function", bound=Callable[..., Any])

HOST, CUDA = (1, 3), (2, 13)
"""DLPack's numbers for memory that the host reads, and that NVIDIA's GPUs do."""
ON_ONE_GPU = 2
"""CUDA's number for memory that is one device's own."""
OTHERS = {4: "OpenCL", 7: "Vulkan", 8: "Metal", 10: "ROCm", 11: "ROCm", 14: "oneAPI", 15: "WebGPU", 16: "Hexagon"}


class DLPackAdapter:
    """Arrays of a framework that nothing here names."""

    def __init__(self, package: str) -> None:
        self.name = package

    def owns(self, array: Any) -> bool:
        return hasattr(array, "__dlpack_device__")

    def view(self, array: Any, layout: str = "bhnd") -> View:
        return seen(self.lend(array), layout)

    def empty(self, shape: tuple[int, ...], dtype: Any, like: View, layout: str = "bhnd") -> Any:
        raise NotImplementedError(f"new arrays of {self.name} come back from NumPy's or CuPy's")

    def maker(self, shape: tuple[int, ...], dtype: np.dtype[Any], like: View) -> Any:
        raise NotImplementedError(f"new arrays of {self.name} come back from NumPy's or CuPy's")

    def key(self, array: Any) -> None:
        return None

    def pointer(self, array: Any) -> int:
        return 0

    def stream(self, like: View) -> int:
        return 0

    def namespace(self, array: Any) -> Any:
        return None

    def to_numpy(self, array: Any) -> NDArray[Any]:
        lent = self.lend(array)
        host: NDArray[Any] = adapter_of_type(type(lent)).to_numpy(lent)  # type: ignore[union-attr]
        return host

    def lend(self, array: Any, what: str = "an array") -> Any:
        """The array as NumPy's or CuPy's, in the same memory. what: its name in errors."""
        kind, number = array.__dlpack_device__()
        if kind in CUDA:
            return self.lend_on_gpu(array, number, what)
        if kind not in HOST:
            raise ValueError(
                f"{what} of {self.name} is on a device of {OTHERS.get(int(kind), f'kind {int(kind)}')}, which no "
                "backend serves; there are backends for the host and for NVIDIA's GPUs. Copy it to the host first"
            )
        try:
            return np.from_dlpack(array)
        except (RuntimeError, BufferError, TypeError, ValueError) as error:
            raise TypeError(
                f"{what} of {self.name} ({getattr(array, 'dtype', 'dtype unknown')}) does not go through DLPack to "
                f"NumPy: {error}. On the host DLPack carries no bfloat16; convert it to float32 or float16"
            ) from error

    def lend_on_gpu(self, array: Any, number: int, what: str) -> Any:
        """The array as CuPy's, whose current stream on that device waits for what the framework does to it."""
        cupy = cupy_for(what, self.name)
        cuda = cupy.cuda
        there = cuda.runtime.getDeviceCount()
        if not 0 <= number < there:
            raise ValueError(
                f"{what} of {self.name} is on cuda:{number}, as {self.name} says, and to CuPy there "
                f"{'is 1 device' if there == 1 else f'are {there} devices'}. Set CUDA_VISIBLE_DEVICES before both are "
                "imported"
            )
        try:
            lent = cupy.from_dlpack(array)
        except (BufferError, TypeError, ValueError) as error:  # CUDA's own errors are RuntimeErrors
            raise TypeError(
                f"{what} of {self.name} ({getattr(array, 'dtype', 'dtype unknown')}) does not go through DLPack to "
                f"CuPy: {error}"
            ) from error
        of = cuda.runtime.pointerGetAttributes(lent.data.ptr) if lent.size else None
        if of is not None and of.type == ON_ONE_GPU and of.device != number:
            raise ValueError(
                f"{what} of {self.name} is on cuda:{number}, as {self.name} says, and its memory on cuda:{of.device}, "
                "as CUDA does. Set CUDA_VISIBLE_DEVICES before both are imported"
            )
        return lent

    def give_back(self, result: Any, like: Any) -> Any:
        """A result of NumPy's or CuPy's as an array of the framework."""
        has_namespace = hasattr(like, "__array_namespace__")
        namespace = like.__array_namespace__() if has_namespace else sys.modules[self.name]
        if not hasattr(namespace, "from_dlpack"):
            raise TypeError(f"{self.name} has no from_dlpack, by which results would come back as its arrays")
        return namespace.from_dlpack(result)


def seen(lent: Any, layout: str = "bhnd") -> View:
    """The view of an array of NumPy's or CuPy's."""
    view: View = adapter_of_type(type(lent)).view(lent, layout)  # type: ignore[union-attr]
    return view


@cache
def adapter_of_package(package: str) -> DLPackAdapter:
    """The adapter of a framework, by its top module."""
    return DLPackAdapter(package)


def cupy_for(what: str, name: str) -> Any:
    """CuPy, as which arrays on a GPU are read."""
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError(
            f"{what} of {name} is on a GPU; such arrays are read by CuPy, which is not installed {EXTRA}: {error}"
        ) from error
    return cupy


def arrays_in(value: Any) -> list[Any]:
    """The arrays in an argument: itself, a Selection's, a pair's of `merge`."""
    if isinstance(value, (Selection, tuple, list)):
        return [x for part in value for x in arrays_in(part)]
    return [] if value is None else [value]


def changed(value: Any, change: Callable[[Any], Any]) -> Any:
    """An argument or a result with other arrays in it."""
    if isinstance(value, Selection):
        return value._with_arrays(change(x) for x in value)
    if isinstance(value, (tuple, list)):
        return tuple(changed(x, change) for x in value)
    return None if value is None else change(value)


def through_dlpack(function: Function) -> Function:
    """The function, which takes such arrays too, and gives their kind back. What is mixed it judges itself."""
    who, names = function.__name__, list(signature(function).parameters)

    @wraps(function)
    def call(*arrays: Any, **options: Any) -> Any:
        known = adapter_of_type(type(arrays[0])) if arrays else None
        if known is not None and not isinstance(known, DLPackAdapter):
            return function(*arrays, **options)
        by_name = {name: options[name] for name in ARRAYS if name in options}
        first = next(iter(arrays_in((*arrays, *by_name.values()))), None)
        if not isinstance(adapter_of_type(type(first)), DLPackAdapter):
            return function(*arrays, **options)
        positional = names if names[0] in ARRAYS else [f"pair {i}" for i in range(len(arrays))]  # of `merge`
        named = dict(zip(positional, arrays))
        flat: dict[str, Any] = {}
        for name, value in (named | by_name).items():
            several = arrays_in(value)
            within = "level {i} of {name}" if isinstance(value, Selection) else "array {i} of {name}"
            of_value = within if isinstance(value, (Selection, tuple, list)) else "{name}"
            flat |= {of_value.format(i=i, name=name): x for i, x in enumerate(several, 1)}
        of: Any = common_adapter(who, flat)
        lent = {id(x): of.lend(x, f"{who}: {name}, an array") for name, x in flat.items()}
        check_devices(who, {name: seen(lent[id(x)]) for name, x in flat.items()})
        others = {name: changed(value, lambda x: lent[id(x)]) for name, value in by_name.items()}
        given = [changed(x, lambda x: lent.get(id(x), x)) for x in arrays]  # too many the function judges
        result = function(*given, **options | others)
        return changed(result, lambda x: of.give_back(x, first))

    return call  # type: ignore[return-value]
