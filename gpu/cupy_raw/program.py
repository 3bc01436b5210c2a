"""Compiling a kernel with NVRTC, keeping what was compiled, and launching it through CuPy.

One path with and without a GPU: `cuda.core.Program` compiles to machine code for a named architecture, a cache on disk
keeps that code, and `cupy.cuda.Module` loads it. LLSA_CACHE_DIR moves the cache.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from functools import cache
from pathlib import Path
from struct import unpack_from
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

FOLDER = Path(__file__).parent
CACHE_BYTES = 2**30
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
"""`Array` of numbers.cuh, for `struct.pack`."""
NO_ARRAY = (0, 0, 0, 0, 0)


def pointer(x: Any) -> int:
    """Where an array begins: of CuPy by its own accessor, of others by the CUDA array interface."""
    memory = getattr(getattr(x, "data", None), "ptr", None)
    if memory is None:
        memory = x.__cuda_array_interface__["data"][0]
    return int(memory or 0)  # an array without elements may have no memory


Packed = tuple[int, ...]
"""The values of an ARRAY."""


def array(x: Any) -> Packed:
    """Where an array begins, and its strides in elements; of an axis of size 1 none, whatever the array says."""
    size = x.dtype.itemsize
    return (pointer(x), *[0 if n <= 1 else stride // size for n, stride in zip(x.shape, x.strides)])


def is_whole(dtype: str, *arrays: Packed) -> bool:
    """Whether the rows of all arrays of four axes can be moved 16 bytes at a time."""
    piece = 16 // BYTES[dtype]
    for start, batch, head, token, dim in arrays:
        if start % 16 or (batch | head | token) % piece or dim != 1 or abs(token) >= MOST_STRIDE:
            return False
    return True


# --- compiling


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
        include_path=[str(FOLDER), toolkit_headers()],
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
    try:
        compiled = Program(code, "c++", options).compile("cubin", logs=log)
    except CUDAError as error:
        raise RuntimeError(f"cupy_raw: {kernel.source} did not compile for {arch}: {error}") from error
    if log is None:
        keep(key, compiled)
    return bytes(compiled.code)


def toolkit_headers() -> str:
    """The folder of cuda_bf16.h, which the runtime's wheel brings."""
    from cuda.pathfinder import find_nvidia_header_directory

    folder = find_nvidia_header_directory("cudart")
    if folder is None:
        raise RuntimeError(
            "cupy_raw: CUDA's headers are not installed (pip install 'llsa-np[cuda13]', or 'llsa-np[cuda12]')"
        )
    return str(folder)


@cache
def headers_digest() -> bytes:
    """Of all that the sources include: a cached program of other headers is another program."""
    digest = hashlib.sha256()
    toolkit = Path(toolkit_headers())
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


def kept_cubin(key: bytes) -> bytes | None:
    """What the cache holds, if it can be read and is whole: an entry may have been cut short."""
    with suppress(OSError):
        kept = programs().get(key)
        if kept is not None:
            code = bytes(kept.code if hasattr(kept, "code") else kept)
            if is_whole_elf(code):
                return code
    return None


def is_whole_elf(code: bytes) -> bool:
    """Whether machine code has all that its ELF header speaks of."""
    if len(code) < 64 or code[:4] != b"\x7fELF":
        return False
    programs_at, sections_at = unpack_from("QQ", code, 0x20)
    program_size, program_count, section_size, section_count = unpack_from("4H", code, 0x36)
    ends = (programs_at + program_size * program_count, sections_at + section_size * section_count)
    return bool(max(ends) <= len(code))


def keep(key: bytes, compiled: Any) -> None:
    """Into the cache, if it can be written."""
    with suppress(OSError):
        programs()[key] = compiled


# --- launching

_functions: dict[tuple[Kernel, int], Any] = {}
_loading = Lock()


def function(kernel: Kernel) -> Any:
    """The kernel on the current device, compiled and loaded at its first use."""
    import cupy

    device = cupy.cuda.runtime.getDevice()
    found = _functions.get((kernel, device))
    if found is None:
        with _loading:
            found = _functions.get((kernel, device))
            if found is None:
                module = cupy.cuda.Module()
                module.load(compile_cubin(kernel, architecture(device)))
                found = module.get_function(kernel.name)
                if (
                    kernel.shared_bytes
                ):  # with what a kernel declares itself it may be more than the 48 KiB that need no asking
                    from cupy_backends.cuda.api import driver

                    driver.funcSetAttribute(
                        found.ptr, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, kernel.shared_bytes
                    )
                _functions[kernel, device] = found
    return found


@cache
def architecture(device: int) -> str:
    """What to compile for: the device's own architecture."""
    import cupy

    return f"sm_{cupy.cuda.Device(device).compute_capability}"


def launch(kernel: Kernel, blocks: int, arguments: bytes, stream: int) -> None:
    """Enqueue a kernel on the stream at an address, as a row of blocks; nothing if there are none. arguments: the
    struct that it takes."""
    if blocks:
        struct = np.frombuffer(arguments, f"V{len(arguments)}")[0]
        function(kernel)((blocks, 1, 1), (kernel.threads, 1, 1), (struct,), kernel.shared_bytes, stream_at(stream))


@cache
def stream_at(address: int) -> Any:
    """The caller's stream."""
    import cupy

    return cupy.cuda.Stream.from_external(_Stream(address)) if address else cupy.cuda.Stream.null


class _Stream:
    """A stream of another library, as CuPy asks for one."""

    def __init__(self, address: int) -> None:
        self.address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.address


def on_device(name: str) -> Any:
    """A context in which the device called e.g. "cuda:1" is the current one."""
    import cupy

    return cupy.cuda.Device(int(name.partition(":")[2]))


def precompile(kernels: list[Kernel], arch: str | None) -> None:
    """Compile ahead, and for the GPU that is here load as well."""
    for kernel in kernels:
        if arch is None:
            function(kernel)
        else:
            compile_cubin(kernel, arch)
