"""The CUDA C++ kernels on the CPU: their sources compiled by g++ with the headers of tests/emulator/, on NumPy arrays.

`install()` puts this in the place of NVRTC and CuPy's launch, so that `backend="cupy_raw"` serves NumPy arrays.
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

HERE = Path(__file__).parent / "emulator"
KERNELS = Path(__file__).parent.parent / "gpu" / "cupy_raw"
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-shared", "-w")


@cache
def library(kernel):
    """The kernel as a function (arguments, blocks), compiled once for all processes."""
    defines = [f"-D{name}={value}" for name, value in kernel.defines]
    sources = sorted([*HERE.glob("*"), *KERNELS.glob("*.cu*")])
    digest = hashlib.sha256(repr((kernel.source, kernel.name, defines, FLAGS)).encode())
    for path in sources:
        digest.update(path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"llsa-emulator-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    built = folder / f"{digest.hexdigest()[:32]}.so"
    if not built.exists():
        code = f"""
#include "cuda.h"
#define {kernel.name} kernel_{kernel.name}
#include "{KERNELS / kernel.source}"
template <class A> void run_it(void (*kernel)(A), const void* a, int blocks, int threads, int shared) {{
    emulator::launch(blocks, threads, shared, [&] {{ kernel(*static_cast<const A*>(a)); }});
}}
template <class A> int size_of(void (*kernel)(A)) {{ return sizeof(A); }}
extern "C" void run(const void* a, int blocks, int threads, int shared) {{ run_it({kernel.name}, a, blocks, threads, shared); }}
extern "C" int size_of_arguments() {{ return size_of({kernel.name}); }}
"""
        part = built.with_suffix(f".{os.getpid()}")
        command = ["g++", *FLAGS, f"-I{HERE}", f"-I{KERNELS}", *defines, "-x", "c++", "-", "-o", str(part)]
        done = subprocess.run(command, input=code, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr[:4000]
        part.replace(built)
    return ctypes.CDLL(str(built))


def launch(kernel, blocks, arguments, stream):
    if blocks == 0:
        return
    run = library(kernel)
    assert run.size_of_arguments() == len(arguments), f"{kernel.source}: its struct and what is packed differ"
    assert stream == 0
    run.run(arguments, blocks, kernel.threads, kernel.shared_bytes)


def install():
    """From here on backend="cupy_raw" serves NumPy arrays, emulated."""
    backends = importlib.import_module("llsa_np.backends")
    backends.DEVICES["cupy_raw"] = "cpu"
    found = backends._reasons
    backends._reasons = lambda name: () if name == "cupy_raw" else found(name)
    ours = {"launch": launch, "pointer": lambda x: x.__array_interface__["data"][0], "on_device": lambda _: nullcontext()}
    for name in ("program", "pool", "select", "attend", "attend_backward", "transpose", "backend"):
        try:
            module = importlib.import_module(f"llsa_np.gpu.cupy_raw.{name}")
        except ModuleNotFoundError:
            continue
        for attribute, value in ours.items():
            if hasattr(module, attribute):
                setattr(module, attribute, value)
