"""JAX: arrays and tracers, and the functions by which jit, grad, vmap and shard_map know LLSA.

A call becomes one call of XLA's, which hands a Python callback its own buffers: of the arguments, of the results and of
one workspace. On a GPU the callback enqueues the kernels on XLA's stream, on a CPU it runs the reference. What XLA must
know ahead, the shapes of results and workspace, a plan tells while JAX traces.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.experimental.buffer_callback import buffer_callback
from jax.extend.core import Primitive
from jax.interpreters import mlir
from numpy.typing import NDArray

from llsa_np import functions
from llsa_np.adapters import PIECE, View, common_adapter
from llsa_np.backends import DEVICES
from llsa_np.checks import ORDER, check_devices, check_is_selection, check_queries_keys, check_selection
from llsa_np.hierarchy import hierarchy_of
from llsa_np.options import as_tuple, check_flag, check_layout, check_needs
from llsa_np.plans import MOST_PLANS, AddressPlan, HostPlan, Plan, plan_from
from llsa_np.recording import Recording, leaves
from llsa_np.recording import adapter as stand_ins
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
    kinds: tuple[Any, ...]
    """Types of the options, entry by entry, which are compared first: 1 is not True."""
    options: tuple[tuple[str, Any], ...]

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
        on_host = self.device == "cpu"
        if on_host and isinstance(plan := plan_of(self), HostPlan):
            plan.work([np.asarray(x) for x in (*given, *out)])
            return
        pointers = [pointer(x, on_host) for x in (*given, *out)]  # on the host: kernels of the suite
        stream = 0 if on_host else context.stream
        device = self.device if on_host else f"cuda:{given[0].__dlpack_device__()[1]}"
        lows = tuple([address % PIECE for address in pointers[: len(given)]])
        cast(AddressPlan, plan_of(self._replace(device=device, lows=lows))).enqueue(pointers, stream)


def pointer(buffer: Any, on_host: bool) -> int:
    """Where it begins; 0 if it has no elements."""
    of = np.asarray(buffer).__array_interface__ if on_host else buffer.__cuda_array_interface__
    return 0 if 0 in of["shape"] else of["data"][0]


def stand_in(recording: Recording, shape: tuple[int, ...], dtype: np.dtype[Any], device: str, low: int) -> Any:
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
    return plan_from(adapter, recording, results, stand_ins.view(given[0]))


PLATFORMS = {"cpu": "cpu", "cuda": "cuda:0"}
"""The device that stands for all of a platform."""


def plans_of(operation: Operation, shapes: Any) -> dict[str, Call | Exception]:
    """For every platform the call, or what refuses it, which is told when a program is compiled for that platform.
    Raises it at once if it is so on all."""
    found: dict[str, Call | Exception] = {}
    for platform, device in PLATFORMS.items():
        call = Call(operation, shapes, device, (0,) * len(shapes))
        try:
            plan_of(call)
            found[platform] = call
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            found[platform] = type(error)(*error.args)  # whose frames would keep their callers' arrays alive
    errors = {platform: error for platform, error in found.items() if isinstance(error, Exception)}
    if len(errors) == len(found):
        backend = dict(operation.options)["backend"]
        raise errors[DEVICES.get(backend, "cpu") if isinstance(backend, str) else "cpu"]
    return found


refusal_p = Primitive("llsa_refusal")
refusal_p.multiple_results = True


@refusal_p.def_abstract_eval
def shapes_of_nothing(*_: Any, made: Any, **__: Any) -> Any:
    """As if there were results."""
    return [jax.core.ShapedArray(x.shape, x.dtype) for x in made]


def refuse(*_: Any, error: Exception, **__: Any) -> Any:
    """What compiling for a platform comes to, on which the call cannot be served."""
    raise type(error)(*error.args)


mlir.register_lowering(refusal_p, refuse)


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
        "Put jax.lax.stop_gradient around the arguments of what is differentiated a second time"
    )


@lru_cache(MOST_PLANS)
def mapped(operation: Operation) -> Callable[..., tuple[Any, ...]]:
    """The operation for vmap too: all its arrays have their batch first, which the mapped axis joins."""

    @jax.custom_batching.custom_vmap
    def call(*arrays: Any) -> tuple[Any, ...]:
        calls = plans_of(operation, tuple((x.shape, np.dtype(x.dtype)) for x in arrays))
        any_plan = next(plan_of(x) for x in calls.values() if isinstance(x, Call))
        results = [make() for make in any_plan.makers[: len(leaves(any_plan.results))]]

        def on(call: Call | Exception) -> Callable[..., list[Any]]:
            if isinstance(call, Exception):
                return lambda *given: refusal_p.bind(*given, error=call, made=tuple(results))
            made = [make() for make in plan_of(call).makers]
            return lambda *given: buffer_callback(call, made)(*given)[: len(results)]

        other = NotImplementedError(f"{operation.name}: JAX's arrays are served on the platforms {', '.join(calls)}")
        by_platform = {platform: on(of) for platform, of in calls.items()}
        found = jax.lax.platform_dependent(*arrays, default=on(other), **by_platform)
        return tuple(as_varying(found, axes_of(arrays)))

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


# --- gradients. jit stands outside of what they are defined for, so that a call outside of any program finds its own
# compiled; `__wrapped__` is what stands inside.


@jax.tree_util.register_static
@dataclass(frozen=True)
class Known:
    """What the gradient of `pool` needs: x's shape and element type."""

    shape: tuple[int, ...]
    dtype: Any


def needed_of(*arrays: Any) -> jax.Array:
    """Which gradients are asked for, of q, k and v as `custom_vjp` hands them over: a bit each, in an array's shape.
    The tree in which a gradient's needs lie JAX keeps for all calls of a shape, whichever gradients they ask for."""
    return jnp.zeros((0, sum(2**i for i, x in enumerate(arrays) if x.perturbed)))


def gradients(operation: Operation, kept: Any, cotangents: Any) -> tuple[Any, Any, Any]:
    """dq, dk and dv, each if it is asked for."""
    q, k, v, out, lse, selected, bits = kept
    needs = tuple(name for i, name in enumerate(NEEDS) if bits.shape[1] & 2**i)
    dout, dlse = (None if isinstance(x, SymbolicZero) else x for x in cotangents)
    if not needs or (dout is None and dlse is None):
        return None, None, None
    options = {name: value for name, value in operation.options if name not in ("levels", "topk")}
    options |= {"needs": needs, "has_dlse": dlse is not None}
    arrays = [jnp.zeros_like(out) if dout is None else dout, q, k, v, out, lse, *([] if dlse is None else [dlse])]
    results = iter(run(operation_of("attend_backward", options), *arrays, *selected))
    dq, dk, dv = (next(results) if name in needs else None for name in NEEDS)
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
    return run(operation, x), Known(x.shape, x.dtype)


def pool_gradient(operation: Operation, kept: Known, dlevels: Any) -> tuple[Any]:
    """Every token receives of each level its ancestor's gradient divided by its count."""
    options, shape, dtype = dict(operation.options), kept.shape, kept.dtype
    axis = ORDER[options["layout"]].index("tokens")
    tokens, sums = shape[axis], jnp.float64 if dtype == jnp.float64 else jnp.float32
    total = jnp.zeros(shape, sums)
    for level, d in enumerate(dlevels, 1):
        stride = options["block_size"] ** level
        counts = np.minimum(tokens - np.arange(d.shape[axis]) * stride, stride).reshape(
            *[1] * axis, -1, *[1] * (3 - axis)
        )
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
    """An operation with options as `plain_value` leaves them."""
    kinds = tuple((tuple, *map(type, x)) if isinstance(x, tuple) else type(x) for x in options.values())
    return Operation(name, kinds, tuple(options.items()))


def plain_value(name: str, option: str, value: Any) -> Any:
    """An option's value, as a program may be kept by it: a tuple where it has several entries."""
    entries = as_tuple(value)
    if any(isinstance(x, jax.Array) for x in (value, *(entries or ()))):
        raise TypeError(
            f"{name}: {option} is an array of JAX; options are plain Python values, which the compiled program is made "
            "for. Give a number, or name it in jit's static_argnames"
        )
    return number_of(value) if entries is None else tuple(map(number_of, entries))


def number_of(x: Any) -> Any:
    """The integer in an array without axes; anything else as it is."""
    return x.item() if isinstance(x, np.ndarray) and x.ndim == 0 and x.dtype.kind in "iu" else x


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
    others = dict(bound.arguments)
    values = {array: others.pop(array) for array in arrays}
    there = {array: x for array, x in values.items() if x is not None or array != "dlse"}
    for option, value in others.items():
        if option != "selection":
            others[option] = plain_value(name, option, value)
    if "selection" in others:
        selection = check_is_selection(name, others["selection"])
        there |= {f"level {i} of selection": x for i, x in enumerate(selection, 1)}
    common_adapter(name, there)
    check_devices(name, {array: adapter.view(x) for array, x in there.items()})
    return list(values.values()), others


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
    device = next((device_of(x) for x in flat if device_of(x)), "cpu")
    shapes = tuple((x.shape, np.dtype(x.dtype)) for x in flat)
    call = Call(operation, shapes, device, (0,) * len(flat))
    if not is_hashable(call):
        plan_of.__wrapped__(call)  # tells what is wrong with an option
    elif all(map(device_of, flat)):
        plan_of(call)
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


# --- a Selection in JAX's trees of arrays: as an argument and a result under jit, vmap and shard_map


def selection_from(arrays: tuple[Any, ...], batch: int, heads: int, *others: Any) -> Selection:
    """One of these leaves, which under shard_map have fewer batch entries and heads, or more again."""
    shape = getattr(arrays[0], "shape", ())
    return Selection._made(arrays, *(shape[:2] if len(shape) == 4 else (batch, heads)), *others)


jax.tree_util.register_pytree_node(
    Selection,
    lambda selection: (tuple(selection), selection.made_for),
    lambda made_for, arrays: selection_from(tuple(arrays), *made_for),
)
