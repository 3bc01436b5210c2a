"""Who computes: the backends by name, what each needs to run here, and the choice between them."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, Protocol, get_args

from llsa_np import numpy_backend
from llsa_np.hierarchy import Hierarchy
from llsa_np.options import AttendOptions
from llsa_np.selection import Selection

BackendName = Literal["auto", "numpy", "cupy_raw", "numba_cuda"]
NAMES: tuple[str, ...] = get_args(BackendName)[1:]
"""In the order in which "auto" asks them."""
DEVICES = {"numpy": "cpu", "numba_cuda": "cuda", "cupy_raw": "cuda"}
"""The kind of device whose arrays each backend serves."""

RECORDS = ("cupy_raw",)
"""Backends that record their launches, of which their `prepared` makes what plans.py enqueues."""

COMPILER = {"cuda.core": "cuda-core", "cuda.bindings": "cuda-bindings"}
PACKAGES = {"numba_cuda": {"numba": "numba", "numba_cuda": "numba-cuda"}, "cupy_raw": {"cupy": "cupy"} | COMPILER}
"""The modules that each backend imports, and the packages that bring them."""
EXTRA = "(pip install 'llsa-np[cuda13]', or 'llsa-np[cuda12]' for a CUDA 12 driver)"
NEWER_DRIVER = (
    "CUDA 13 needs driver 580 or newer, CUDA 12 one of 525 or newer: update the driver, or pip install "
    "'llsa-np[cuda12]' in a new environment"
)


class Case(NamedTuple):
    """What a backend may refuse of a call that passed the checks."""

    operation: str
    dtype: str
    dim: int
    value_dim: int
    block_size: int
    topk: tuple[int, ...]


class Work(NamedTuple):
    """All that a workspace is planned from: shapes, dtype and options of one operation, never the data."""

    operation: str
    dtype: str
    batch: int
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    query_hierarchy: Hierarchy
    key_hierarchy: Hierarchy
    topk: tuple[int, ...] = ()
    options: AttendOptions | None = None
    needs: frozenset[str] = frozenset()


class Room(NamedTuple):
    """What a call lends a backend for one operation."""

    arrays: list[Any]
    """The workspace, as the backend's `spaces` asked for it, uninitialised."""
    stream: Any
    """The address of the caller's stream, 0 for the default one and on the host; the recording of those that record."""
    device: str
    dtype: str


class Backend(Protocol):
    """The four operations over checked arrays (batch, heads, tokens, dim); results are filled, not returned.

    Lists of levels: `pool` fills levels 1..L, `select` reads levels 1..L, `attend` and `attend_backward` levels 0..L.
    """

    name: str

    def refusals(self, case: Case) -> list[str]:
        """Every reason why this backend cannot serve a call that passed the checks; none if it can."""

    def spaces(self, work: Work) -> list[tuple[tuple[int, ...], str]]:
        """Shapes and dtypes of the arrays that an operation needs besides its results."""

    def precompile(self, case: Case, backward: bool, arch: str | None) -> None:
        """Compile what calls like this one will need, for this GPU (None) or another."""

    def pool(self, x: Any, hierarchy: Hierarchy, out: list[Any], room: Room) -> None: ...

    def select(
        self, q_levels: list[Any], k_levels: list[Any], hierarchy: Hierarchy, out: list[Any], room: Room
    ) -> None: ...

    def attend(
        self,
        q: Any,
        k_levels: list[Any],
        v_levels: list[Any],
        selection: Selection,
        options: AttendOptions,
        out: Any,
        lse: Any,
        room: Room,
    ) -> None: ...

    def attend_backward(
        self,
        dout: Any,
        q: Any,
        k_levels: list[Any],
        v_levels: list[Any],
        out: Any,
        lse: Any,
        dlse: Any | None,
        selection: Selection,
        options: AttendOptions,
        dq: Any | None,
        dk: Any | None,
        dv: Any | None,
        room: Room,
    ) -> None: ...


def backends() -> dict[str, tuple[str, ...]]:
    """What can serve on this machine: for every backend the reasons why it cannot, and none for one that can.

    Returns {"numpy": (), "numba_cuda": (reason, ...), "cupy_raw": (reason, ...)}; each reason names the way out where
    there is one, such as the extra to install. Looks at installed packages, CUDA's compiler and the driver, imports no
    framework.
    """
    return {name: _reasons(name) for name in NAMES}


def check_backend(who: str, name: Any) -> str:
    """The name, if it is "auto" or a backend that can run here."""
    if not isinstance(name, str) or name not in ("auto", *NAMES):
        raise ValueError(f"{who}: backend is {name!r}; allowed is one of {('auto', *NAMES)}")
    reasons = () if name == "auto" else _reasons(name)
    if reasons:
        able = [other for other in NAMES if not _reasons(other)]
        raise RuntimeError(
            f"{who}: backend {name!r} cannot run here: {'; '.join(reasons)}. "
            f"Use backend='auto' or one that can: {', '.join(map(repr, able))}"
        )
    return name


def choose(name: str, device: str, case: Case) -> Backend:
    """The backend for a call with arrays on `device`: the one that was named, or the first that serves the case."""
    who, kind = case.operation, device.partition(":")[0]
    named = NAMES if name == "auto" else (name,)
    here = [_load(other) for other in named if DEVICES[other] == kind and not _reasons(other)]
    if not here:
        able = [other for other in named if not _reasons(other)]
        served = ", ".join(f"{other} serves {DEVICES[other]}" for other in able)
        missing = [f"{other}: {'; '.join(_reasons(other))}" for other in named if DEVICES[other] == kind]
        told = f". What is missing: {'. '.join(missing)}" if missing else ""
        raise ValueError(f"{who}: the arrays are on {device}, and of the backends that may run here {served}{told}")
    refusals: list[str] = []
    for backend in here:
        reasons = backend.refusals(case)
        if not reasons:
            return backend
        refusals += [f"{backend.name} {reason}" for reason in reasons]
    raise NotImplementedError(f"{who}: {'; '.join(refusals)}")


def choose_compiler(case: Case) -> Backend:
    """The backend that compiles for a GPU which need not be here, if what it takes is here and it serves the case."""
    name = "cupy_raw"
    missing = _missing(COMPILER) or _no_compiler([])
    if missing:
        raise RuntimeError(f"{case.operation}: {missing}")
    backend = _load(name)
    refusals = [f"{name} {reason}" for reason in backend.refusals(case)]
    if refusals:
        raise NotImplementedError(f"{case.operation}: {'; '.join(refusals)}; no other backend compiles for an arch")
    return backend


@cache
def recorded_devices() -> set[str]:
    """The kinds of devices whose arrays a backend that records serves here."""
    return {DEVICES[name] for name in RECORDS if not _reasons(name)}


def serves_gpu() -> bool:
    """Whether any backend can serve arrays on a GPU here."""
    return any(DEVICES[name] == "cuda" and not _reasons(name) for name in NAMES)


def _load(name: str) -> Backend:
    if name == "numpy":
        return numpy_backend.backend
    backend: Backend = import_module(f"llsa_np.gpu.{name}.backend").backend
    return backend


@cache
def _reasons(name: str) -> tuple[str, ...]:
    """Why a backend cannot run on this machine, looked up once a process."""
    if name == "numpy":
        return ()
    missing = _missing(PACKAGES[name])
    if name == "numba_cuda" and _simulated():
        return (missing,) if missing else ()
    devices, driver = _devices(), driver_cuda()
    reasons = [missing]
    if name == "cupy_raw" and not missing:
        reasons.append(_no_compiler(devices))
    if not devices:
        simulator = " (NUMBA_ENABLE_CUDASIM=1 runs these kernels in Numba's simulator)" if name == "numba_cuda" else ""
        reasons.append(f"no CUDA device: the NVIDIA driver is missing or shows none{simulator}")
    elif not driver:
        reasons.append(
            "the NVIDIA driver's library libcuda is missing; a container is given it with "
            "NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        )
    elif not missing:
        reasons.append(_newer_than(driver, name))
    if name == "cupy_raw" and devices and max(devices) < (8, 0):
        major, minor = max(devices)
        reasons.append(f"the device has compute capability {major}.{minor}, these kernels need 8.0 or more")
    return tuple(filter(None, reasons))


def _no_compiler(devices: list[tuple[int, int]]) -> str:
    """Why NVRTC compiles nothing here, or for none of the devices; "" if it does."""
    program = import_module("llsa_np.gpu.cupy_raw.program")
    try:
        compiler = program.compiler()
    except RuntimeError as error:
        return str(error)
    refusals = [compiler.refusal(f"sm_{major}{minor}") for major, minor in devices if major >= 8]
    return refusals[0] if refusals and all(refusals) else ""


def _newer_than(driver: int, name: str) -> str:
    """Which of a backend's packages are built for a newer CUDA than the driver serves, and the way out; "" if none.

    A driver serves all minor versions of its major one.
    """
    from importlib.metadata import PackageNotFoundError, version

    built_for = {}
    with suppress(PackageNotFoundError):
        built_for["cuda-bindings"] = int(version("cuda-bindings").partition(".")[0])
    if name == "cupy_raw":  # CuPy's package is named after its CUDA; another build's tells at its first call
        for major in (12, 13):
            with suppress(PackageNotFoundError):
                version(f"cupy-cuda{major}x")
                built_for[f"cupy-cuda{major}x"] = major
    newer = [f"{package} (CUDA {major})" for package, major in built_for.items() if major > driver // 1000]
    if not newer:
        return ""
    return f"the NVIDIA driver serves CUDA {cuda_version(driver)}, too old for {' and '.join(newer)}; {NEWER_DRIVER}"


def cuda_version(number: int) -> str:
    """12040 as "12.4"."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _missing(packages: dict[str, str]) -> str:
    """Which of the packages that bring some modules are not installed, and the extra that does; "" if none."""
    missing = [package for module, package in packages.items() if not _installed(module)]
    if not missing:
        return ""
    return f"not installed: {', '.join(missing)} {EXTRA}"


def _simulated() -> bool:
    """Whether Numba's CUDA simulator is switched on, which Numba reads when it is imported."""
    return os.environ.get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0")


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is not there
        return False


def driver_cuda() -> int:
    """The newest CUDA that the driver serves, 12040 for 12.4; 0 without its library. Asking leaves CUDA untouched."""
    version = ctypes.c_int(0)
    for library in ("libcuda.so.1", "nvcuda.dll"):
        with suppress(OSError):  # not this system's, or not there
            ctypes.CDLL(library).cuDriverGetVersion(ctypes.byref(version))
    return version.value


def _devices() -> list[tuple[int, int]]:
    """The compute capability of every device that the NVIDIA driver shows; none without a driver.

    NVML is asked, which leaves CUDA itself untouched: a process that forks later could not use it in the child. It
    does not know of CUDA_VISIBLE_DEVICES, whose first entry may hide all.
    """
    found: list[tuple[int, int]] = []
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0].strip() in ("", "-1"):
        return found
    count, major, minor, handle = ctypes.c_uint(0), ctypes.c_int(0), ctypes.c_int(0), ctypes.c_void_p()
    for library in ("libnvidia-ml.so.1", "nvml.dll"):
        try:
            driver = ctypes.CDLL(library)
        except OSError:
            continue
        if driver.nvmlInit_v2() == 0:
            driver.nvmlDeviceGetCount_v2(ctypes.byref(count))
            for i in range(count.value):
                driver.nvmlDeviceGetHandleByIndex_v2(i, ctypes.byref(handle))
                driver.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
                found.append((major.value, minor.value))
            driver.nvmlShutdown()
    return found
