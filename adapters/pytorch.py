"""PyTorch: tensors on the CPU and on CUDA devices, and the operators by which autograd, compile and vmap know LLSA.

A call that records no gradient goes straight to the backend, and so does `attention` where eager autograd alone records
one. Any other goes through the operators `llsa::attention`, `llsa::select`, `llsa::attend`, `llsa::attend_backward` and
`llsa::pool`, whose implementation is the same plain function on tensors.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from llsa_np import functions
from llsa_np.adapters import PIECE, DeviceMemory, View
from llsa_np.backends import check_backend
from llsa_np.checks import ORDER, check_queries_keys, check_selection
from llsa_np.hierarchy import Hierarchy, hierarchy_of, levels_of
from llsa_np.options import (
    MAX_LEVELS,
    as_tuple,
    check_attend_options,
    check_block_size,
    check_flag,
    check_integer,
    check_layout,
    check_levels,
    check_needs,
    check_topk,
)
from llsa_np.plans import planned
from llsa_np.selection import Selection, _rebuild

# --- tensors as the backends see them

NUMPY_TYPES = {
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
    torch.int32: np.dtype(np.int32),
    torch.int64: np.dtype(np.int64),
    torch.uint8: np.dtype(np.uint8),
}
TORCH_TYPES = {dtype.name: of_torch for of_torch, dtype in NUMPY_TYPES.items()}
PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
"""Types of tensors that hold numbers of their own; others stand for something else."""


class DeviceArray(DeviceMemory):
    """A CUDA tensor's memory as kernels need it: where it begins, shape, strides in bytes, element type."""

    __slots__ = ("dtype", "owner", "ptr", "shape", "strides")

    def __init__(
        self, tensor: torch.Tensor, dtype: np.dtype[Any], shape: tuple[int, ...], strides: Sequence[int]
    ) -> None:
        self.owner, self.dtype, self.shape = tensor, dtype, shape
        self.ptr = tensor.data_ptr()
        self.strides = tuple([stride * dtype.itemsize for stride in strides])


def host_array(tensor: torch.Tensor) -> NDArray[Any]:
    """A CPU tensor's memory as a NumPy array; bfloat16, which torch does not give to NumPy, by way of int16."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    array: NDArray[Any] = tensor.numpy()
    return array


class OutOfMemoryError(MemoryError, torch.OutOfMemoryError):
    """No memory for results or workspace, as those who know torch expect it and as those who do not."""


@cache
def device_name(device: torch.device) -> str:
    """ "cpu", "cuda:0", ..."""
    return str(device)


class TorchAdapter:
    """Dense tensors on the CPU or a CUDA device, with any strides; new ones come from torch's allocator."""

    name = "PyTorch"

    def owns(self, array: Any) -> bool:
        return (
            isinstance(array, torch.Tensor)
            and array.layout is torch.strided
            and not array.is_nested
            and not array.is_quantized
            and not array.is_conj()
            and not array.is_neg()
        )

    def view(self, array: torch.Tensor, layout: str = "bhnd") -> View:
        shape, device, dtype = tuple(array.shape), array.device, NUMPY_TYPES.get(array.dtype)
        if dtype is None:
            return View(shape, str(array.dtype).removeprefix("torch."), device_name(device), array)
        if is_functorch_wrapped_tensor(array):  # stands for others; only `merge` looks at one, and not at its memory
            return View(shape, dtype.name, device_name(device), array)
        swapped = layout == "bnhd" and len(shape) == 4
        data: Any
        if device.type == "cpu":
            data = host_array(array)
            data = data.swapaxes(1, 2) if swapped else data
        elif swapped:
            b, n, h, d = shape
            b_stride, n_stride, h_stride, d_stride = array.stride()
            data = DeviceArray(array, dtype, (b, h, n, d), (b_stride, h_stride, n_stride, d_stride))
        else:
            data = DeviceArray(array, dtype, shape, array.stride())
        return View(shape, dtype.name, device_name(device), data)

    def empty(self, shape: tuple[int, ...], dtype: Any, like: View, layout: str = "bhnd") -> tuple[torch.Tensor, View]:
        if layout == "bnhd":
            shape = (shape[0], shape[2], shape[1], *shape[3:])
        array = self.maker(shape, np.dtype(like.array.dtype if dtype is None else dtype), like)()
        return array, self.view(array, layout)

    def maker(self, shape: tuple[int, ...], dtype: np.dtype[Any], like: View) -> Callable[[], torch.Tensor]:
        of_torch, device = TORCH_TYPES[dtype.name], torch.device(like.device)
        strides = [math.prod(max(n, 1) for n in shape[axis + 1 :]) for axis in range(len(shape))]

        def make() -> torch.Tensor:
            try:  # 2.3 us of a host, where `torch.empty` takes 6.0
                return torch.empty_strided(shape, strides, dtype=of_torch, device=device)
            except RuntimeError as error:
                # On a CPU torch has no type for it
                told = ("allocat", "out of memory", "Storage size calculation overflowed")
                if not any(words in str(error) for words in told):
                    raise
                size = math.prod(shape) * of_torch.itemsize
                raise OutOfMemoryError(f"{device} has no memory left for {size:,} bytes") from error

        return make

    def key(self, array: torch.Tensor) -> tuple[Any, ...] | None:
        if array.layout is not torch.strided:
            return None
        place = array.device, array.stride(), array.data_ptr() % PIECE
        return array.dtype, array.shape, *place, array.is_neg()

    def pointer(self, array: torch.Tensor) -> int:
        return array.data_ptr()

    def stream(self, like: View) -> int:
        if like.device == "cpu":
            return 0
        # As PyTorch's own compiled code asks: 0.1 us of a host, where `torch.cuda.current_stream` takes 3.7
        address: int = torch._C._cuda_getCurrentRawStream(int(like.device.removeprefix("cuda:")))
        return address

    def namespace(self, array: torch.Tensor) -> Any:
        try:
            import array_api_compat.torch as namespace
        except ModuleNotFoundError as error:
            raise RuntimeError(
                "merge: tensors need array-api-compat, which is not installed (pip install 'llsa-np[torch]')"
            ) from error
        return namespace

    def to_numpy(self, array: torch.Tensor) -> NDArray[Any]:
        return host_array(array.detach().cpu())


adapter = TorchAdapter()

# --- operators: what a call is to PyTorch

OF_SELECT = "int block_size, int? levels, int[] topk, bool per_level"
OF_SELECTION = "SymInt query_tokens, SymInt key_tokens, int block_size"
AS_GIVEN = (-1, -1)
"""Its tokens are q's and k's: what is known by who made it, or was checked."""
OF_ATTEND = "int[]? enrich, bool reweight, float? scale, str layout, str backend, str precision"
SCHEMAS = {
    "attention": f"(Tensor q, Tensor k, Tensor v, {OF_SELECT}, {OF_ATTEND}) -> (Tensor, Tensor, Tensor[])",
    "select": f"(Tensor q, Tensor k, {OF_SELECT}, str layout, str backend) -> Tensor[]",
    "attend": f"(Tensor q, Tensor k, Tensor v, Tensor[] selected, {OF_SELECTION}, {OF_ATTEND}) -> (Tensor, Tensor)",
    "attend_backward": "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor[] selected, "
    f"Tensor? dlse, bool[] needs, {OF_SELECTION}, {OF_ATTEND}) -> (Tensor, Tensor, Tensor)",
    "pool": "(Tensor x, int block_size, int levels, str layout, str backend) -> Tensor[]",
}
library = torch.library.Library("llsa", "DEF")
for name, schema in SCHEMAS.items():
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
ops = torch.ops.llsa
NEEDS = ("q", "k", "v")


def implements(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function the operator of this name, on both kinds of device."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for key in ("CPU", "CUDA"):
            library.impl(name, function, key)
        return function

    return register


def attending(options: Sequence[Any]) -> dict[str, Any]:
    """The options of OF_ATTEND by name."""
    names = ("enrich", "reweight", "scale", "layout", "backend", "precision")
    return dict(zip(names, options, strict=True))


def plain_topk(topk: Sequence[int], per_level: bool) -> Any:
    """As the public functions take it."""
    return tuple(topk) if per_level else topk[0]


def selection_of(
    selected: Sequence[Any], tokens: tuple[int, int], block_size: int, q: Any, k: Any, layout: str
) -> Selection:
    """The Selection that these tensors are. tokens: how many queries and keys it was made for, or AS_GIVEN."""
    batch, heads, *_ = selected[0].shape
    if tokens == AS_GIVEN:
        tokens = axes(q, layout)[2], axes(k, layout)[2]
    # A compiler warns of the one that remembers
    of = Hierarchy if torch.compiler.is_compiling() else hierarchy_of
    hierarchies = [of(n, block_size, len(selected)) for n in tokens]
    return Selection._made(tuple(selected), batch, heads, tuple(x.shape[3] for x in selected), *hierarchies)


@implements("attention")
def run_attention(
    q: Any, k: Any, v: Any, block_size: int, levels: Any, topk: Any, per_level: bool, *options: Any
) -> Any:
    """out, lse and the selected tokens of every level."""
    out, lse, *selected = attend_selected(
        q, k, v, block_size=block_size, levels=levels, topk=plain_topk(topk, per_level), **attending(options)
    )
    return out, lse, selected


@implements("select")
def run_select(
    q: Any, k: Any, block_size: int, levels: Any, topk: Any, per_level: bool, layout: Any, backend: Any
) -> list[torch.Tensor]:
    """The selected tokens of every level."""
    topk = plain_topk(topk, per_level)
    return list(plain("select")(q, k, block_size=block_size, levels=levels, topk=topk, layout=layout, backend=backend))


@implements("attend")
def run_attend(q: Any, k: Any, v: Any, selected: Any, queries: int, keys: int, block_size: int, *options: Any) -> Any:
    """out and lse."""
    named = attending(options)
    selection = selection_of(selected, (queries, keys), block_size, q, k, named["layout"])
    return plain("attend")(q, k, v, selection, **named)


@implements("attend_backward")
def run_attend_backward(
    dout: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    selected: Any,
    dlse: Any,
    needs: Any,
    queries: int,
    keys: int,
    block_size: int,
    *options: Any,
) -> Any:
    """dq, dk and dv; a tensor without elements for one that is not needed."""
    named = attending(options)
    selection = selection_of(selected, (queries, keys), block_size, q, k, named["layout"])
    needed = tuple(name for name, is_needed in zip(NEEDS, needs) if is_needed)
    gradients = plain("attend_backward")(dout, q, k, v, out, lse, selection, dlse=dlse, needs=needed, **named)
    return tuple(q.new_empty(0) if x is None else x for x in gradients)


@implements("pool")
def run_pool(x: Any, block_size: int, levels: int, layout: Any, backend: Any) -> list[torch.Tensor]:
    """Levels 1..levels."""
    return list(plain("pool")(x, block_size=block_size, levels=levels, layout=layout, backend=backend))


attend_selected = planned(functions.attend_selected, "attention")


def plain(name: str) -> Callable[..., Any]:
    """The public function of this name without what frameworks wrap around it."""
    function: Callable[..., Any] = getattr(functions, name).plain
    return function


# --- the same on tensors without memory: shapes, dtypes and strides of the results, for compile and export


def lengths(tokens: Any, block_size: int, levels: int) -> list[Any]:
    """Of levels 1..levels."""
    return [(tokens + block_size**level - 1) // block_size**level for level in range(1, levels + 1)]


def axes(x: Any, layout: str) -> tuple[Any, Any, Any, Any]:
    """Batch, heads, tokens, dim."""
    if x.ndim != 4:
        raise ValueError(f"llsa: got a tensor of shape {tuple(x.shape)}; it has four axes ({', '.join(ORDER[layout])})")
    batch, one, other, dim = x.shape
    return (batch, one, other, dim) if layout == "bhnd" else (batch, other, one, dim)


def fake_selected(q: Any, k: Any, block_size: int, levels: Any, topk: Any, per_level: bool, layout: str) -> list[Any]:
    """S_1 .. S_L."""
    batch, heads, queries, _ = axes(q, layout)
    levels = levels_of(axes(k, layout)[2], block_size) if levels is None else levels
    kept = topk if per_level else list(topk) * levels
    rows = lengths(queries, block_size, levels)
    return [q.new_empty((batch, heads, n, kept_here), dtype=torch.int32) for n, kept_here in zip(rows, kept)]


def fake_results(q: Any, v: Any, layout: str) -> tuple[Any, Any]:
    """out and lse."""
    batch, heads, queries, _ = axes(q, layout)
    lse = q.new_empty((batch, heads, queries), dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    shape = (batch, heads, queries, v.shape[3]) if layout == "bhnd" else (batch, queries, heads, v.shape[3])
    return q.new_empty(shape), lse


@torch.library.register_fake("llsa::attention", lib=library)
def _(q: Any, k: Any, v: Any, block_size: Any, levels: Any, topk: Any, per_level: Any, *options: Any) -> Any:
    layout = attending(options)["layout"]
    return *fake_results(q, v, layout), fake_selected(q, k, block_size, levels, topk, per_level, layout)


@torch.library.register_fake("llsa::select", lib=library)
def _(q: Any, k: Any, block_size: Any, levels: Any, topk: Any, per_level: Any, layout: Any, backend: Any) -> Any:
    return fake_selected(q, k, block_size, levels, topk, per_level, layout)


@torch.library.register_fake("llsa::attend", lib=library)
def _(q: Any, k: Any, v: Any, selected: Any, queries: Any, keys: Any, block_size: Any, *options: Any) -> Any:
    return fake_results(q, v, attending(options)["layout"])


@torch.library.register_fake("llsa::attend_backward", lib=library)
def _(dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, selected: Any, dlse: Any, needs: Any, *_: Any) -> Any:
    return tuple(x.new_empty(x.shape if is_needed else (0,)) for x, is_needed in zip((q, k, v), needs))


@torch.library.register_fake("llsa::pool", lib=library)
def _(x: Any, block_size: Any, levels: Any, layout: Any, backend: Any) -> Any:
    batch, heads, tokens, dim = axes(x, layout)
    rows = lengths(tokens, block_size, levels)
    return [x.new_empty((batch, heads, n, dim) if layout == "bhnd" else (batch, n, heads, dim)) for n in rows]


# --- under vmap: the mapped axis joins the batch


def batched(name: str) -> None:
    """Lets vmap map an operator, whose tensors all have their batch first."""
    op = getattr(ops, name)

    def rule(info: Any, in_dims: Any, *arguments: Any) -> Any:
        size = info.batch_size

        def join(x: Any, dim: Any) -> Any:
            if isinstance(x, (list, tuple)) and any(isinstance(y, torch.Tensor) for y in x):
                return [join(y, of) for y, of in zip(x, dim)]
            if not isinstance(x, torch.Tensor):
                return x
            x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            return x.flatten(0, 1)

        first, dim = next((x, dim) for x, dim in zip(arguments, in_dims) if isinstance(x, torch.Tensor))
        batch = first.shape[0 if dim is None or dim > 0 else 1]
        results = op(*(join(x, dim) for x, dim in zip(arguments, in_dims)))

        def part(x: Any) -> Any:
            if isinstance(x, (list, tuple)):
                return type(x)(map(part, x))
            # A gradient that is not needed has no elements, and no batch
            return x.expand(size, 0) if x.ndim == 1 else x.unflatten(0, (size, batch))

        def zeros(x: Any) -> Any:
            return type(x)(map(zeros, x)) if isinstance(x, (list, tuple)) else 0

        parts = part(results)
        return parts, zeros(parts)

    torch.library.register_vmap(f"llsa::{name}", rule, lib=library)


for name in SCHEMAS:
    batched(name)

# --- gradients


def save_attention(ctx: Any, inputs: Any, output: Any) -> None:
    """Keeps what the gradients of `attention` need."""
    q, k, v, block_size, *_ = inputs
    out, lse, selected = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, lse, *selected)
    ctx.options = (*AS_GIVEN, block_size, *inputs[7:])
    ctx.of_others = no_gradients(inputs[3:])


def save_attend(ctx: Any, inputs: Any, output: Any) -> None:
    """Keeps what the gradients of `attend` need."""
    q, k, v, selected, *options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, *selected)
    ctx.options = tuple(options)
    ctx.of_others = [[None] * len(selected), *no_gradients(options)]


def no_gradients(options: Any) -> list[Any]:
    """As PyTorch wants them of options. It takes an empty list (enrich = ()) for one of no tensors."""
    return [[] if option == [] else None for option in options]


def gradients(ctx: Any, dout: Any, dlse: Any) -> tuple[Any, Any, Any]:
    """dq, dk and dv, each if it is asked for."""
    q, k, v, out, lse, *selected = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    if not any(needs) or (dout is None and dlse is None):
        return None, None, None
    dout = torch.zeros_like(out) if dout is None else dout
    given = [dout] if dlse is None else [dout, dlse]
    if goes_straight(q, k, v, out, lse, *selected, *given) and not any(map(is_legacy_batchedtensor, given)):
        dout, dlse = dout.resolve_neg(), None if dlse is None else dlse.resolve_neg()
        of = run_attend_backward(dout, q, k, v, out, lse, selected, dlse, needs, *ctx.options)
    else:
        of = AttendBackward.apply(dout, q, k, v, out, lse, dlse, (needs, *ctx.options), *selected)
    dq, dk, dv = (x if is_needed else None for x, is_needed in zip(of, needs))
    return dq, dk, dv


def pool_gradient(ctx: Any, dlevels: Any) -> Any:
    """Every token receives of each level its ancestor's gradient divided by its count."""
    block_size, _, layout, _ = ctx.options
    axis = ORDER[layout].index("tokens")
    total = None
    for level, d in enumerate(dlevels, 1):
        if d is None:
            continue
        stride = block_size**level
        starts = torch.arange(d.shape[axis], device=d.device) * stride
        counts = (ctx.tokens - starts).clamp(max=stride).reshape(-1, *[1] * (3 - axis))
        part = (d.to(ctx.sums) / counts).repeat_interleave(min(stride, ctx.tokens), axis).narrow(axis, 0, ctx.tokens)
        total = part if total is None else total + part
    return None if total is None else total.to(ctx.dtype)


def save_pool(ctx: Any, inputs: Any, output: Any) -> None:
    """Keeps what the gradient of `pool` needs: sizes alone."""
    x, *options = inputs
    ctx.set_materialize_grads(False)
    ctx.options = tuple(options)
    ctx.tokens, ctx.dtype = x.shape[ORDER[options[2]].index("tokens")], x.dtype
    ctx.sums = torch.float64 if x.dtype == torch.float64 else torch.float32


def no_second_gradient(ctx: Any, *_: Any) -> Any:
    """What differentiating a gradient comes to."""
    raise NotImplementedError(
        "llsa: gradients of gradients are not implemented; attend_backward itself is not differentiable. "
        "Detach what is differentiated a second time"
    )


# Autograd's own record of the operators is for compile; eager calls have the functions below.
torch.library.register_autograd(
    "llsa::attention",
    lambda ctx, dout, dlse, _: (*gradients(ctx, dout, dlse), *ctx.of_others),
    setup_context=save_attention,
    lib=library,
)
torch.library.register_autograd(
    "llsa::attend",
    lambda ctx, dout, dlse: (*gradients(ctx, dout, dlse), *ctx.of_others),
    setup_context=save_attend,
    lib=library,
)
torch.library.register_autograd("llsa::attend_backward", no_second_gradient, lib=library)
torch.library.register_autograd(
    "llsa::pool",
    lambda ctx, dlevels: (pool_gradient(ctx, dlevels), *[None] * 4),
    setup_context=save_pool,
    lib=library,
)


class ReverseOnly(torch.autograd.Function):
    """An operator for torch.func, whose transformations operators with gradients of their own do not follow: mapped by
    the operators' own rules, and without forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        return no_forward_mode()


class EagerAttention(torch.autograd.Function):
    """`attention` where nothing but gradients is recorded: without the dispatcher, and without what torch.func asks of
    a Function."""

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, options: dict[str, Any]) -> Any:
        out, lse, *selected = attend_selected(q, k, v, **options)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse, *selected)
        ctx.given = options
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any) -> Any:
        of = PARAMETERS["attention"][1] | ctx.given
        scale = None if of["scale"] is None else float(of["scale"])
        options = (of["enrich"], bool(of["reweight"]), scale, of["layout"], of["backend"], of["precision"])
        ctx.options = (*AS_GIVEN, int(of["block_size"]), *options)
        return *gradients(ctx, dout, dlse), None


class Attention(ReverseOnly):
    """`llsa::attention` under the transformations of torch.func."""

    @staticmethod
    def forward(q: Any, k: Any, v: Any, options: Any) -> Any:
        out, lse, selected = ops.attention(q, k, v, *options)
        return out, lse, *selected

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, v, options = inputs
        out, lse, *selected = output
        ctx.mark_non_differentiable(*selected)
        save_attention(ctx, (q, k, v, *options), (out, lse, selected))

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any, *_: Any) -> Any:
        return *gradients(ctx, dout, dlse), None


class Attend(ReverseOnly):
    """`llsa::attend`."""

    @staticmethod
    def forward(q: Any, k: Any, v: Any, options: Any, *selected: Any) -> Any:
        return tuple(ops.attend(q, k, v, list(selected), *options))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, v, options, *selected = inputs
        save_attend(ctx, (q, k, v, selected, *options), output)

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any) -> Any:
        selected = len(ctx.needs_input_grad) - 4
        return *gradients(ctx, dout, dlse), None, *[None] * selected


class AttendBackward(ReverseOnly):
    """`llsa::attend_backward`, since torch.func records whatever a gradient does."""

    @staticmethod
    def forward(dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, dlse: Any, options: Any, *selected: Any) -> Any:
        needs, *others = options
        return tuple(ops.attend_backward(dout, q, k, v, out, lse, list(selected), dlse, needs, *others))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return no_second_gradient(ctx)


class Pool(ReverseOnly):
    """`llsa::pool`."""

    @staticmethod
    def forward(x: Any, options: Any) -> Any:
        return tuple(ops.pool(x, *options))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, options = inputs
        save_pool(ctx, (x, *options), output)

    @staticmethod
    def backward(ctx: Any, *dlevels: Any) -> Any:
        return pool_gradient(ctx, dlevels), None


def refuse_forward_mode() -> None:
    """Inside a compiled function, where an operator would drop tangents in silence."""
    if forward_ad._current_level >= 0:
        no_forward_mode()


def no_forward_mode() -> Any:
    """What jvp comes to."""
    raise NotImplementedError(
        "llsa: forward-mode gradients are not implemented; use reverse mode (backward, grad, vjp)"
    )


# --- the public functions on tensors


def parameters(name: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names of the arrays that a public function takes, and its options with their defaults."""
    of = inspect.signature(plain(name)).parameters.values()
    arrays = tuple(p.name for p in of if p.kind is not p.KEYWORD_ONLY)
    return arrays, {p.name: p.default for p in of if p.kind is p.KEYWORD_ONLY}


PARAMETERS = {name: parameters(name) for name in SCHEMAS}


def arguments(name: str, given: tuple[Any, ...], options: dict[str, Any]) -> tuple[list[Any], dict[str, Any]] | None:
    """The arrays in order, and all options; None for a call whose arguments are not what the function takes."""
    arrays, defaults = PARAMETERS[name]
    by_name = dict(zip(arrays, given)) | options
    twice = set(arrays[: len(given)]) & set(options)
    if twice or len(given) > len(arrays) or set(by_name) - set(arrays) - set(defaults) or set(arrays) - set(by_name):
        return None
    values = [by_name[of] for of in arrays]
    if not all(is_tensors(x) for x in values) or not (by_name.get("dlse") is None or is_tensors(by_name["dlse"])):
        return None
    if not torch.compiler.is_compiling() and not all(map(may_be_traced, values)):
        return None
    return values, {of: by_name.get(of, default) for of, default in defaults.items()}


def is_tensors(x: Any) -> bool:
    """Whether this is a tensor, or a Selection of tensors."""
    return isinstance(x, torch.Tensor) or (isinstance(x, Selection) and isinstance(x[1], torch.Tensor))


def may_be_traced(x: Any) -> bool:
    """Whether this is a Selection, a tensor that backends read, or one that stands for such."""
    if isinstance(x, Selection):
        return True
    return adapter.owns(x) if type(x) in PLAIN else not x.is_nested


def goes_straight(*tensors: torch.Tensor) -> bool:
    """Whether nothing but the numbers matters: no gradient is recorded, nothing is traced or mapped."""
    return is_eager(*tensors) and not need_gradients(*tensors)


def is_eager(*tensors: Any) -> bool:
    """Whether these are tensors with numbers of their own, and nothing is traced, mapped or differentiated forward."""
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return False
    if torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._len_torch_function_stack():  # where tracing before dispatch has its own too
        return False
    return PLAIN.issuperset(map(type, tensors))


def need_gradients(*tensors: torch.Tensor) -> bool:
    """Whether a gradient is recorded for any of these."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def is_cast(x: torch.Tensor) -> bool:
    """Whether autocast is on where this tensor is."""
    if not torch._C._is_any_autocast_enabled():
        return False
    kind = x.device.type
    return kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)


def cast(*tensors: Any) -> list[Any]:
    """The tensors in autocast's dtype, where it is on; float64 stays, as torch's own operators have it."""
    if not is_cast(tensors[0]):
        return list(tensors)
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return [x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors]


def select_options(who: str, of: dict[str, Any]) -> list[Any]:
    """The options of OF_SELECT."""
    block_size = check_block_size(who, of["block_size"])
    levels = None if of["levels"] is None else check_levels(who, of["levels"], block_size)
    topk = as_tuple(of["topk"])
    per_level = topk is not None
    entries = levels or (1 if topk is None else len(topk))
    if levels is None:
        check_levels(who, 1, block_size)
    checked = list(check_topk(who, topk if per_level else of["topk"], entries))
    return [block_size, levels, checked if per_level else checked[:1], per_level]


def selection_options(selection: Selection) -> tuple[int, int, int]:
    """The options of OF_SELECTION. A compiler leaves it to the operator to compare the tokens with q's and k's."""
    tokens = (selection.query_tokens, selection.key_tokens) if torch.compiler.is_compiling() else AS_GIVEN
    return *tokens, selection.block_size


def backend_of(who: str, of: dict[str, Any]) -> Any:
    """The backend's name; under a compiler, which does not read through the search for it, the operator checks it."""
    return of["backend"] if torch.compiler.is_compiling() else check_backend(who, of["backend"])


def attend_options(who: str, of: dict[str, Any], levels: int | None, dim: int) -> list[Any]:
    """The options of OF_ATTEND."""
    options = check_attend_options(
        who, of["enrich"], of["reweight"], of["scale"], of["precision"], levels=levels or MAX_LEVELS, dim=dim
    )
    enrich = None if of["enrich"] is None else [level for level in options.levels if level]
    where = [check_layout(who, of["layout"]), backend_of(who, of)]
    return [enrich, options.reweight, None if of["scale"] is None else options.scale, *where, options.precision]


def attention(*arrays: Any, **options: Any) -> Any:
    """`llsa_np.attention` on tensors."""
    if len(arrays) == 3 and is_eager(*arrays) and not is_cast(arrays[0]):
        q, k, v = arrays
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return differentiable_attention(arrays, options)
        return plain("attention")(*arrays, **options)
    given = arguments("attention", arrays, options)
    if given is None:
        return plain("attention")(*arrays, **options)
    (q, k, v), of = given
    q, k, v = cast(q, k, v)
    if goes_straight(q, k, v):
        return plain("attention")(q, k, v, **of)
    check_shapes("attention", of["layout"], q=q, k=k, v=v)
    selecting = select_options("attention", of)
    return_lse = check_flag("attention", "return_lse", of["return_lse"])
    levels = selecting[1]
    if levels is None and not torch.compiler.is_compiling():
        levels = levels_of(k.shape[ORDER[of["layout"]].index("tokens")], selecting[0])
    schema = (*selecting, *attend_options("attention", of, levels, q.shape[-1]))
    if torch.compiler.is_compiling():
        refuse_forward_mode()
        out, lse, _ = ops.attention(q, k, v, *schema)
    else:
        out, lse, *_ = Attention.apply(q, k, v, schema)
    return (out, lse) if return_lse else out


def differentiable_attention(arrays: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """A call that nothing but autograd looks at, in the fewest steps; what it is given is checked on the way."""
    if not options.keys() <= PARAMETERS["attention"][1].keys():  # the plain function tells which option there is not
        return plain("attention")(*arrays, **options)
    return_lse = check_flag("attention", "return_lse", options.pop("return_lse", False))
    enrich = as_tuple(options.get("enrich"))
    if enrich is not None:  # for the gradients a second time
        options["enrich"] = enrich
    out, lse = EagerAttention.apply(*arrays, options)
    return (out, lse) if return_lse else out


def select(*arrays: Any, **options: Any) -> Selection:
    """`llsa_np.select` on tensors. No gradient flows through it."""
    given = arguments("select", arrays, options)
    if given is None:
        return plain("select")(*arrays, **options)
    (q, k), of = given
    q, k = (x.detach() for x in cast(q, k))
    if goes_straight(q, k):
        return plain("select")(q, k, **of)
    check_shapes("select", of["layout"], q=q, k=k)
    selecting = select_options("select", of)
    layout = check_layout("select", of["layout"])
    selected = ops.select(q, k, *selecting, layout, backend_of("select", of))
    return selection_of(selected, AS_GIVEN, selecting[0], q, k, layout)


def attend(*arrays: Any, **options: Any) -> Any:
    """`llsa_np.attend` on tensors."""
    given = arguments("attend", arrays, options)
    if given is None or not isinstance(given[0][3], Selection):
        return plain("attend")(*arrays, **options)
    (q, k, v, selection), of = given
    q, k, v = cast(q, k, v)
    if goes_straight(q, k, v, *selection):
        return plain("attend")(q, k, v, selection, **of)
    check_shapes("attend", of["layout"], selection, q=q, k=k, v=v)
    schema = (*selection_options(selection), *attend_options("attend", of, selection.levels, q.shape[-1]))
    if torch.compiler.is_compiling():
        refuse_forward_mode()
        return ops.attend(q, k, v, list(selection), *schema)
    return Attend.apply(q, k, v, schema, *selection)


def attend_backward(*arrays: Any, **options: Any) -> Any:
    """`llsa_np.attend_backward` on tensors."""
    given = arguments("attend_backward", arrays, options)
    if given is None or not isinstance(given[0][6], Selection):
        return plain("attend_backward")(*arrays, **options)
    (dout, q, k, v, out, lse, selection), of = given
    dout, q, k, v, out = cast(dout, q, k, v, out)
    dlse = [] if of["dlse"] is None else [of["dlse"]]
    if goes_straight(dout, q, k, v, out, lse, *selection, *dlse):
        return plain("attend_backward")(dout, q, k, v, out, lse, selection, **of)
    needed = check_needs("attend_backward", of["needs"])
    check_shapes("attend_backward", of["layout"], selection, q=q, k=k, v=v)
    levels, dim = selection.levels, q.shape[-1]
    schema = (*selection_options(selection), *attend_options("attend_backward", of, levels, dim))
    needs = [name in needed for name in NEEDS]
    if torch.compiler.is_compiling():
        refuse_forward_mode()
        results = ops.attend_backward(dout, q, k, v, out, lse, list(selection), of["dlse"], needs, *schema)
    else:
        results = AttendBackward.apply(dout, q, k, v, out, lse, of["dlse"], (needs, *schema), *selection)
    return tuple(x if is_needed else None for x, is_needed in zip(results, needs))


def pool(*arrays: Any, **options: Any) -> tuple[torch.Tensor, ...]:
    """`llsa_np.pool` on tensors."""
    given = arguments("pool", arrays, options)
    if given is None or goes_straight(*given[0]):
        return plain("pool")(*arrays, **options)
    (x,), of = given
    block_size = check_block_size("pool", of["block_size"])
    levels = check_levels("pool", of["levels"], block_size)
    schema = (block_size, levels, check_layout("pool", of["layout"]), backend_of("pool", of))
    if torch.compiler.is_compiling():
        refuse_forward_mode()
        return tuple(ops.pool(x, *schema))
    return Pool.apply(x, schema)


def check_shapes(who: str, layout: Any, selection: Selection | None = None, **arrays: Any) -> None:
    """That q, k and v fit together, and that a Selection was made for them, which its tensors alone do not tell. A
    compiler leaves it to the operator."""
    if torch.compiler.is_compiling():
        return

    def shape_of(x: torch.Tensor) -> View:
        return View(tuple(x.shape), str(x.dtype).removeprefix("torch."), "", None)

    views = {name: shape_of(x) for name, x in arrays.items()}
    of = check_queries_keys(who, views, check_layout(who, layout))
    if selection is not None:
        check_selection(
            who, selection, of, {f"level {i} of selection": shape_of(x) for i, x in enumerate(selection, 1)}
        )


# --- for models


class LLSASelfAttention(torch.nn.Module):
    """Self-attention of a transformer block: project, normalise q and k, attend log-linearly, project back.

    out = W_o attention(norm(W_q x), norm(W_k x), W_v x) + b_o, norm the root-mean-square over each head's dims, with a
    weight, as in arXiv 2512.16615.

    dim: of the tokens. heads: a divisor of dim. kv_heads: a divisor of heads, None for as many. block_size, topk,
    levels, enrich, reweight, scale, backend, precision: as in `llsa_np.attention`. qk_norm: whether q and k are
    normalised. bias: of the projections.
    forward: x (batch, tokens, dim) -> (batch, tokens, dim), in x's dtype, or autocast's. For images, order the tokens
    by `llsa_np.zorder` first. Raises ValueError for sizes that do not divide, and as `llsa_np.attention`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        qk_norm: bool = True,
        bias: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        who = "LLSASelfAttention"
        dim, heads = check_integer(who, "dim", dim, 1, None), check_integer(who, "heads", heads, 1, None)
        kv_heads = heads if kv_heads is None else check_integer(who, "kv_heads", kv_heads, 1, None)
        for name, whole, part in (("dim", dim, heads), ("heads", heads, kv_heads)):
            if whole % part:
                raise ValueError(f"LLSASelfAttention: {name} is {whole}, which {part} does not divide")
        unknown = set(options) - set(PARAMETERS["attention"][1]) | set(options) & {"layout", "return_lse"}
        if unknown:
            raise TypeError(f"LLSASelfAttention: got {', '.join(sorted(unknown))}; options are those of attention")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        enrich = as_tuple(options.get("enrich"))
        if enrich is not None:  # of what can be had only once, too
            options["enrich"] = enrich
        of = PARAMETERS["attention"][1] | options
        block_size, levels, topk, per_level = select_options(who, of)  # plain integers, whatever was given
        attend_options(who, of, levels, self.head_dim)
        checked = {"block_size": block_size, "levels": levels, "topk": plain_topk(topk, per_level)}
        self.options = {name: checked.get(name, value) for name, value in options.items()}
        self.qkv = torch.nn.Linear(dim, (heads + 2 * kv_heads) * self.head_dim, bias=bias)
        self.q_norm, self.k_norm = (
            torch.nn.RMSNorm(self.head_dim) if qk_norm else torch.nn.Identity() for _ in range(2)
        )
        self.out = torch.nn.Linear(dim, dim, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, dim) -> the same."""
        heads = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.head_dim)).split(heads, dim=-2)  # views, which need no copy
        if isinstance(self.q_norm, torch.nn.RMSNorm):  # in the weights' dtype, which under autocast is not q's
            q, k = (norm(y.to(norm.weight.dtype)).to(v.dtype) for norm, y in ((self.q_norm, q), (self.k_norm, k)))
        return self.out(attention(q, k, v, layout="bnhd", **self.options).flatten(-2))

    def extra_repr(self) -> str:
        """What `print` shows of it."""
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        return f"heads={self.heads}, kv_heads={self.kv_heads}{options}"


def sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    **options: Any,
) -> torch.Tensor:
    """`llsa_np.attention` with the call shape of `torch.nn.functional.scaled_dot_product_attention`.

    query: (batch, heads, M, D). key: (batch, kv_heads, N, D). value: (batch, kv_heads, N, Dv); kv_heads may differ from
    heads with enable_gqa. options: of `llsa_np.attention`. Returns (batch, heads, M, Dv).
    Raises NotImplementedError for a mask, dropout or causal attention, and otherwise as `llsa_np.attention`.
    """
    for given, words in (
        (
            attn_mask is not None,
            "attn_mask: a query attends to whole blocks that it selects by their means, so that a mask "
            "of single keys cannot be kept; drop keys before the call, or use dense attention",
        ),
        (dropout_p != 0, "dropout_p: weights are never held, so that none can be dropped; drop outputs instead"),
        (is_causal, "is_causal: means of blocks hold keys that lie in a query's future; use dense attention"),
    ):
        if given:
            raise NotImplementedError(f"sdpa: cannot honour {words}")
    if options.get("layout", "bhnd") != "bhnd":
        raise ValueError(
            f"sdpa: layout is {options['layout']!r}; allowed is 'bhnd', as torch's own has it. Use llsa_np.attention"
        )
    if not enable_gqa and query.ndim == key.ndim == 4 and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"sdpa: query has {query.shape[1]} heads and key {key.shape[1]}; allowed only with enable_gqa=True"
        )
    result: torch.Tensor = attention(query, key, value, scale=scale, **options)
    return result


# --- a Selection in torch's trees of tensors: as an argument and a result under compile and checkpoint


def _flatten(selection: Selection) -> tuple[list[Any], Any]:
    return list(selection), selection.made_for


def _unflatten(arrays: Any, made_for: Any) -> Selection:
    return Selection._made(tuple(arrays), *made_for)


def _flatten_with_keys(selection: Selection) -> tuple[list[Any], Any]:
    arrays, made_for = _flatten(selection)
    return [(pytree.SequenceKey(level), array) for level, array in enumerate(arrays, 1)], made_for


def _to_file(made_for: Any) -> Any:
    batch, heads, topk, queries, keys = made_for
    return [batch, heads, list(topk), queries.tokens, keys.tokens, keys.block_size, keys.levels]


def _from_file(told: Any) -> Any:
    batch, heads, topk, *tokens, block_size, levels = told
    return batch, heads, tuple(topk), *(hierarchy_of(n, block_size, levels) for n in tokens)


torch.serialization.add_safe_globals([_rebuild])  # what unpickling one calls: it makes one and no more
pytree.register_pytree_node(
    Selection,
    _flatten,
    _unflatten,
    serialized_type_name="llsa_np.Selection",
    flatten_with_keys_fn=_flatten_with_keys,
    to_dumpable_context=_to_file,
    from_dumpable_context=_from_file,
)
