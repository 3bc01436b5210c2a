"""Any other framework whose arrays go through DLPack: read where they lie, and results given back in its own type.

For a call such arrays become NumPy's on the host and CuPy's on a GPU, without a copy; results return by `from_dlpack`,
of the array's namespace or else of its type's top module. DLPack carries numbers, not what a framework remembers of
them, so no gradient flows: call `attend_backward`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial, wraps
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

HOST, CUDA = (1, 3, 11), (2, 13)
"""DLPack's numbers for memory that the host reads, and that NVIDIA's GPUs do."""
ON_ONE_GPU = 2
"""CUDA's number for memory that is one device's own."""
OTHER_DEVICES = {4: "OpenCL", 7: "Vulkan", 8: "Metal", 10: "ROCm", 14: "oneAPI", 15: "WebGPU", 16: "Hexagon"}


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

    def lend(self, array: Any, what: str = "llsa_np: an array") -> Any:
        """The array as NumPy's or CuPy's, in the same memory. what: its name in errors."""
        kind, number = place_of(array, what)
        if kind in CUDA:
            return self.lend_on_gpu(array, number, what)
        if kind not in HOST:
            raise ValueError(
                f"{what} of {self.name} is on a device of {OTHER_DEVICES.get(kind, f'kind {kind}')}, which no backend "
                "serves; there are backends for the host and for NVIDIA's GPUs. Copy it to the host first"
            )
        try:
            return np.from_dlpack(array)
        except (RuntimeError, BufferError, TypeError, ValueError) as error:
            dtype = str(getattr(array, "dtype", "dtype unknown"))
            way_out = "Copy it first, e.g. with numpy.asarray"
            if "bfloat16" in dtype:
                way_out = "NumPy reads no bfloat16 through DLPack; convert it to float32 or float16"
            raise TypeError(
                f"{what} of {self.name} ({dtype}) does not go through DLPack to NumPy: {error}. {way_out}"
            ) from error

    def lend_on_gpu(self, array: Any, number: int, what: str) -> Any:
        """The array as CuPy's, whose current stream on that device waits for what the framework does to it."""
        where = f"{what} of {self.name} is on cuda:{number}"
        try:
            import cupy
        except ImportError as error:
            raise ValueError(
                f"{where}; such arrays are read by CuPy, which is not installed {EXTRA}: {error}. Or copy it to the "
                "host"
            ) from error
        cuda = cupy.cuda
        try:
            there = cuda.runtime.getDeviceCount()
        except cuda.runtime.CUDARuntimeError as error:
            raise ValueError(
                f"{where}, and CuPy, which reads such arrays, finds none: {error}. Copy it to the host"
            ) from error
        if not 0 <= number < there:
            raise ValueError(
                f"{where}, as {self.name} says, and to CuPy there "
                f"{'is 1 device' if there == 1 else f'are {there} devices'}. Set CUDA_VISIBLE_DEVICES before both are "
                "imported"
            )
        try:
            lent = cupy.from_dlpack(array)
        except (BufferError, TypeError, ValueError) as error:  # CUDA's own errors are RuntimeErrors
            raise TypeError(
                f"{what} of {self.name} ({getattr(array, 'dtype', 'dtype unknown')}) does not go through DLPack to "
                f"CuPy: {error}. Copy it to the host first"
            ) from error
        of = cuda.runtime.pointerGetAttributes(lent.data.ptr) if lent.size else None
        if of is not None and of.type == ON_ONE_GPU and of.device != number:
            raise ValueError(
                f"{where}, as {self.name} says, and its memory on cuda:{of.device}, "
                "as CUDA does. Set CUDA_VISIBLE_DEVICES before both are imported"
            )
        return lent

    def way_back(self, like: Any, what: str) -> Callable[[Any], Any]:
        """The function by which results become the framework's arrays: its namespace's, or its top module's."""
        namespaces = [sys.modules.get(self.name)]
        if hasattr(like, "__array_namespace__"):
            namespaces.insert(0, like.__array_namespace__())
        for from_dlpack in (getattr(namespace, "from_dlpack", None) for namespace in namespaces):
            if from_dlpack is not None:
                return partial(self.give_back, from_dlpack, what)
        raise TypeError(
            f"{what} of {self.name}, which has no from_dlpack, by which results would come back. Convert all arrays "
            "first, e.g. with numpy.asarray"
        )

    def give_back(self, from_dlpack: Callable[[Any], Any], what: str, result: Any) -> Any:
        """A result of NumPy's or CuPy's as an array of the framework, in the same element type."""
        array = from_dlpack(result)
        dtype = str(getattr(array, "dtype", result.dtype.name))
        if result.dtype.name not in dtype:
            raise TypeError(
                f"{what} of {self.name}, whose from_dlpack makes {dtype} of a result's {result.dtype.name}; convert "
                "all arrays to a type that it keeps, such as float32"
            )
        return array


def place_of(array: Any, what: str) -> tuple[int, int]:
    """DLPack's numbers of the kind of device that an array is on, and of the device."""
    place = array.__dlpack_device__()
    try:
        kind, number = place
        return int(getattr(kind, "value", kind)), int(number or 0)  # some have an Enum, and no number on the host
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{what} of {type(array).__module__} has __dlpack_device__ {place!r}; DLPack's are two integers, a kind of "
            "device and which one"
        ) from error


def seen(lent: Any, layout: str = "bhnd") -> View:
    """The view of an array of NumPy's or CuPy's."""
    view: View = adapter_of_type(type(lent)).view(lent, layout)  # type: ignore[union-attr]
    return view


@cache
def adapter_of_package(package: str) -> DLPackAdapter:
    """The adapter of a framework, by its top module."""
    return DLPackAdapter(package)


def parts_of(name: str, value: Any) -> dict[str, Any]:
    """The arrays in an argument, by name: itself, a Selection's, those of a pair of `merge`; none in something else."""
    several = {} if name.startswith("pair ") else {name: value}
    if isinstance(value, Selection):
        several = {f"level {i} of {name}": x for i, x in enumerate(value, 1)}
    elif is_pair(name, value):
        several = {f"{part} of {name}": x for part, x in zip(("out", "lse"), value)}
    return {part: x for part, x in several.items() if adapter_of_type(type(x)) is not None}


def is_pair(name: str, value: Any) -> bool:
    """Whether this is a pair (out, lse) of `merge`."""
    return name.startswith("pair ") and isinstance(value, (tuple, list)) and len(value) == 2


def changed(value: Any, change: Callable[[Any], Any]) -> Any:
    """A result with other arrays in it."""
    if isinstance(value, Selection):
        return value._with_arrays(change(x) for x in value)
    if isinstance(value, tuple):
        return tuple(changed(x, change) for x in value)
    return None if value is None else change(value)


def through_dlpack(function: Function, gives_arrays: bool = True) -> Function:
    """The function, which takes such arrays too, and gives their kind back if it gives arrays that are not on the host
    for all. Arguments that are no arrays, too many, or of several frameworks are left to its own checks."""
    who, names = function.__name__, list(signature(function).parameters)

    @wraps(function)
    def call(*arrays: Any, **options: Any) -> Any:
        known = adapter_of_type(type(arrays[0])) if arrays else None
        if known is not None and not isinstance(known, DLPackAdapter):
            return function(*arrays, **options)
        positional = names if names[0] in ARRAYS else [f"pair {i}" for i in range(len(arrays))]  # of `merge`
        by_name = {name: options[name] for name in ARRAYS if name in options}
        named = dict(zip(positional, arrays)) | by_name
        flat = {part: x for name, value in named.items() for part, x in parts_of(name, value).items()}
        if not flat or not isinstance(adapter_of_type(type(next(iter(flat.values())))), DLPackAdapter):
            return function(*arrays, **options)
        adapter: Any = common_adapter(who, flat)
        first = next(iter(flat))
        lent = {id(x): adapter.lend(x, f"{who}: {name}, an array") for name, x in flat.items()}
        check_devices(who, {name: seen(lent[id(x)]) for name, x in flat.items()})
        way_back = adapter.way_back(flat[first], f"{who}: {first} is an array") if gives_arrays else None

        def as_lent(name: str, value: Any) -> Any:
            if isinstance(value, Selection):
                return value._with_arrays(lent.get(id(x), x) for x in value)
            return tuple(lent.get(id(x), x) for x in value) if is_pair(name, value) else lent.get(id(value), value)

        given = [as_lent(name, x) for name, x in zip(positional, arrays)] + list(arrays[len(positional) :])
        result = function(*given, **options | {name: as_lent(name, x) for name, x in by_name.items()})
        return result if way_back is None else changed(result, way_back)

    return call  # type: ignore[return-value]
