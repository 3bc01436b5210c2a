"""JAX: arrays and tracers, and the functions by which jit, grad, vmap and shard_map know LLSA.

A call becomes one call of XLA's, which hands a Python callback its own buffers: of the arguments, of the results and of
one workspace. On a GPU the callback enqueues the kernels on XLA's stream, on a CPU it runs the reference. What XLA must
know ahead, the shapes of results and workspace, a plan tells while JAX traces.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.experimental.buffer_callback import buffer_callback
from numpy.typing import NDArray

from llsa_np import functions
from llsa_np.adapters import PIECE, View, common_adapter
from llsa_np.backends import DEVICES, serves_gpu
from llsa_np.checks import ORDER, check_devices, check_is_selection, check_queries_keys, check_selection
from llsa_np.hierarchy import hierarchy_of
from llsa_np.options import check_flag, check_layout, check_needs
from llsa_np.plans import MOST_PLANS, Plan, Recording, Replay, leaves
from llsa_np.plans import adapter as stand_ins
from llsa_np.selection import Selection

NEEDS = ("q", "k", "v")

# --- arrays as the checks see them


class JaxAdapter:
    """Arrays and tracers. Their memory is XLA's, and only its callback sees it."""

    name = "JAX"

    def owns(self, array: Any) -> bool:
        return isinstance(array, jax.Array) and isinstance(array.dtype, np.dtype)

    def view(self, array: jax.Array, layout: str = "bhnd") -> View:
        return View(array.shape, array.dtype.name, device_of(array), array)

    def empty(self, shape: tuple[int, ...], dtype: Any, like: View, layout: str = "bhnd") -> tuple[Any, View]:
        raise NotImplementedError("JAX's arrays cannot be filled")

    def maker(self, shape: tuple[int, ...], dtype: np.dtype[Any], like: View) -> Callable[[], Any]:
        return partial(jax.ShapeDtypeStruct, shape, dtype)

    def key(self, array: jax.Array) -> tuple[Any, ...] | None:
        return None

    def pointer(self, array: jax.Array) -> int:
        return 0

    def stream(self, like: View) -> int:
        return 0

    def namespace(self, array: jax.Array) -> Any:
        return jnp

    def to_numpy(self, array: jax.Array) -> NDArray[Any]:
        return np.asarray(array)


adapter = JaxAdapter()


def device_of(array: jax.Array) -> str:
    """ "cpu", "cuda:0", ...; "" for a tracer, whose device is not known yet, and for an array on several."""
    if isinstance(array, jax.core.Tracer) or len(array.devices()) > 1:
        return ""
    (device,) = array.devices()
    kind = "cuda" if device.platform == "gpu" else device.platform
    return kind if kind == "cpu" else f"{kind}:{device.local_hardware_id}"


# --- what XLA calls


class Operation(NamedTuple):
    """A function with its options, on arrays alone. Hashable, as a compiled program of it is kept."""

    name: str
    options: tuple[tuple[str, Any], ...]
    kinds: tuple[type, ...]
    """Of the options: 1 is not True."""

    def of(self, arrays: Any) -> tuple[Any, ...]:
        """Its results for arrays of any framework."""
        options: Any = dict(self.options)
        if self.name == "attention":
            return functions.attend_selected(*arrays, **options)
        if self.name == "select":
            return tuple(plain("select")(*arrays, **options))
        if self.name == "pool":
            return tuple(plain("pool")(*arrays, **options))
        block_size, backwards = options.pop("block_size"), self.name == "attend_backward"
        count = 6 + options.pop("has_dlse") if backwards else 3
        tensors, selected = arrays[:count], arrays[count:]
        q, k = tensors[backwards : backwards + 2]
        selection = selection_of(selected, block_size, q, k, options["layout"])
        if not backwards:
            return plain("attend")(*tensors, selection, **options)
        options["dlse"] = tensors[6] if count > 6 else None
        return tuple(x for x in plain("attend_backward")(*tensors[:6], selection, **options) if x is not None)


class Call(NamedTuple):
    """What XLA calls back: an operation on arrays of these shapes, of which a backend is chosen for a device."""

    operation: Operation
    arrays: tuple[tuple[tuple[int, ...], np.dtype[Any]], ...]
    device: str
    lows: tuple[int, ...]
    """Where the arrays begin, modulo PIECE."""

    def __call__(self, context: Any, out: list[Any], *given: Any) -> None:
        """given, out: XLA's buffers, of the plan's arrays, results and workspace."""
        if plan_of(self).recording.backend.name == "numpy":
            for result, to in zip(self.operation.of([np.asarray(x) for x in given]), out):
                np.asarray(to)[...] = result
            return
        on_host = self.device == "cpu"
        pointers = [pointer(x, on_host) for x in (*given, *out)]
        stream = 0 if on_host else context.stream
        device = self.device if on_host else f"cuda:{given[0].__dlpack_device__()[1]}"
        lows = tuple([address % PIECE for address in pointers[: len(given)]])
        plan = plan_of(self._replace(device=device, lows=lows))
        if plan.recording.has_launches:
            plan.enqueue(pointers, stream)
        else:
            replay = Replay(plan, pointers, stream)
            self.operation.of([stand_in(replay, *of, device, 0) for of in self.arrays])


def pointer(buffer: Any, on_host: bool) -> int:
    """Where it begins; 0 if it has no elements."""
    of = np.asarray(buffer).__array_interface__ if on_host else buffer.__cuda_array_interface__
    return 0 if 0 in of["shape"] else of["data"][0]


def stand_in(recording: Any, shape: tuple[int, ...], dtype: np.dtype[Any], device: str, low: int) -> Any:
    """For an array of XLA's, which are dense."""
    strides = [dtype.itemsize]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    array = recording.stand_in(shape, tuple(reversed(strides)), dtype, device, low)
    recording.given.append(array)
    return array


@lru_cache(MOST_PLANS)
def plan_of(call: Call) -> Plan:
    """The plan of a call; raises what is wrong with its arguments."""
    recording = Recording()
    given = [stand_in(recording, *of, call.device, low) for of, low in zip(call.arrays, call.lows)]
    results = call.operation.of(given)
    return Plan(adapter, recording, results, stand_ins.view(given[0]))


def devices_of(backend: Any) -> dict[str, str]:
    """By platform, the device that stands for all of it: of those on which a backend of this name may serve."""
    kinds = {kind for name, kind in DEVICES.items() if backend in ("auto", name) and (kind == "cpu" or serves_gpu())}
    return {kind: kind if kind == "cpu" else f"{kind}:0" for kind in sorted(kinds)}


@partial(jax.jit, static_argnums=0)
@partial(jax.custom_jvp, nondiff_argnums=(0,))
def run(operation: Operation, *arrays: Any) -> tuple[Any, ...]:
    """The results of an operation, on the platform for which it is compiled."""
    return mapped(operation)(*arrays)


@run.__wrapped__.defjvp
def no_second_gradient(*_: Any) -> Any:
    """What differentiating a gradient comes to: the functions below have gradients of their own."""
    raise NotImplementedError(
        "llsa: gradients of gradients are not implemented; attend_backward itself is not differentiable. "
        "Stop the gradient of what is differentiated a second time (jax.lax.stop_gradient)"
    )


@lru_cache(MOST_PLANS)
def mapped(operation: Operation) -> Callable[..., tuple[Any, ...]]:
    """The operation for vmap too: all its arrays have their batch first, which the mapped axis joins."""

    @jax.custom_batching.custom_vmap
    def call(*arrays: Any) -> tuple[Any, ...]:
        shapes = tuple((x.shape, np.dtype(x.dtype)) for x in arrays)

        def on(device: str) -> Callable[..., list[Any]]:
            of = Call(operation, shapes, device, (0,) * len(shapes))
            plan = plan_of(of)
            made, results = [make() for make in plan.makers], len(leaves(plan.results))
            back = buffer_callback(of, made, command_buffer_compatible=True)
            return lambda *given: back(*given)[:results]

        by_platform = {kind: on(device) for kind, device in devices_of(dict(operation.options)["backend"]).items()}
        if len(by_platform) == 1:  # what another platform refuses is told when a program for it is compiled
            (function,) = by_platform.values()
            return tuple(as_varying(function(*arrays), axes_of(arrays)))
        return tuple(as_varying(jax.lax.platform_dependent(*arrays, **by_platform), axes_of(arrays)))

    @call.def_vmap
    def rule(size: int, are_mapped: list[bool], *arrays: Any) -> Any:
        whole = [x if mapped else jnp.broadcast_to(x, (size, *x.shape)) for x, mapped in zip(arrays, are_mapped)]
        results = call(*(x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]) for x in whole))
        batch = whole[0].shape[1]
        return tuple(x.reshape(size, batch, *x.shape[1:]) for x in results), (True,) * len(results)

    return call


def axes_of(arrays: Any) -> tuple[str, ...]:
    """The axes of a shard_map's mesh along which any of these arrays differ."""
    return tuple(sorted(set().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))))


def as_varying(arrays: Any, axes: tuple[str, ...]) -> list[Any]:
    """The same arrays, which may differ along these axes: shard_map takes a gradient for a sum over the others."""
    of = [tuple(axis for axis in axes if axis not in jax.typeof(x).manual_axis_type.varying) for x in arrays]
    return [jax.lax.pcast(x, missing, to="varying") if missing else x for x, missing in zip(arrays, of)]


# --- gradients


@jax.tree_util.register_static
@dataclass(frozen=True)
class Known:
    """What a gradient needs beside arrays."""

    of: Any


def needed_of(*arrays: Any) -> Known:
    """Which gradients are asked for, of q, k and v as `custom_vjp` hands them over."""
    return Known(tuple(name for name, x in zip(NEEDS, arrays) if x.perturbed))


def gradients(operation: Operation, kept: Any, cotangents: Any) -> tuple[Any, Any, Any]:
    """dq, dk and dv, each if it is asked for."""
    q, k, v, out, lse, selected, needed = kept
    dout, dlse = (None if isinstance(x, SymbolicZero) else x for x in cotangents)
    if not needed.of or (dout is None and dlse is None):
        return None, None, None
    options = {name: value for name, value in operation.options if name not in ("levels", "topk")}
    options |= {"needs": needed.of, "has_dlse": dlse is not None}
    arrays = [jnp.zeros_like(out) if dout is None else dout, q, k, v, out, lse, *([] if dlse is None else [dlse])]
    results = iter(run(operation_of("attend_backward", options), *arrays, *selected))
    dq, dk, dv = (next(results) if name in needed.of else None for name in NEEDS)
    return dq, dk, dv


@partial(jax.jit, static_argnums=0)
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention_of(operation: Operation, q: Any, k: Any, v: Any) -> tuple[Any, Any]:
    """out and lse."""
    out, lse, *_ = run(operation, q, k, v)
    return out, lse


def keep_attention(operation: Operation, *arrays: Any) -> Any:
    """out and lse, and what the gradients need."""
    q, k, v = (x.value for x in arrays)
    out, lse, *selected = run(operation, q, k, v)
    return (out, lse), (q, k, v, out, lse, tuple(selected), needed_of(*arrays))


attention_of.__wrapped__.defvjp(keep_attention, gradients, symbolic_zeros=True)


@partial(jax.jit, static_argnums=0)
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_of(operation: Operation, q: Any, k: Any, v: Any, selected: Any) -> tuple[Any, Any]:
    """out and lse."""
    out, lse = run(operation, q, k, v, *selected)
    return out, lse


def keep_attend(operation: Operation, *arrays: Any) -> Any:
    """out and lse, and what the gradients need."""
    q, k, v, selected = arrays[0].value, arrays[1].value, arrays[2].value, tuple(x.value for x in arrays[3])
    out, lse = run(operation, q, k, v, *selected)
    return (out, lse), (q, k, v, out, lse, selected, needed_of(*arrays[:3]))


def gradients_of_attend(operation: Operation, kept: Any, cotangents: Any) -> Any:
    """dq, dk and dv, and none of a selection."""
    return *gradients(operation, kept, cotangents), (None,) * len(kept[5])


attend_of.__wrapped__.defvjp(keep_attend, gradients_of_attend, symbolic_zeros=True)


@partial(jax.jit, static_argnums=0)
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def pool_of(operation: Operation, x: Any) -> tuple[Any, ...]:
    """Levels 1, 2, ..."""
    return run(operation, x)


def keep_pool(operation: Operation, x: Any) -> Any:
    """The levels, and x's shape and element type."""
    return run(operation, x), Known((x.shape, x.dtype))


def pool_gradient(operation: Operation, kept: Known, dlevels: Any) -> tuple[Any]:
    """Every token receives of each level its ancestor's gradient divided by its count."""
    options, (shape, dtype) = dict(operation.options), kept.of
    axis = ORDER[options["layout"]].index("tokens")
    tokens, sums = shape[axis], jnp.float64 if dtype == jnp.float64 else jnp.float32
    total = jnp.zeros(shape, sums)
    for level, d in enumerate(dlevels, 1):
        stride = options["block_size"] ** level
        counts = np.minimum(tokens - np.arange(d.shape[axis]) * stride, stride).reshape(-1, *[1] * (3 - axis))
        part = jnp.repeat(d.astype(sums) / counts.astype(sums), min(stride, tokens), axis)
        total += jax.lax.slice_in_dim(part, 0, tokens, axis=axis)
    return (total.astype(dtype),)


pool_of.__wrapped__.defvjp(keep_pool, pool_gradient)


# --- the public functions on JAX's arrays


def plain(name: str) -> Callable[..., Any]:
    """The public function of this name without what frameworks wrap around it."""
    function: Callable[..., Any] = getattr(functions, name).plain
    return function


def selection_of(selected: Any, block_size: int, q: Any, k: Any, layout: str) -> Selection:
    """The Selection of q and k that these arrays are."""
    tokens = ORDER[layout].index("tokens")
    hierarchies = [hierarchy_of(x.shape[tokens], block_size, len(selected)) for x in (q, k)]
    heads = q.shape[ORDER[layout].index("heads")]
    return Selection._made(tuple(selected), q.shape[0], heads, tuple(x.shape[3] for x in selected), *hierarchies)


def operation_of(name: str, options: dict[str, Any]) -> Operation:
    """An operation, whose options with several entries are tuples."""
    values = {
        of: tuple(x) if isinstance(x, Iterable) and not isinstance(x, (str, tuple)) else x for of, x in options.items()
    }
    return Operation(name, tuple(values.items()), tuple(map(type, values.values())))


@cache
def signature(name: str) -> inspect.Signature:
    """Of a public function."""
    return inspect.signature(plain(name))


def arguments(
    name: str, given: Any, options: dict[str, Any], arrays: tuple[str, ...]
) -> tuple[list[Any], dict[str, Any]]:
    """A call's arrays, all of JAX and of one device, and its options."""
    try:
        bound = signature(name).bind(*given, **options)
    except TypeError:
        plain(name)(*given, **options)  # which says what is wrong
        raise
    bound.apply_defaults()
    of = dict(bound.arguments)
    values = {name: of.pop(name) for name in arrays}
    there = {name: x for name, x in values.items() if x is not None or name != "dlse"}
    if "selection" in of:
        selection = check_is_selection(name, of["selection"])
        there |= {f"level {i} of selection": x for i, x in enumerate(selection, 1)}
    common_adapter(name, there)
    views = {name: adapter.view(x) for name, x in there.items()}
    check_devices(name, views)
    return list(values.values()), of


def attention(*arrays: Any, **options: Any) -> Any:
    """`llsa_np.attention` on JAX's arrays."""
    given, of = arguments("attention", arrays, options, ("q", "k", "v"))
    return_lse = check_flag("attention", "return_lse", of.pop("return_lse"))
    out, lse = called(attention_of, "attention", given, of)
    return (out, lse) if return_lse else out


def select(*arrays: Any, **options: Any) -> Selection:
    """`llsa_np.select` on JAX's arrays. No gradient flows through it."""
    (q, k), of = arguments("select", arrays, options, ("q", "k"))
    selected = called(run, "select", [jax.lax.stop_gradient(x) for x in (q, k)], of)
    return selection_of(selected, int(of["block_size"]), q, k, of["layout"])


def attend(*arrays: Any, **options: Any) -> Any:
    """`llsa_np.attend` on JAX's arrays."""
    given, of = arguments("attend", arrays, options, ("q", "k", "v"))
    selection = of.pop("selection")
    fits("attend", selection, given, of["layout"])
    return called(attend_of, "attend", given, {"block_size": selection.block_size} | of, tuple(selection))


def attend_backward(*arrays: Any, **options: Any) -> Any:
    """`llsa_np.attend_backward` on JAX's arrays."""
    names = ("dout", "q", "k", "v", "out", "lse", "dlse")
    given, of = arguments("attend_backward", arrays, options, names)
    selection, dlse = of.pop("selection"), given.pop()
    fits("attend_backward", selection, given[1:4], of["layout"])
    needed = check_needs("attend_backward", of["needs"])
    of |= {"block_size": selection.block_size, "needs": tuple(sorted(needed)), "has_dlse": dlse is not None}
    given += [] if dlse is None else [dlse]
    results = iter(called(run, "attend_backward", [*given, *selection], of))
    return tuple(next(results) if name in needed else None for name in NEEDS)


def pool(*arrays: Any, **options: Any) -> tuple[Any, ...]:
    """`llsa_np.pool` on JAX's arrays."""
    given, of = arguments("pool", arrays, options, ("x",))
    results: tuple[Any, ...] = called(pool_of, "pool", given, of)
    return results


def called(function: Callable[..., Any], name: str, arrays: list[Any], options: dict[str, Any], *others: Any) -> Any:
    """One of the functions above, of an operation that was planned for where the arrays are, if that is known."""
    operation = operation_of(name, options)
    flat = [*arrays, *(x for other in others for x in other)]
    devices = {device_of(x) for x in flat} - {""}
    kinds = {device.partition(":")[0] for device in devices}
    if not is_hashable(operation) or not kinds <= devices_of(options["backend"]).keys():
        shapes = tuple((x.shape, np.dtype(x.dtype)) for x in flat)
        plan_of.__wrapped__(Call(operation, shapes, next(iter(devices), "cpu"), (0,) * len(flat)))  # tells why
    axes = axes_of(flat)
    return function(operation, *as_varying(arrays, axes), *(tuple(as_varying(other, axes)) for other in others))


def is_hashable(x: Any) -> bool:
    """Whether XLA's programs can be kept by it."""
    try:
        hash(x)
    except TypeError:
        return False
    return True


def fits(who: str, selection: Selection, arrays: list[Any], layout: Any) -> None:
    """That a Selection was made for q, k and v, which its arrays alone do not tell."""
    of = check_queries_keys(who, {name: adapter.view(x) for name, x in zip(NEEDS, arrays)}, check_layout(who, layout))
    check_selection(
        who, selection, of, {f"level {i} of selection": adapter.view(x) for i, x in enumerate(selection, 1)}
    )


# --- a Selection in JAX's trees of arrays: as an argument and a result under jit and vmap


jax.tree_util.register_pytree_node(
    Selection,
    lambda selection: (tuple(selection), selection.made_for),
    lambda made_for, arrays: Selection._made(tuple(arrays), *made_for),
)
