"""A call gone through with stand-ins: arrays that have all but memory. It notes what the call makes and launches.

What a call does follows from shapes, strides, dtypes, devices, alignment and options, never from what is in the arrays.
So launches are recorded as if they were made, and of a backend that cannot record them the operations that it was asked
for. A framework that hands out memory before it calls, as JAX does, learns from the same stand-ins how much.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from llsa_np.adapters import PIECE, Adapter, DeviceMemory, View
from llsa_np.backends import RECORDS, Backend
from llsa_np.selection import Selection

TAG = 48
"""A stand-in begins at an address whose bits from here on say which it is: no array of 2**48 bytes is there."""


class StandIn(DeviceMemory):
    """An array without memory. `ptr` stands for where it will begin, and has its alignment; 0 if it has no elements."""

    __slots__ = ("device", "dtype", "heads_first", "ptr", "recording", "shape", "strides")
    recording: Any
    """Where it was made."""

    def __init__(self, *values: Any, heads_first: bool = False) -> None:
        """heads_first: whether it is one of layout "bnhd" as backends see it, with its axes 1 and 2 exchanged."""
        self.recording, self.ptr, self.shape, self.strides, self.dtype, self.device = values
        self.heads_first = heads_first

    @property
    def size(self) -> int:
        """The number of elements."""
        return prod(self.shape)


class Notes:
    """A backend that runs what it is asked for at once: here it only writes that down."""

    def __init__(self, of: Backend, operations: list[tuple[str, tuple[Any, ...]]]) -> None:
        self.name, self.spaces, self.operations = of.name, of.spaces, operations

    def __getattr__(self, operation: str) -> Callable[..., None]:
        return lambda *arguments: self.operations.append((operation, arguments))


class Recording:
    """What a call made and launched when stand-ins went through it. It takes the place of the caller's stream."""

    def __init__(self) -> None:
        self.given: list[StandIn] = []
        self.made: list[StandIn] = []
        self.launches: list[Any] = []
        self.operations: list[tuple[str, tuple[Any, ...]]] = []
        """What was asked of a backend that does not record its launches: which operation, with what."""
        self.shared: dict[Any, Any] = {}
        """What a backend notes of launches that do the work of several operations."""
        self.backend: Any = None

    def stand_in(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any, device: str, low: int) -> StandIn:
        """The next one."""
        number = len(self.given) + len(self.made) + 1
        return StandIn(self, (number << TAG) + low if prod(shape) else 0, shape, strides, dtype, device)

    def argument(self, value: Any, adapter: Adapter) -> Any:
        """What stands in for an argument: an array, a Selection or None."""
        if value is None:
            return None
        if isinstance(value, Selection):
            return value._with_arrays(self.argument(x, adapter) for x in value)
        view, low = adapter.view(value), adapter.pointer(value) % PIECE
        array = self.stand_in(view.shape, view.array.strides, view.array.dtype, view.device, low)
        self.given.append(array)
        return array

    def of(self, backend: Any) -> Any:
        """The backend that serves the call, such that nothing runs."""
        self.backend = backend
        return backend if self.has_launches else Notes(backend, self.operations)

    @property
    def has_launches(self) -> bool:
        """Whether what the backend launches is recorded, not only what it is asked for."""
        return self.backend is None or self.backend.name in RECORDS

    @property
    def stream(self) -> Recording:
        """Itself."""
        return self


class StandInAdapter:
    """Stand-ins as a framework of their own, whose new arrays are stand-ins too."""

    name = "stand-ins"

    def owns(self, array: Any) -> bool:
        return isinstance(array, StandIn)

    def view(self, array: StandIn, layout: str = "bhnd") -> View:
        seen = array
        if layout == "bnhd" and len(array.shape) == 4:
            shape, strides = ((x[0], x[2], x[1], x[3]) for x in (array.shape, array.strides))
            seen = StandIn(array.recording, array.ptr, shape, strides, array.dtype, array.device, heads_first=True)
        return View(array.shape, array.dtype.name, array.device, seen)

    def empty(self, shape: tuple[int, ...], dtype: Any, like: View, layout: str = "bhnd") -> tuple[StandIn, View]:
        if layout == "bnhd":
            shape = (shape[0], shape[2], shape[1], *shape[3:])
        of = like.array.dtype if dtype is None else np.dtype(dtype)
        recording = like.array.recording
        strides = tuple(of.itemsize * prod(shape[axis + 1 :]) for axis in range(len(shape)))
        array = recording.stand_in(shape, strides, of, like.device, 0)
        recording.made.append(array)
        return array, self.view(array, layout)

    def stream(self, like: View) -> Any:
        return like.array.recording.stream


adapter = StandInAdapter()


def leaves(results: Any) -> list[StandIn]:
    """The arrays in what a call returns."""
    if results is None:
        return []
    return [x for part in results for x in leaves(part)] if isinstance(results, (tuple, Selection)) else [results]
