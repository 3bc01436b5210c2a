"""Calls on a GPU, worked out once: the checks, the results, the workspace and the launches.

All of these follow from shapes, strides, dtypes, devices, alignment and options, never from what is in the arrays. So a
call is gone through with stand-ins, which have all that but no memory, and what is launched is recorded, not run. A
call like it only fills in where its arrays begin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from inspect import Parameter, signature
from math import prod
from typing import Any, NamedTuple, TypeVar

import numpy as np

from llsa_np.adapters import Adapter, View, adapter_of_type
from llsa_np.backends import Backend, recorded_devices
from llsa_np.checks import FLOATS
from llsa_np.copies import ARRAYS
from llsa_np.selection import Selection

Function = TypeVar("Function", bound=Callable[..., Any])

MOST_PLANS = 256
ONE_ROOM = True
"""Whether all that a call makes besides its results lies in one allocation; a tool that looks for writes outside of
arrays sees more where each has its own."""
ALIGNMENT = 256
"""Of an array in it, in bytes."""
PIECE = 16
"""Bytes that kernels move at once where arrays begin at multiples of it."""
TAG = 48
"""A stand-in begins at an address whose bits from here on say which it is: no array of 2**48 bytes is there."""


# --- recording


class StandIn:
    """An array without memory. `ptr` stands for where it will begin, and has its alignment; 0 if it has no elements."""

    __slots__ = ("device", "dtype", "ptr", "recording", "shape", "strides")

    def __init__(self, *values: Any) -> None:
        self.recording, self.ptr, self.shape, self.strides, self.dtype, self.device = values

    @property
    def data(self) -> StandIn:
        """As CuPy's arrays have it: `.data.ptr` is where they begin."""
        return self

    @property
    def size(self) -> int:
        """The number of elements."""
        return prod(self.shape)


class Place(NamedTuple):
    """Where a stand-in's memory is, in a call: so many bytes into one of the call's arrays."""

    array: int
    offset: int


class CannotRecordError(Exception):
    """The backend that serves a call runs what it is asked for at once."""


class Recording:
    """What a call made and launched when stand-ins went through it. It takes the place of the caller's stream."""

    def __init__(self) -> None:
        self.given: list[StandIn] = []
        self.made: list[StandIn] = []
        self.launches: list[Any] = []
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

    def uses(self, backend: Backend) -> None:
        """Which backend is about to launch."""
        if not hasattr(backend, "prepared"):
            raise CannotRecordError
        self.backend = backend


class StandInAdapter:
    """Stand-ins as a framework of their own, whose new arrays are stand-ins too."""

    name = "stand-ins"

    def owns(self, array: Any) -> bool:
        return isinstance(array, StandIn)

    def view(self, array: StandIn, layout: str = "bhnd") -> View:
        seen = array
        if layout == "bnhd" and len(array.shape) == 4:
            shape, strides = ((x[0], x[2], x[1], x[3]) for x in (array.shape, array.strides))
            seen = StandIn(array.recording, array.ptr, shape, strides, array.dtype, array.device)
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

    def stream(self, like: View) -> Recording:
        recording: Recording = like.array.recording
        return recording


adapter = StandInAdapter()


# --- running


class Plan:
    """What calls alike do: make results and a workspace, launch, return."""

    def __init__(self, of: Adapter, recording: Recording, results: Any, like: View) -> None:
        self.adapter, self.recording, self.results, self.like = of, recording, results, like._replace(array=None)
        self.launches: Any = None
        kept, given = leaves(results), len(recording.given)
        self.makers = [of.maker(x.shape, x.dtype, like) for x in kept]
        self.places = {x.ptr: Place(i, 0) for i, x in enumerate([*recording.given, *kept])}
        rooms: list[int] = []
        for x in recording.made:
            if x.ptr and x.ptr not in self.places:
                if not rooms or not ONE_ROOM:
                    rooms.append(0)
                self.places[x.ptr] = Place(given + len(kept) + len(rooms) - 1, rooms[-1])
                rooms[-1] += -(-x.size * x.dtype.itemsize // ALIGNMENT) * ALIGNMENT
        self.makers += [of.maker((size,), np.dtype(np.uint8), like) for size in rooms]

    def run(self, arrays: Sequence[Any]) -> Any:
        """The results of a call with these arrays, enqueued on the caller's stream."""
        made = [make() for make in self.makers]
        if self.recording.launches:
            if self.launches is None:  # and not compiled before there is room for what it fills
                recording = self.recording
                self.launches = recording.backend.prepared(recording.launches, self.places, self.like.device)
            pointer = self.adapter.pointer
            self.launches([pointer(x) for x in (*arrays, *made)], self.adapter.stream(self.like))
        return filled(self.results, iter(made))


def leaves(results: Any) -> list[StandIn]:
    """The arrays in what a call returns."""
    if results is None:
        return []
    return [x for part in results for x in leaves(part)] if isinstance(results, (tuple, Selection)) else [results]


def filled(results: Any, arrays: Iterator[Any]) -> Any:
    """What a call returns, with these arrays in it."""
    if results is None:
        return None
    if isinstance(results, tuple):
        return tuple([filled(part, arrays) for part in results])
    if isinstance(results, Selection):
        return results._with_arrays(next(arrays) for _ in results)
    return next(arrays)


# --- calls alike

PLAIN = frozenset((int, float, bool, str, type(None)))
"""Types of options that one can tell apart by type and value."""
UNKNOWN: Any = object()
plans: dict[Any, Plan | None] = {}
"""None for calls whose backend cannot record."""


def planned(function: Function) -> Function:
    """The function, which for arrays on a device whose backend records goes by a plan."""
    parameters = signature(function).parameters
    names = [name for name in parameters if name in ARRAYS]
    needed = [name for name in names if parameters[name].default is Parameter.empty]

    @wraps(function)
    def call(*arrays: Any, **options: Any) -> Any:
        given, others = arrays, options
        if len(arrays) < len(names):
            given = (*arrays, *[options.get(name) for name in names[len(arrays) :]])
            if not options.keys().isdisjoint(names):
                others = {name: value for name, value in options.items() if name not in names}
        found = alike(given, len(needed))
        if found is None:
            return function(*arrays, **options)
        of, keys, flat = found
        of_options = key_of_options(others)
        key = None if of_options is None else (function, *keys, *of_options)
        plan = UNKNOWN if key is None else plans.get(key, UNKNOWN)
        if plan is UNKNOWN:
            if not all(may_be_recorded(of, x) for x in flat):
                return function(*arrays, **options)
            # A second look at an option that is used up by the first would find nothing
            options = {name: tuple(x) if isinstance(x, Iterator) else x for name, x in options.items()}
            plan = record(function, of, arrays, options)
            if key is not None:
                keep(key, plan)
        return function(*arrays, **options) if plan is None else plan.run(flat)

    return call  # type: ignore[return-value]


def alike(given: tuple[Any, ...], needed: int) -> tuple[Adapter, list[Any], Sequence[Any]] | None:
    """The adapter of a call's arrays, what calls alike have in common of them, and the arrays, those of a Selection one
    by one; None if they are not all of one framework."""
    of = adapter_of_type(type(given[0])) if given else None
    if of is None or of.name == adapter.name:
        return None
    if len(set(map(type, given))) == 1:
        keys: list[Any] = list(map(of.key, given))
        return None if None in keys else (of, keys, given)
    keys, flat = [], []
    for i, value in enumerate(given):
        if value is None and i >= needed:
            keys.append(None)
            continue
        parts = (value,)
        if type(value) is Selection:
            keys.append(value.made_for)
            parts = tuple(value)
        for x in parts:
            key = of.key(x) if adapter_of_type(type(x)) is of else None
            if key is None:
                return None
            keys.append(key)
            flat.append(x)
    return of, keys, flat


def may_be_recorded(of: Adapter, x: Any) -> bool:
    """Whether an array is one that a call may take, on a device whose arrays a backend that records serves."""
    if not of.owns(x):
        return False
    view = of.view(x)
    return view.dtype in (*FLOATS, "int32") and view.device.partition(":")[0] in recorded_devices()


def key_of_options(options: dict[str, Any]) -> tuple[Any, ...] | None:
    """What tells options apart, 1 and True too; None for those of other types than most give, whose calls are planned
    each time."""
    kinds = tuple(map(type, options.values()))
    if PLAIN.issuperset(kinds):
        return (kinds, *options.items())
    values = {name: tuple(x) if type(x) in (list, set, frozenset) else x for name, x in options.items()}
    for value in values.values():
        if type(value) not in PLAIN and not (type(value) is tuple and {int, str}.issuperset(map(type, value))):
            return None
    return (kinds, *values.items())


def record(function: Callable[..., Any], of: Adapter, arrays: Any, options: dict[str, Any]) -> Plan | None:
    """The plan of calls like this one, or None if its backend cannot record."""
    recording = Recording()
    stand_ins = [recording.argument(x, of) for x in arrays]
    named = {name: recording.argument(x, of) if name in ARRAYS else x for name, x in options.items()}
    try:
        results = function(*stand_ins, **named)
    except CannotRecordError:
        return None
    first = arrays[0] if arrays else next(options[name] for name in ARRAYS if name in options)
    return Plan(of, recording, results, of.view(first))


def keep(key: Any, plan: Plan | None) -> None:
    """For the next call like it, in the place of the oldest if there are too many."""
    plans[key] = plan
    while len(plans) > MOST_PLANS:
        plans.pop(next(iter(plans)), None)
