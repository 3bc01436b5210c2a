"""The CUDA C++ kernels on the CPU: their sources compiled by g++ with the headers of tests/emulator/, on NumPy arrays.

`install()` puts this in the place of NVRTC and of what CuPy enqueues, so that `backend="cupy_raw"` serves NumPy arrays.
"""

import ctypes
import hashlib
import importlib
import os
import subprocess
import tempfile
from contextlib import nullcontext
from functools import cache
from pathlib import Path

from llsa_np.adapters import PIECE
from llsa_np.adapters.numpy_arrays import NumpyAdapter

HERE = Path(__file__).parent / "emulator"
KERNELS = Path(__file__).parent.parent / "gpu" / "cupy_raw"
# Hidden, or the loader would take one library's shared memory for that of another specialisation, which may be larger
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-shared", "-w", "-fvisibility=hidden")


KERNELS_OF = {
    "pool.cu": ("pool", "pool_sums"),
    "select.cu": ("select",),
    "attend.cu": ("attend",),
    "attend_backward.cu": (
        *("prepare", "query_gradient"),
        *("key_gradient", "key_gradient_joint", "key_gradient_dense", "key_gradient_rows"),
    ),
    "transpose.cu": ("clear_starts", "count_pairs", "sum_chunks", "sum_counts", "count_items", "place_pairs"),
    "unpool.cu": ("unpool", "finish", "gather", "clear"),
}
HEAD = """
#include "cuda.h"
#define select select_candidates  // the C library has a function of this name
#define SEEN extern "C" __attribute__((visibility("default")))
#define main_of(name) \\
    SEEN void run_##name(const void* a, int blocks, int threads, int shared) { \\
        run_it(name, a, blocks, threads, shared); \\
    } \\
    SEEN int size_of_##name() { return size_of(name); }
template <class A> void run_it(void (*kernel)(A), const void* a, int blocks, int threads, int shared) {
    emulator::launch(blocks, threads, shared, [&] { kernel(*static_cast<const A*>(a)); });
}
template <class A> int size_of(void (*kernel)(A)) { return sizeof(A); }
"""


@cache
def library(source, defines):
    """A source with its kernels as functions, compiled once for all processes."""
    flags = [*FLAGS, f"-I{HERE}", f"-I{KERNELS}", *(f"-D{name}={value}" for name, value in defines)]
    digest = hashlib.sha256(repr((source, flags, HEAD)).encode())
    for path in sorted([*HERE.glob("*"), *KERNELS.glob("*.cu*")]):
        digest.update(path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"llsa-emulator-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    built = folder / f"{digest.hexdigest()[:32]}.so"
    if not built.exists():
        code = f'{HEAD}#include "{KERNELS / source}"\n' + "".join(f"main_of({name})\n" for name in KERNELS_OF[source])
        part = built.with_suffix(f".{os.getpid()}")
        command = ["g++", *flags, "-x", "c++", "-", "-o", str(part)]
        done = subprocess.run(command, input=code, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr[:4000]
        part.replace(built)
    return ctypes.CDLL(str(built))


def starter(launch):
    kernel, packed = launch.kernel, launch.struct.size
    functions = library(kernel.source, kernel.defines)
    size = getattr(functions, f"size_of_{kernel.name}")()
    assert size == packed, f"{kernel.name}: its struct has {size} bytes, what is packed {packed}"
    run = getattr(functions, f"run_{kernel.name}")

    def start(arguments, stream):
        assert stream == 0
        run(ctypes.c_void_p.from_address(arguments), launch.blocks, kernel.threads, kernel.shared_bytes)

    return start


def install():
    """From here on backend="cupy_raw" serves NumPy arrays, emulated."""
    backends = importlib.import_module("llsa_np.backends")
    backends.DEVICES["cupy_raw"] = "cpu"
    found = backends._reasons
    backends._reasons = lambda name: () if name == "cupy_raw" else found(name)
    backends.recorded_devices.cache_clear()
    importlib.import_module("llsa_np.copies").ON_A_DEVICE = ("numba_cuda",)
    program = importlib.import_module("llsa_np.gpu.cupy_raw.program")
    program.starter, program.OnDevice = starter, lambda _: nullcontext()
    NumpyAdapter.key = key


def key(adapter, array):
    """As for arrays on a GPU: of NumPy's else, strides and alignment tell no calls apart."""
    if not adapter.owns(array):
        return None
    return array.dtype, array.shape, array.strides, adapter.pointer(array) % PIECE
