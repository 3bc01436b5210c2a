"""The one place that imports numba.cuda: compiling kernels, launching them, and what differs in the simulator.

A kernel is compiled for one signature, in which every array may have any strides, so that one compiled kernel serves
all memory orders. With NUMBA_ENABLE_CUDASIM=1 the same kernels run as plain Python, one Python thread for each thread
of a block: slow, but on any machine. What the simulator lacks (shuffles, votes) is kept out of the kernels.

bfloat16 travels as its 16 bits: Numba's own conversions are calls into another library, a shift is an instruction.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda import libdevice, types
from numba.cuda.core import config

SIMULATED: bool = bool(config.ENABLE_CUDASIM)
"""Whether kernels run in Numba's simulator instead of on a GPU."""

ELEMENT: dict[str, Any] = {
    "int32": types.int32,
    "int64": types.int64,
    "float16": types.float16,
    "bfloat16": types.uint16,
    "float32": types.float32,
    "float64": types.float64,
}
"""Numba's types of elements as they lie in memory, by the names that the rest of the package uses."""


def accumulator(dtype: str) -> str:
    """The type of scores, softmax and all sums: float64 for float64, else float32."""
    return "float64" if dtype == "float64" else "float32"


# --- compiling and launching


def array(dtype: str, axes: int = 4) -> Any:
    """The type of an array argument, with any strides."""
    return types.Array(ELEMENT[dtype], axes, "A")


def compile_kernel(signature: Any, function: Callable[..., None]) -> Any:
    """Compile for the GPU that is here. Tests without one put another compiler in its place."""
    return cuda.jit(signature)(function)


def kernel(*arguments: Any) -> Callable[[Callable[..., None]], Any]:
    """Compile a function as a kernel for these arguments: array types, or names of elements for scalars."""
    signature = types.void(*(ELEMENT[a] if isinstance(a, str) else a for a in arguments))
    return lambda function: compile_kernel(signature, function)


def device_function(function: Callable[..., Any]) -> Any:
    """A function for kernels to call, which becomes part of the kernel that calls it. Such a function does not use
    `cuda` itself: the simulator puts its own `cuda` into a kernel's module alone."""
    return function if SIMULATED else cuda.jit(device=True, forceinline=True)(function)


def launch(kernel: Any, blocks: int, threads: int, stream: Any, *arguments: Any) -> None:
    """Enqueue a kernel on a stream, as a row of blocks; nothing if there are none."""
    if blocks == 0:
        return
    if blocks > MOST_BLOCKS:
        raise ValueError(
            f"numba_cuda: this call needs {blocks:,} thread blocks in one launch; CUDA allows {MOST_BLOCKS:,}. "
            "Call it with fewer batch entries at a time"
        )
    if SIMULATED:
        with warnings.catch_warnings():  # NaN, infinity and overflow in the data are results, not warnings
            warnings.simplefilter("ignore", RuntimeWarning)
            kernel[blocks, threads](*arguments)
    else:
        launch_of(kernel, blocks, threads, stream)(*arguments)


MOST_BLOCKS = 2**31 - 1
_configuring = Lock()


def launch_of(kernel: Any, blocks: int, threads: int, stream: Any) -> Any:
    """A kernel with its grid. Numba would warn here if it does not fill the GPU: small calls are served too."""
    with _configuring:
        warns, config.CUDA_LOW_OCCUPANCY_WARNINGS = config.CUDA_LOW_OCCUPANCY_WARNINGS, 0
        try:
            return kernel[blocks, threads, stream]
        finally:
            config.CUDA_LOW_OCCUPANCY_WARNINGS = warns


# --- arrays and streams


def device_array(x: Any) -> Any:
    """Any framework's device array as one that a kernel takes, without a copy and without waiting for its stream.
    None stays None."""
    if x is None:
        return None
    if SIMULATED:
        return x.view(np.uint16) if x.dtype.name == "bfloat16" else x
    if isinstance(x, cuda.devicearray.DeviceNDArray):
        return x
    interface = {key: value for key, value in x.__cuda_array_interface__.items() if key != "stream"}
    if x.dtype.itemsize == 2:  # a kernel goes by its own signature; this only says how large an element is
        interface["typestr"] = "<u2"
    return cuda.from_cuda_array_interface(interface, owner=x, sync=False)


def to_device(x: Any) -> Any:
    """A copy of a NumPy array on the current device, in C order."""
    # In this machine's byte order, the only one that a kernel knows; and always a copy, as Numba trusts strides even of
    # axes of size 1, where those of a contiguous array may be anything.
    x = x.astype(x.dtype.newbyteorder("="), order="C", copy=True)
    if x.dtype.name != "bfloat16":
        return cuda.to_device(x)
    return with_dtype(cuda.to_device(x.view(np.uint16)), x.dtype)  # NumPy lends nobody the memory of a bfloat16 array


def to_host(x: Any) -> Any:
    """A copy of a Numba array as a NumPy array."""
    if x.dtype.name != "bfloat16":
        return x.copy_to_host()
    return with_dtype(x, np.dtype(np.uint16)).copy_to_host().view(x.dtype)


def with_dtype(x: Any, dtype: Any) -> Any:
    """A Numba array's memory as elements of another type of the same size."""
    if SIMULATED:
        return x.view(dtype)
    return cuda.devicearray.DeviceNDArray(x.shape, x.strides, dtype, stream=x.stream, gpu_data=x.gpu_data)


def swap_axes(x: Any) -> Any:
    """A view of a Numba array with axes 1 and 2 swapped, which Numba's own `transpose` does for matrices alone."""
    if SIMULATED:
        return x.transpose((0, 2, 1, 3))
    shape, strides = ((y[0], y[2], y[1], y[3]) for y in (x.shape, x.strides))
    return cuda.devicearray.DeviceNDArray(shape, strides, x.dtype, stream=x.stream, gpu_data=x.gpu_data)


def device_index(x: Any) -> int:
    """The number of the device on which a Numba array lies."""
    if SIMULATED:
        return 0
    # An array without elements has no memory that would tell: it lies wherever one works.
    nowhere = x.gpu_data is None or x.size == 0
    return int(cuda.get_current_device().id if nowhere else x.gpu_data.context.device.id)


def stream_at(address: int) -> Any:
    """The caller's stream, by its address; the simulator has none."""
    return 0 if SIMULATED or address == 0 else cuda.external_stream(address)


def on_device(name: str) -> AbstractContextManager[Any]:
    """A context in which the device called e.g. "cuda:1" is the current one."""
    return nullcontext() if SIMULATED else cuda.gpus[int(name.partition(":")[2])]


# --- numbers


def _as_it_is(i: Any) -> Any:
    return i


natural: Any = _as_it_is if SIMULATED else types.uint64
"""An index known not to be negative. Numba lets a signed index count from the end of the array, at five instructions
for each access; an unsigned one goes straight to its place."""


def _load_bfloat16(x: Any) -> Any:
    return libdevice.int_as_float(types.int32(types.int32(x) << 16))


def _load_bfloat16_in_simulator(x: Any) -> Any:
    return np.uint32(int(x) << 16).view(np.float32)


def _float_as_int_in_simulator(x: Any) -> int:
    return int(np.float32(x).view(np.int32))


def _double_as_int_in_simulator(x: Any) -> int:
    return int(np.float64(x).view(np.int64))


exp: Any = np.exp if SIMULATED else math.exp
log: Any = np.log if SIMULATED else math.log
"""In the type of their argument. Python's own raise where a result is infinite."""

_float_as_int: Any = _float_as_int_in_simulator if SIMULATED else libdevice.float_as_int
_double_as_int: Any = _double_as_int_in_simulator if SIMULATED else libdevice.double_as_longlong


def _store_bfloat16(value: Any) -> Any:
    """Round to nearest, ties to even, on the bits: a NaN stays one."""
    if value != value:
        return 0x7FC0
    bits = types.int64(_float_as_int(value))
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) & 0xFFFF


def loader(dtype: str) -> Any:
    """A device function: an element of memory -> its value in the accumulation type."""
    if dtype == "bfloat16":
        return _load_bfloat16_in_simulator if SIMULATED else device_function(_load_bfloat16)
    return ELEMENT[accumulator(dtype)]


def storer(dtype: str) -> Any:
    """A device function: a value in the accumulation type -> an element of memory, rounded once."""
    return device_function(_store_bfloat16) if dtype == "bfloat16" else ELEMENT[dtype]


def bits_of(dtype: str) -> Any:
    """A device function: the bits of a float32 or float64 as a signed integer."""
    return _double_as_int if dtype == "float64" else _float_as_int
