"""One thin file per array framework, and the search for the one that a call's arrays belong to.

An adapter says how to look at an array of its framework, how to make a new one, and which operations it has; nothing
here computes attention. Only frameworks that are already imported are asked, so `import llsa_np` loads none.
To add a framework, write an `Adapter` in a file of its own and name it in `ADAPTERS` under its top module's name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class View(NamedTuple):
    """What the checks and the backends know of a caller's array, without touching its contents."""

    shape: tuple[int, ...]
    """As the caller gave it, in the caller's layout."""
    dtype: str
    """Name of the element type: "float16", "bfloat16", "float32", "float64", "int32", ..."""
    device: str
    """Where it lies: "cpu", "cuda:0", ..."""
    array: Any
    """What a backend reads or writes; four axes stand in the order (batch, heads, tokens, dim)."""


class DeviceMemory:
    """What has `ptr`, `shape`, `strides` and `dtype` of memory on a GPU, as kernels' launchers read it."""

    __slots__ = ()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        of: Any = self
        return {
            "shape": of.shape,
            "strides": of.strides,
            "typestr": of.dtype.str,
            "data": (of.ptr, False),
            "version": 3,
        }


class Adapter(Protocol):
    """What llsa_np asks of an array framework."""

    name: str
    """The framework's name, as error messages say it."""

    def owns(self, array: Any) -> bool:
        """Whether this is an array of this framework that it can be trusted to read as plain numbers."""

    def view(self, array: Any, layout: str = "bhnd") -> View:
        """A view of the caller's array, not a copy, its axes in the order (batch, heads, tokens, dim)."""

    def empty(self, shape: tuple[int, ...], dtype: Any, like: View, layout: str = "bhnd") -> tuple[Any, View]:
        """A new array, uninitialised, beside `like`, with the axes of shape (batch, heads, tokens, dim) laid out in
        `layout`: the array for the caller and the view for the backend. dtype None means that of `like`."""

    def maker(self, shape: tuple[int, ...], dtype: np.dtype[Any], like: View) -> Callable[[], Any]:
        """A function that makes such an array, uninitialised, beside `like`, at every call."""

    def key(self, array: Any) -> tuple[Any, ...] | None:
        """All of an array that a call's plan depends on: its device, element type, shape, strides, where it begins
        modulo PIECE, and what makes it one that `owns` refuses; or None for such a one."""

    def pointer(self, array: Any) -> int:
        """Where it begins; 0 for one without memory."""

    def stream(self, like: View) -> int:
        """The address of the stream on which the caller works, 0 for the default one and on the host."""

    def namespace(self, array: Any) -> Any:
        """The module whose functions follow the Python array API, for `merge`; None where the framework has none."""

    def to_numpy(self, array: Any) -> NDArray[Any]:
        """The contents on the host, copied if they lie elsewhere, for `coverage` and for checking a Selection."""


ADAPTERS = {
    "numpy": "llsa_np.adapters.numpy_arrays",
    "cupy": "llsa_np.adapters.cupy_arrays",
    "numba": "llsa_np.adapters.numba_arrays",
    "torch": "llsa_np.adapters.pytorch",
    "jax": "llsa_np.adapters.jax_arrays",
    "jaxlib": "llsa_np.adapters.jax_arrays",
    "llsa_np": "llsa_np.recording",
}
"""Top module of an array's type (or of a base class of it) -> the module whose `adapter` serves it."""

OTHERS = "llsa_np.adapters.dlpack_arrays"
"""The module that serves arrays of any other framework, if they go through DLPack."""

PIECE = 16
"""Bytes that kernels move at once where arrays begin at multiples of it."""

SUPPORTED = (
    "arrays of NumPy (bfloat16 as ml_dtypes.bfloat16), CuPy, numba.cuda and JAX, dense tensors of PyTorch (to_dense() "
    "and resolve_neg() give such; nested ones one by one), and any others that go through DLPack"
)


def type_name(value: Any) -> str:
    """The type's name as a person knows it, with its module."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def half_installed(package: str, error: Exception) -> ImportError:
    """What a framework comes to whose arrays are here, but which cannot be imported as a whole."""
    return ImportError(
        f"llsa_np: arrays of {package} cannot be read, as {package} is installed in part, or in a version that lacks "
        f"what is needed: {error}. Reinstall it, in a version that pip install 'llsa-np' with its extra allows"
    )


def _adapter_of_type(kind: type) -> Adapter | None:
    for base in kind.__mro__:
        package = base.__module__.partition(".")[0]
        if package in ADAPTERS:
            try:
                adapter: Adapter = importlib.import_module(ADAPTERS[package]).adapter
            except (ImportError, AttributeError) as error:
                raise half_installed(package, error) from error
            return adapter
    if hasattr(kind, "__dlpack__"):
        exchanged: Adapter = importlib.import_module(OTHERS).adapter_of_package(kind.__module__.partition(".")[0])
        return exchanged
    return None


adapter_of_type: Callable[[Any], Adapter | None] = cache(_adapter_of_type)
"""The adapter that may serve arrays of a type."""


def adapter_of(who: str, name: str, array: Any) -> Adapter:
    """The adapter that serves this argument, or a TypeError that names its type and what is supported."""
    adapter = adapter_of_type(type(array))
    if adapter is not None and adapter.owns(array):
        return adapter
    raise TypeError(
        f"{who}: {name} is a {type_name(array)}; supported are {SUPPORTED}. Convert it first, e.g. with numpy.asarray"
    )


def common_adapter(who: str, arrays: Mapping[str, Any]) -> Adapter:
    """The one adapter that serves all arguments, or a TypeError that names the two that disagree."""
    (first_name, first_array), *others = arrays.items()
    first = adapter_of(who, first_name, first_array)
    for name, array in others:
        adapter = adapter_of(who, name, array)
        if adapter is not first:
            raise TypeError(
                f"{who}: {first_name} is an array of {first.name} and {name} one of {adapter.name}; "
                "all arrays of one call come from the same framework. Convert one of them"
            )
    return first
