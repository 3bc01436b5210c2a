"""Compiling a kernel with NVRTC, keeping what was compiled, recording launches and running them through CuPy.

One path with and without a GPU: `cuda.core.Program` compiles to machine code for a named architecture, a cache on disk
keeps that code, and `cupy.cuda.Module` loads it. LLSA_CACHE_DIR moves the cache.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from struct import Struct, calcsize
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from llsa_np.backends import EXTRA, NEWER_DRIVER, cuda_version, driver_cuda

FOLDER = Path(__file__).parent
CACHE_BYTES = 2**30
DIGEST_BYTES = 32
NVRTC = "nvidia-cuda-nvrtc, of CUDA 12 nvidia-cuda-nvrtc-cu12"
BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
MOST_STRIDE = 2**29
"""Of tokens, in elements: in bytes it fits 32 bits."""


class Kernel(NamedTuple):
    """A kernel of one specialisation."""

    source: str
    """The .cu file."""
    name: str
    defines: tuple[tuple[str, str], ...]
    threads: int
    shared_bytes: int = 0
    """Dynamic shared memory of a block."""


# --- arguments: a struct by value, packed as C lays it out

ARRAY = "Q4q"
"""`Array` of numbers.cuh, for `struct.pack`. Q is a pointer, here as everywhere."""
WORD = 8
"""Bytes of a pointer, at multiples of which they lie in a struct."""
NO_ARRAY = (0, 0, 0, 0, 0)


Packed = tuple[int, ...]
"""The values of an ARRAY."""


def array(x: Any) -> Packed:
    """Where an array begins, and its strides in elements; of an axis of size 1 none, whatever the array says."""
    size = x.dtype.itemsize
    return (x.ptr, *[0 if n <= 1 else stride // size for n, stride in zip(x.shape, x.strides)])


def is_whole(dtype: str, *arrays: Packed) -> bool:
    """Whether the rows of all arrays of four axes can be moved 16 bytes at a time."""
    piece = 16 // BYTES[dtype]
    for start, batch, head, token, dim in arrays:
        if start % 16 or (batch | head | token) % piece or dim != 1 or abs(token) >= MOST_STRIDE:
            return False
    return True


# --- compiling


class Compiler(NamedTuple):
    """NVRTC, as it is installed."""

    version: str
    """Of the CUDA that it is of, such as "13.0"."""
    architectures: tuple[str, ...]
    """What it compiles for: "sm_80", ..."""
    headers: str
    """The folder of cuda_bf16.h, which the runtime's wheel brings."""

    def refusal(self, arch: str) -> str:
        """Why it does not compile for an architecture; "" if it does."""
        if arch in self.architectures:
            return ""
        return (
            f"NVRTC {self.version} does not know {arch}, but {', '.join(self.architectures)}; for a newer GPU install "
            f"a newer one (pip install --upgrade {NVRTC})"
        )


@cache
def compiler() -> Compiler:
    """What is installed, or a RuntimeError that says what is missing."""
    from cuda.bindings import nvrtc
    from cuda.pathfinder import DynamicLibNotFoundError, find_nvidia_header_directory, load_nvidia_dynamic_lib

    try:
        load_nvidia_dynamic_lib("nvrtc")
    except DynamicLibNotFoundError as error:
        raise RuntimeError(f"CUDA's compiler NVRTC is not installed {EXTRA}") from error
    except RuntimeError as error:
        raise RuntimeError(
            f"CUDA's compiler NVRTC cannot be loaded: {error}. Install it again (pip install --force-reinstall {NVRTC})"
        ) from error
    headers = find_nvidia_header_directory("cudart")
    if headers is None:
        raise RuntimeError(f"CUDA's headers are not installed {EXTRA}")
    _, major, minor = nvrtc.nvrtcVersion()
    _, numbers = nvrtc.nvrtcGetSupportedArchs()
    return Compiler(f"{major}.{minor}", tuple(f"sm_{number}" for number in numbers), str(headers))


def compile_cubin(kernel: Kernel, arch: str, log: Any = None) -> bytes:
    """Machine code for an architecture such as "sm_90a", from the cache where it is there. log: takes what the
    assembler says of registers and spills; with it, nothing is taken from the cache."""
    from cuda.core import Program, ProgramOptions
    from cuda.core._utils.cuda_utils import CUDAError  # what NVRTC's errors are; cuda.core has no public name for it
    from cuda.core.utils import make_program_cache_key

    arch = arch.rstrip("af")  # no kernel uses what sm_90a has beyond sm_90, and a device is asked for by its number
    code = (FOLDER / kernel.source).read_text()
    options = ProgramOptions(
        arch=arch,
        std="c++17",
        include_path=[str(FOLDER), compiler().headers],
        define_macro=list(kernel.defines),
        device_as_default_execution_space=True,  # NVRTC of CUDA 13.0 wants it for lambdas that are templates
        ptxas_options=["-v"] if log is not None else None,
    )
    key = make_program_cache_key(
        code=code, code_type="c++", options=options, target_type="cubin", extra_digest=headers_digest()
    )
    kept = None if log is not None else kept_cubin(key)
    if kept is not None:
        return kept
    if refusal := compiler().refusal(arch):
        raise RuntimeError(f"cupy_raw: {refusal}")
    try:
        compiled = bytes(Program(code, "c++", options).compile("cubin", logs=log).code)
    except CUDAError as error:
        told = next((line.strip() for line in str(error).splitlines() if "error: " in line), str(error))
        raise RuntimeError(
            f"cupy_raw: {kernel.source} did not compile for {arch} by NVRTC {compiler().version}: {told}. "
            "Report it, with the log above, or use backend='numba_cuda'"
        ) from error
    if log is None:
        keep(key, compiled)
    return compiled


@cache
def headers_digest() -> bytes:
    """Of all that the sources include: a cached program of other headers is another program."""
    digest = hashlib.sha256()
    toolkit = Path(compiler().headers)
    for path in [*sorted(FOLDER.glob("*.cuh")), *(toolkit / name for name in ("cuda_bf16.hpp", "cuda_fp16.hpp"))]:
        digest.update(path.read_bytes())
    return digest.digest()


@cache
def programs() -> Any:
    """The cache of compiled programs: on disk, or in memory where nothing can be written."""
    from cuda.core.utils import FileStreamProgramCache, InMemoryProgramCache

    home = os.environ.get("LLSA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(home) if home else Path.home() / ".cache"
        return FileStreamProgramCache(folder / "llsa-np", max_size_bytes=CACHE_BYTES)
    except (OSError, RuntimeError):  # read-only, or no home at all
        return InMemoryProgramCache()


# An entry is the machine code behind its digest: a disk that filled up or failed may have left less, or another thing.


def kept_cubin(key: bytes) -> bytes | None:
    """What the cache holds, if it can be read and is as it was written."""
    with suppress(OSError):
        entry = programs().get(key) or b""
        digest, code = entry[:DIGEST_BYTES], entry[DIGEST_BYTES:]
        if digest == hashlib.sha256(code).digest():
            return code
    return None


def keep(key: bytes, code: bytes) -> None:
    """Into the cache, if it can be written."""
    with suppress(OSError):
        programs()[key] = hashlib.sha256(code).digest() + code


# --- launching

_functions: dict[tuple[Kernel, int], Any] = {}
_modules: dict[tuple[str, tuple[tuple[str, str], ...], int], Any] = {}
_loading = Lock()


def function(kernel: Kernel) -> Any:
    """The kernel on the current device, compiled and loaded at its first use."""
    import cupy

    device = cupy.cuda.runtime.getDevice()
    found = _functions.get((kernel, device))
    if found is None:
        with _loading:
            of = (kernel.source, kernel.defines, device)  # one compilation, of which several kernels may come
            module = _modules.get(of)
            if module is None:
                module = _modules[of] = load(kernel, architecture(device))
            found = module.get_function(kernel.name)
            if kernel.shared_bytes:  # which may be more than the 48 KiB that need no asking
                driver = cupy.cuda.driver
                most = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                driver.funcSetAttribute(found.ptr, most, kernel.shared_bytes)
            _functions[kernel, device] = found
    return found


def load(kernel: Kernel, arch: str) -> Any:
    """The module of a kernel, on the current device."""
    import cupy

    code = compile_cubin(kernel, arch)
    module = cupy.cuda.Module()
    try:
        module.load(code)
    except cupy.cuda.driver.CUDADriverError as error:
        if "OUT_OF_MEMORY" in str(error):
            raise MemoryError(f"the GPU has no room for {kernel.source}, {len(code):,} bytes of code") from error
        raise RuntimeError(
            f"cupy_raw: the NVIDIA driver, of CUDA {cuda_version(driver_cuda())}, does not load {kernel.source} as "
            f"NVRTC {compiler().version} compiled it for {arch}: {error}. {NEWER_DRIVER}"
        ) from error
    return module


@cache
def architecture(device: int) -> str:
    """What to compile for: the device's own architecture."""
    import cupy

    return f"sm_{cupy.cuda.Device(device).compute_capability}"


class Launch(NamedTuple):
    """A kernel and what it is launched with, as a row of blocks."""

    kernel: Kernel
    blocks: int
    struct: Struct
    """Which it takes."""
    values: tuple[Any, ...]
    """Of the struct; where arrays begin, their stand-ins' addresses."""


def launch(kernel: Kernel, blocks: int, struct: Struct, values: tuple[Any, ...], recording: Any) -> None:
    """Record a launch; nothing if there are no blocks."""
    if blocks:
        recording.launches.append(Launch(kernel, blocks, struct, values))


@cache
def pointers_of(form: str) -> tuple[int, ...]:
    """Where the pointers are in a struct of this format, whose letter is Q."""
    return tuple(
        calcsize(form[: found.start()]) + WORD * i
        for found in re.finditer(r"(\d*)Q", form)
        for i in range(int(found[1] or 1))
    )


class Launches:
    """The launches of a call in their order. Their arguments stay in host memory, where only pointers change."""

    def __init__(self, launches: list[Launch], places: dict[int, tuple[int, int]], device: str) -> None:
        """places: of every stand-in's address, which array of the call it is in and how many bytes from its start."""
        self.device, self.lock = int(device.partition(":")[2] or 0), Lock()
        packed = b"".join(launch.struct.pack(*launch.values) for launch in launches)
        self.words = np.frombuffer(bytearray(packed), np.uint64)
        starts = np.cumsum([0, *(launch.struct.size for launch in launches)])
        pointers = [start + offset for start, x in zip(starts, launches) for offset in pointers_of(x.struct.format)]
        at = np.array(pointers) // WORD
        self.at = at[self.words[at] != 0]
        self.arrays, offsets = np.array([places[int(address)] for address in self.words[self.at]]).T
        self.offsets = offsets.astype(np.uint64)
        # A launch takes the address of a list, here of one, of addresses of arguments.
        self.lists = self.words.ctypes.data + starts[:-1].astype(np.uint64)
        lists = self.lists.ctypes.data
        with OnDevice(self.device):
            self.starters = [(starter(launch), lists + WORD * i) for i, launch in enumerate(launches)]

    def __call__(self, pointers: list[int], stream: int) -> None:
        """Enqueue all on the stream at an address. pointers: where the call's arrays begin."""
        with self.lock, OnDevice(self.device):  # another thread's call like this one waits
            self.words[self.at] = np.array(pointers, np.uint64)[self.arrays] + self.offsets
            for start, arguments in self.starters:
                start(arguments, stream)


def starter(launch: Launch) -> Callable[[int, int], None]:
    """What enqueues a kernel on the current device, given its list of arguments and a stream, by their addresses."""
    import cupy

    # By the driver's own function: 4 to 5 us of the host a launch, where CuPy's call of a kernel takes 8.5
    enqueue = cupy.cuda.driver.launchKernel
    kernel, loaded = launch.kernel, function(launch.kernel)

    def start(arguments: int, stream: int) -> None:
        enqueue(loaded.ptr, launch.blocks, 1, 1, kernel.threads, 1, 1, kernel.shared_bytes, stream, arguments, 0)

    return start


class OnDevice:
    """A context in which a device is the current one, with CUDA's state for it in this thread."""

    __slots__ = ("device", "previous")

    def __init__(self, device: int) -> None:
        self.device = device

    def __enter__(self) -> None:
        runtime = cuda_runtime()
        self.previous = runtime.getDevice()
        runtime.setDevice(self.device)  # also where it is: a new thread has no state yet

    def __exit__(self, *_: object) -> None:
        if self.previous != self.device:
            cuda_runtime().setDevice(self.previous)


@cache
def cuda_runtime() -> Any:
    """CUDA's functions as CuPy has them, if the driver is one that CuPy was built for, which it says at its first
    call."""
    import cupy

    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        built_for = cuda_version(cupy.cuda.runtime.runtimeGetVersion())
        raise RuntimeError(
            f"cupy_raw: CuPy, built for CUDA {built_for}, cannot use the NVIDIA driver, of CUDA "
            f"{cuda_version(driver_cuda())}: {error}. {NEWER_DRIVER}"
        ) from error
    return cupy.cuda.runtime


def precompile(kernels: list[Kernel], arch: str | None) -> None:
    """Compile ahead, and for the GPU that is here load as well."""
    if arch is None:
        cuda_runtime()
        for kernel in kernels:
            function(kernel)
        return
    for kernel in {(kernel.source, kernel.defines): kernel for kernel in kernels}.values():
        compile_cubin(kernel, arch)
