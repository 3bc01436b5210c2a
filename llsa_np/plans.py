"""Calls worked out once: the checks, the results, the workspace, and what is launched or computed.

All of these follow from shapes, strides, dtypes, devices, alignment and options, never from what is in the arrays. So a
call is gone through with stand-ins (recording.py), and a call like it only fills in its arrays, or where they begin.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from functools import wraps
from inspect import Parameter, signature
from itertools import count
from operator import itemgetter
from threading import Lock
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from llsa_np.adapters import Adapter, View, adapter_of_type
from llsa_np.backends import Room, recorded_devices
from llsa_np.copies import ARRAYS
from llsa_np.recording import Recording, StandIn, adapter, leaves
from llsa_np.selection import Selection

Function = TypeVar("Function", bound=Callable[..., Any])

MOST_PLANS = 256

ONE_ROOM = True
"""Whether all that a call makes besides its results lies in one allocation. A tool that looks for writes outside of
arrays sees more where each has its own, and sets it to False."""

ALIGNMENT = 256
"""Of an array in it, in bytes: what CUDA's own allocations have at least."""

CLOCK = count()
"""Counts the calls that go by a plan."""


# --- what calls alike do


class Place(NamedTuple):
    """Where a stand-in's memory is, in a call: so many bytes into one of the call's arrays."""

    array: int
    offset: int


class Plan(ABC):
    """Makes the results and the workspace of a call, has the work done, and returns: a kind for each way to do it."""

    def __init__(self, of: Adapter, recording: Recording, results: Any, like: View) -> None:
        self.adapter, self.recording, self.results, self.like = of, recording, results, like._replace(array=None)
        self.used = next(CLOCK)
        kept = leaves(results)
        self.makers = [of.maker(x.shape, x.dtype, self.like) for x in kept]
        self.places = {x.ptr: Place(i, 0) for i, x in enumerate([*recording.given, *kept])}
        self.place([x for x in recording.made if x.ptr and x.ptr not in self.places])

    @abstractmethod
    def place(self, workspace: list[StandIn]) -> None:
        """Find a place for what a call makes besides its results."""

    @abstractmethod
    def work(self, arrays: Sequence[Any]) -> None:
        """Fill the results. arrays: the call's, results and workspace."""

    def array_like(self, x: StandIn) -> int:
        """One more array that each call makes; its number among the call's arrays."""
        self.makers.append(self.adapter.maker(x.shape, x.dtype, self.like))
        return len(self.recording.given) + len(self.makers) - 1

    def run(self, arrays: Sequence[Any], who: str) -> Any:
        """The results of a call with these arrays, enqueued on the caller's stream. who: the caller, as errors for want
        of memory say it."""
        self.used = next(CLOCK)
        try:
            made = [make() for make in self.makers]
            self.work([*arrays, *made])
        except MemoryError as error:
            raise with_advice(error, who) from error
        return made[0] if isinstance(self.results, StandIn) else filled(self.results, iter(made))


class HostPlan(Plan):
    """Of a backend that computes at once: its operations, on the host's arrays themselves."""

    def __init__(self, of: Adapter, recording: Recording, results: Any, like: View) -> None:
        super().__init__(of, recording, results, like)
        self.exchanged: list[int] = []
        """Arrays that the backend sees with axes 1 and 2 exchanged."""
        self.operations = [(name, *self.numbered(arguments)) for name, arguments in recording.operations]

    def place(self, workspace: list[StandIn]) -> None:
        """Each in an array of its own."""
        for x in workspace:
            self.places[x.ptr] = Place(self.array_like(x), 0)

    def work(self, arrays: Sequence[NDArray[Any]]) -> None:
        """The operations."""
        every = list(arrays)
        if self.exchanged:
            every += [arrays[i].swapaxes(1, 2) for i in reversed(self.exchanged)]
        backend = self.recording.backend
        for operation, arguments, single, several in self.operations:
            given = arguments.copy()
            for i, number in single:
                given[i] = every[number]
            for i, make, of in several:
                given[i] = make(of(every))
            getattr(backend, operation)(*given)

    def numbered(self, arguments: Any) -> tuple[list[Any], list[Any], list[Any]]:
        """The arguments of an operation; which of them are an array, and its number among all; and which are several,
        and what finds them. To look for them at every call took 50 us more of a host."""
        single = [(i, self.number(x)) for i, x in enumerate(arguments) if isinstance(x, StandIn)]
        several = [
            (i, x._with_arrays if isinstance(x, Selection) else list, finder([self.number(y) for y in x]))
            for i, x in enumerate(arguments)
            if isinstance(x, (list, Selection))
        ]
        return list(arguments), single, several

    def number(self, x: StandIn) -> int:
        """Of what it stands for: from the first among the call's arrays, or from the last among those exchanged."""
        if x.ptr == 0:
            return self.array_like(x)
        number = self.places[x.ptr].array
        if not x.heads_first:
            return number
        if number not in self.exchanged:
            self.exchanged.append(number)
        return -1 - self.exchanged.index(number)


class AddressPlan(Plan):
    """Of arrays that are known by where they begin."""

    def place(self, workspace: list[StandIn]) -> None:
        """All in one array, if it may be so."""
        rooms: list[int] = []
        for x in workspace:
            if not rooms or not ONE_ROOM:
                rooms.append(0)
            self.places[x.ptr] = Place(len(self.recording.given) + len(self.makers) + len(rooms) - 1, rooms[-1])
            rooms[-1] += -(-x.size * x.dtype.itemsize // ALIGNMENT) * ALIGNMENT
        self.makers += [self.adapter.maker((size,), np.dtype(np.uint8), self.like) for size in rooms]

    def work(self, arrays: Sequence[Any]) -> None:
        """Found where they begin."""
        pointer = self.adapter.pointer
        self.enqueue([pointer(x) for x in arrays], self.adapter.stream(self.like))

    @abstractmethod
    def enqueue(self, pointers: Sequence[int], stream: int) -> None:
        """Have the results filled. pointers: where the call's arrays, results and workspace begin."""


class LaunchPlan(AddressPlan):
    """Of a backend that records: its launches."""

    launches: Any = None

    def enqueue(self, pointers: Sequence[int], stream: int) -> None:
        """The launches."""
        if not self.recording.launches:
            return
        if self.launches is None:  # and not compiled before there is room for what it fills
            self.launches = self.recording.backend.prepared(self.recording.launches, self.places, self.like.device)
        self.launches(pointers, stream)


class OperationPlan(AddressPlan):
    """Of a backend that enqueues at once: its operations, on stand-ins that have memory."""

    def enqueue(self, pointers: Sequence[int], stream: int) -> None:
        """The operations."""
        for operation, arguments in self.recording.operations:
            placed = [self.placed(x, pointers, stream) for x in arguments]
            getattr(self.recording.backend, operation)(*placed)

    def placed(self, value: Any, pointers: Sequence[int], stream: int) -> Any:
        """An operation's argument, with memory."""
        if isinstance(value, StandIn):
            place = self.places[value.ptr]
            ptr = pointers[place.array] + place.offset if value.ptr else 0
            return StandIn(None, ptr, value.shape, value.strides, value.dtype, value.device)
        if isinstance(value, Room):
            return value._replace(arrays=self.placed(value.arrays, pointers, stream), stream=stream)
        if isinstance(value, list):
            return [self.placed(x, pointers, stream) for x in value]
        if isinstance(value, Selection):
            return value._with_arrays(self.placed(x, pointers, stream) for x in value)
        return value


def plan_from(of: Adapter, recording: Recording, results: Any, like: View) -> Plan:
    """Of what was recorded. of: the adapter of the arrays in calls, which are where `like` is."""
    at_once = HostPlan if like.device == "cpu" else OperationPlan
    return (LaunchPlan if recording.has_launches else at_once)(of, recording, results, like)


def finder(numbers: list[int]) -> Callable[[list[Any]], Sequence[Any]]:
    """What finds the entries of these numbers in a list."""
    if len(numbers) > 1:
        return itemgetter(*numbers)
    (number,) = numbers
    return itemgetter(slice(number, number + 1 or None))  # as a list of one; the last is -1


def filled(results: Any, arrays: Iterator[Any]) -> Any:
    """What a call returns, with these arrays in it."""
    if results is None:
        return None
    if isinstance(results, tuple):
        return tuple([next(arrays) if type(part) is StandIn else filled(part, arrays) for part in results])
    if isinstance(results, Selection):
        return results._with_arrays(next(arrays) for _ in results)
    return next(arrays)


# --- calls alike

PLAIN = frozenset((int, float, bool, str, type(None)))
"""Types of options that one can tell apart by type and value."""
UNKNOWN: Any = object()
plans: dict[Any, Plan | None] = {}
"""None for calls whose backend cannot record."""
_keeping = Lock()


def planned(function: Function, who: str | None = None) -> Function:
    """The function, which for NumPy's arrays, and for those on a device whose backend records, goes by a plan; and
    whose errors for want of memory, of whichever framework, say what would take less."""
    parameters = signature(function).parameters
    names = [name for name in parameters if name in ARRAYS]
    needed = [name for name in names if parameters[name].default is Parameter.empty]
    positional = [name for name in names if parameters[name].kind is not Parameter.KEYWORD_ONLY]
    wanted_by = who or function.__name__

    @wraps(function)
    def call(*arrays: Any, **options: Any) -> Any:
        plan = plan_for(call, arrays, options)
        if plan is not None:
            return plan.run(arrays, wanted_by)
        try:
            on_host = len(arrays) > 0 and isinstance(arrays[0], np.ndarray)
            if not (on_host or recorded_devices()) or len(arrays) > len(positional):
                return function(*arrays, **options)
            given, others = arrays, options
            if len(arrays) < len(names):
                by_name = names[len(arrays) :]
                given = (*arrays, *[options.get(name) for name in by_name])
                if not options.keys().isdisjoint(by_name):
                    others = {name: value for name, value in options.items() if name not in by_name}
            found = alike(given, len(needed))
            if found is None:
                return function(*arrays, **options)
            of, keys, flat = found
            of_options = key_of_options(others)
            # A plan for one call is dearer than none; a backend that records launches takes nothing but stand-ins
            if of_options is None and on_host and "cpu" not in recorded_devices():
                return function(*arrays, **options)
            key = None if of_options is None else (call, of.name, *keys, *of_options)
            plan = UNKNOWN if key is None else plans.get(key, UNKNOWN)
            if plan is UNKNOWN:
                # A second look at an option that is used up by the first would find nothing
                options = {name: tuple(x) if is_used_up(x) else x for name, x in options.items()}
                others = {name: options[name] for name in others}
                plan = None
                if takes_selection(names, given) and all(may_be_recorded(of, x) for x in flat):
                    plan = record(function, of, dict(zip(names, given)), others)
                    if key is not None:
                        keep(key, plan)
            if plan is None:
                return function(*arrays, **options)
        except MemoryError as error:
            raise with_advice(error, wanted_by) from error
        return plan.run(flat, wanted_by)

    return call  # type: ignore[return-value]


def plan_for(function: Callable[..., Any], arrays: tuple[Any, ...], options: dict[str, Any]) -> Plan | None:
    """The plan of a call on NumPy's arrays alone, with options of plain types, if there was one like it.

    Its key is the one that `planned` makes of such a call by `key` of NumPy's adapter and `key_of_options`, in fewer
    steps: a host that did other things meanwhile has none of them in its caches. On a slow one the public call adds 35
    us to the operations; with `planned`'s own steps it added 55."""
    key: list[Any] = [function, "NumPy"]
    for x in arrays:
        if type(x) is not np.ndarray:
            return None
        key.append((x.dtype, x.shape))
    for name, value in options.items():
        kind = type(value)
        if kind not in PLAIN:
            return None
        key += (name, kind, value)
    return plans.get(tuple(key))


def with_advice(error: MemoryError, who: str) -> MemoryError:
    """An error for want of memory, with who wanted it and what would take less."""
    told = str(error).rstrip(".") or "out of memory"
    # An adapter's own type is one that users of its framework catch; CuPy's takes other arguments.
    kind = type(error) if type(error).__module__.startswith("llsa_np.") else MemoryError
    return kind(
        f"{who}: {told}. Call it with fewer batch entries, or fewer kv heads with their query heads, at a time: none "
        "sees another"
    )


def alike(given: tuple[Any, ...], needed: int) -> tuple[Adapter, list[Any], Sequence[Any]] | None:
    """The adapter of a call's arrays, what calls alike have in common of them, and the arrays, those of a Selection one
    by one; None if they are not all of one framework."""
    of = adapter_of_type(type(given[0])) if given else None
    if of is None or of.name == adapter.name:
        return None
    if len(set(map(type, given))) == 1:  # q, k and v of one type: 1.2 to 1.8 us less of a host than what follows, of 10
        keys: list[Any] = list(map(of.key, given))
        return None if None in keys else (of, keys, given)
    keys, flat = [], []
    for i, value in enumerate(given):
        if value is None and i >= needed:
            keys.append(None)
            continue
        parts = (value,)
        if isinstance(value, Selection):
            keys.append(value.made_for)
            parts = tuple(value)
        for x in parts:
            key = of.key(x) if adapter_of_type(type(x)) is of else None
            if key is None:
                return None
            keys.append(key)
            flat.append(x)
    return of, keys, flat


def takes_selection(names: list[str], given: Sequence[Any]) -> bool:
    """Whether the argument that is to be a Selection is one; the function says so of another."""
    return all(isinstance(x, Selection) for name, x in zip(names, given) if name == "selection")


def may_be_recorded(of: Adapter, x: Any) -> bool:
    """Whether an array is NumPy's, or one with numbers that kernels can read on a device whose backend records."""
    if not of.owns(x):
        return False
    if isinstance(x, np.ndarray):
        return True
    view = of.view(x)
    is_there = view.device.partition(":")[0] in recorded_devices()
    return is_there and isinstance(getattr(view.array, "dtype", None), np.dtype)


def is_used_up(x: Any) -> bool:
    """Whether an option's entries can be had only once."""
    return isinstance(x, Iterable) and not isinstance(x, Sized)


def key_of_options(options: dict[str, Any]) -> tuple[Any, ...] | None:
    """What tells options apart, 1 and True too; None for those of other types than most give, whose calls are planned
    each time."""
    key: list[Any] = []
    for name, option in options.items():
        value = option if type(option) in PLAIN else plain(option)
        if type(value) not in PLAIN and not (type(value) is tuple and {int, str}.issuperset(map(type, value))):
            return None
        key += (name, type(option), value)
    return tuple(key)


def plain(option: Any) -> Any:
    """An option of a type that is told apart by its own type too, in Python's types."""
    if isinstance(option, np.generic):
        return option.item()
    if isinstance(option, np.ndarray) and option.dtype.kind in "iu":
        return tuple(option.tolist()) if option.ndim == 1 else option
    return tuple(option) if type(option) in (list, set, frozenset, range) else option


def record(function: Callable[..., Any], of: Adapter, given: dict[str, Any], options: dict[str, Any]) -> Plan | None:
    """The plan of calls like this one, or None if its backend cannot record. given: its arrays in order."""
    recording = Recording()
    stand_ins = {name: recording.argument(x, of) for name, x in given.items()}
    results = function(**stand_ins, **options)
    like = of.view(next(iter(given.values())))
    return plan_from(of, recording, results, like) if recording.has_launches or like.device == "cpu" else None


def keep(key: Any, plan: Plan | None) -> None:
    """For the next call like it, in the place of the one that was not needed for longest if there are too many."""
    with _keeping:
        plans[key] = plan
        if len(plans) > MOST_PLANS:
            used = {key: 0 if plan is None else plan.used for key, plan in plans.items()}
            del plans[min(used, key=used.__getitem__)]
