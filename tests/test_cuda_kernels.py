"""The CUDA C++ kernels without a GPU: compiled for all architectures, and emulated what the facts do not single out."""

import ctypes
import importlib
import io
import os
import re
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from threading import Barrier
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from calls import assert_same_bits, assert_within_bounds, reference, run
from frameworks import NumPy
from strategies import EMULATED, Case

import llsa_np as llsa

pytest.importorskip("cuda.core", reason="cuda-core is not installed")

from llsa_np import plans
from llsa_np.adapters import numpy_arrays
from llsa_np.copies import to_device
from llsa_np.gpu.cupy_raw import attend, attend_backward, pool, program, select, transpose
from llsa_np.gpu.cupy_raw.levels import LEVEL, MOST_LEVELS
from llsa_np.gpu.cupy_raw.specialisations import BLOCK_SIZES, PORTABLE_SHARED, Tile, all_tiles
from llsa_np.hierarchy import Hierarchy
from llsa_np.options import check_attend_options
from llsa_np.recording import Recording

backends = importlib.import_module("llsa_np.backends")  # whose name in the package is the function's

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100", "sm_120")
COVER = [
    *((Tile("bfloat16", 64), True, arch) for arch in ARCHITECTURES),
    (Tile("float16", 32), False, "sm_90a"),
    (Tile("float16", 96), True, "sm_120"),
    (Tile("bfloat16", 128), True, "sm_80"),
    (Tile("bfloat16", 256), False, "sm_100"),
    (Tile("float32", 32), True, "sm_120"),
    (Tile("float32", 64), True, "sm_80"),
    (Tile("float32", 128), False, "sm_90a"),
    (Tile("float32", 256), True, "sm_120"),
]
HOT = {"attend", "query_gradient", "key_gradient", "key_gradient_joint", "key_gradient_dense", "key_gradient_rows"}
HOT_SPILL = {"sm_80": 16, "sm_90a": 16, "sm_100": 32, "sm_120": 32}
"""Bytes that a hot kernel of the usual tile may spill, none of them in a loop."""

on_compiler = pytest.mark.skipif(EMULATED, reason="the emulator has a compiler of its own")
emulated = pytest.mark.skipif(not EMULATED, reason="runs on the CPU (LLSA_CUDA_EMULATOR=1)")


def kernels_of(tile, whole):
    """All kernels of a tile."""
    forward = [
        *(kernel for size in BLOCK_SIZES for kernel in pool.pool_kernels(tile.dtype, size, whole)),
        select.select_kernel(tile, whole),
        attend.attend_kernel(tile, whole),
    ]
    return list(dict.fromkeys([*forward, *attend_backward.backward_kernels(tile, whole)]))


def is_of_one_gradient(kernel):
    """Of dk alone, or of dv."""
    return len({value for name, value in kernel.defines if name.startswith("NEEDS_")}) == 2


def compilations(kernels):
    """One kernel for each compilation: several come from one."""
    return list({(kernel.source, kernel.defines): kernel for kernel in kernels}.values())


def measured(kernel, arch):
    """Of every kernel of a compilation (registers, bytes spilled, static shared memory), as the assembler says."""
    log = io.StringIO()
    program.compile_cubin(kernel, arch, log=log)
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers([^\n]*)",
        log.getvalue(),
        re.DOTALL,
    )
    static = {name: re.search(r"(\d+) bytes smem", rest) for name, _, _, rest in found}
    return {
        name: (int(registers), int(spilled), int(static[name].group(1)) if static[name] else 0)
        for name, spilled, registers, _ in found
    }


@pytest.mark.parametrize("tile", all_tiles(), ids=str)
def test_every_card_has_the_shared_memory(tile):
    """What a launch asks for; what the kernels declare themselves is known once they are compiled."""
    for kernel in kernels_of(tile, True):
        assert kernel.shared_bytes <= PORTABLE_SHARED, kernel


def is_in_the_cover(kernel, tile, whole):
    """Not so: kernels of one gradient alone, and where a tile is so wide that each gradient has its own, those of one
    of the two; gradients of the widest ragged tiles, which take half a minute each; pooling, which knows no width, of
    tiles that are neither 64 wide nor ragged."""
    if kernel.source == "pool.cu":
        return tile.WIDTH == 64 or not whole
    if kernel.source == "attend_backward.cu" and tile.WIDTH >= 128 and not whole:
        return False
    left_out = {"bfloat16": "NEEDS_K", "float32": "NEEDS_V"}.get(tile.dtype)
    is_wide = tile.WIDTH > attend_backward.MOST_BOTH and (left_out, "0") in kernel.defines
    return is_wide or not is_of_one_gradient(kernel)


@on_compiler
@pytest.mark.parametrize(("tile", "whole", "arch"), COVER, ids=str)
def test_a_cover_of_the_specialisations_compiles(tile, whole, arch, record_property):
    """And fits every card of the architecture. The rest is left to `make kernels`."""
    kernels = [kernel for kernel in kernels_of(tile, whole) if is_in_the_cover(kernel, tile, whole)]
    dynamic = {(kernel.source, kernel.defines, kernel.name): kernel.shared_bytes for kernel in kernels}
    for kernel in compilations(kernels):
        found = measured(kernel, arch)
        assert kernel.name in found
        for name, (registers, spilled, static) in found.items():
            assert registers <= 255
            shared = dynamic.get((kernel.source, kernel.defines, name), 0)
            assert static + shared <= PORTABLE_SHARED, f"{name} takes {static} + {shared} bytes of shared memory"
            if name in HOT and tile == Tile("bfloat16", 64):
                assert spilled <= HOT_SPILL[arch], f"{name} for {arch} spills {spilled} bytes"
    record_property("compiled of", f"{tile.dtype} {tile.WIDTH}{'' if whole else ' ragged'} ({arch})")
    record_property("compiled", len(compilations(kernels)))
    record_property("programs", len(ARCHITECTURES) * all_programs())


@cache
def all_programs():
    """How many an architecture has."""
    return sum(len(compilations(kernels_of(tile, whole))) for tile in all_tiles() for whole in (True, False))


@on_compiler
@pytest.mark.skipif(os.environ.get("LLSA_ALL_KERNELS", "0") == "0", reason="`make kernels` compiles all")
@pytest.mark.parametrize("tile", all_tiles(), ids=lambda tile: f"{tile.dtype}-{tile.WIDTH}")
def test_all_specialisations_compile(tile):
    kernels = [kernel for whole in (True, False) for kernel in compilations(kernels_of(tile, whole))]
    jobs = [(kernel, arch) for kernel in kernels for arch in ARCHITECTURES]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for (kernel, arch), found in zip(jobs, threads.map(lambda job: measured(*job), jobs)):
            print(f"{arch} {kernel.source} {tile.dtype} {tile.WIDTH}: {found}")


# --- the cache


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    """An empty folder for the cache, and no cache open."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LLSA_CACHE_DIR", str(folder))
    program.programs.cache_clear()
    yield folder
    program.programs.cache_clear()


@pytest.fixture
def no_compiler(monkeypatch):
    """A function from whose call on nothing can be compiled."""

    def fail(*_):
        raise AssertionError("this compiles")

    return lambda: monkeypatch.setattr("cuda.core.Program", fail)


QUICK = pool.pool_kernels("float32", 16, True)[0]
"""The quickest to compile."""


def entries(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


@on_compiler
def test_what_compiled_once_is_kept(cache_folder, no_compiler):
    """In LLSA_CACHE_DIR. An entry that is not as it was written is compiled again."""
    first = program.compile_cubin(QUICK, "sm_90a")
    (file,) = entries(cache_folder)
    whole = file.read_bytes()
    middle = len(whole) // 2
    for damaged in (
        b"",
        whole[:20],
        whole[:-1],
        whole + b"\0",
        whole[:middle].ljust(len(whole), b"\0"),
        whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
    ):
        file.write_bytes(damaged)
        assert program.compile_cubin(QUICK, "sm_90a") == first
        assert file.read_bytes() == whole
    no_compiler()
    assert program.compile_cubin(QUICK, "sm_90a") == first
    assert program.compile_cubin(QUICK, "sm_90") == first, "a device is asked for by its number alone"
    file.write_bytes(whole[:-1])
    with pytest.raises(AssertionError, match="this compiles"):
        program.compile_cubin(QUICK, "sm_90a")


@on_compiler
@pytest.mark.parametrize("blocked", ["a file", "cannot be made", "home is a file", "no home", "goes away"])
def test_a_cache_that_cannot_be_written(blocked, cache_folder, no_compiler, monkeypatch):
    """The compiled program is in memory then, or compiled again."""
    if blocked == "a file":
        cache_folder.write_text("not a folder")
    elif blocked == "cannot be made":  # by nobody, root included
        monkeypatch.setenv("LLSA_CACHE_DIR", "/proc/self/fdinfo")
    elif blocked == "goes away":
        program.programs()
        for part in ("entries", "tmp"):
            (cache_folder / "llsa-np" / part).rmdir()
            (cache_folder / "llsa-np" / part).write_text("not a folder")
    else:
        monkeypatch.delenv("LLSA_CACHE_DIR")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", "/dev/null")
    if blocked == "no home":
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
        with pytest.raises(RuntimeError):
            Path.home()
    first = program.compile_cubin(QUICK, "sm_90a")
    assert first[:4] == b"\x7fELF"
    if blocked != "goes away":
        no_compiler()
    assert program.compile_cubin(QUICK, "sm_90a") == first


COMPILE = """
import hashlib, sys, time
from pathlib import Path
from llsa_np.gpu.cupy_raw import pool, program
program.compiler()
folder, name, others = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
(folder / name).touch()
while len(list(folder.glob("ready*"))) < others:
    time.sleep(0.001)
print(hashlib.sha256(program.compile_cubin(pool.pool_kernels("float32", 16, True)[0], "sm_90")).hexdigest())
"""


@on_compiler
def test_processes_that_compile_at_once(cache_folder, tmp_path):
    """Into one empty cache."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", COMPILE, str(tmp_path), f"ready{i}", "3"], stdout=subprocess.PIPE, text=True
        )
        for i in range(3)
    ]
    told = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(told) == 1
    assert len(entries(cache_folder)) == 1, "one whole entry, nothing left over"


def at_once(function, threads=6):
    """What a function gives in threads that call it at the same time."""
    barrier = Barrier(threads)

    def call(_):
        barrier.wait()
        return function()

    with ThreadPoolExecutor(threads) as pool_of_threads:
        return list(pool_of_threads.map(call, range(threads)))


@on_compiler
def test_threads_that_compile_at_once(cache_folder):
    assert len(set(at_once(lambda: program.compile_cubin(QUICK, "sm_90")))) == 1
    assert len(entries(cache_folder)) == 1


# --- compiling ahead


@on_compiler
@pytest.mark.parametrize("named", ["auto", "cupy_raw"])
def test_precompile_for_a_gpu_that_is_not_here(named, cache_folder, no_compiler):
    """After it nothing that a call needs is compiled again."""
    llsa.precompile("bfloat16", 32, topk=4, backward=False, arch="sm_90a", backend=named)
    no_compiler()
    tile = Tile("bfloat16", 32)
    for whole in (True, False):
        for kernel in (*pool.pool_kernels("bfloat16", 16, whole), attend.attend_kernel(tile, whole)):
            assert program.compile_cubin(kernel, "sm_90a")[:4] == b"\x7fELF"
    with pytest.raises(NotImplementedError, match="serves sm_80 and up"):
        llsa.precompile("bfloat16", 32, arch="sm_75", backend=named)
    with pytest.raises(ValueError, match="arch"):
        llsa.precompile("bfloat16", 32, arch="sm_", backend=named)
    with pytest.raises(NotImplementedError, match="cupy_raw serves D"):
        llsa.precompile("bfloat16", 12, arch="sm_90a", backend=named)
    with pytest.raises(AssertionError, match="this compiles"):
        llsa.precompile("float32", 64, arch="sm_90a", backend=named)  # what is not kept would be compiled


@emulated
@pytest.mark.parametrize(("dim", "value_dim"), [(32, 32), (40, 72), (64, 200)])
def test_precompile_is_what_calls_need(dim, value_dim, cache_folder, no_compiler, monkeypatch):
    """Every kernel of calls of all kinds comes from the cache then; nothing was compiled twice or in vain."""
    launched, launched_for = [], {}
    monkeypatch.setattr(plans, "plans", {})
    monkeypatch.setattr(program, "starter", lambda launch: launched.append(launch.kernel) or (lambda *_: None))
    for unaligned in (0, 1):
        q, k, v, dout, out = (
            np.zeros((1, 2, 300, unaligned + width), np.float32)[..., unaligned:]
            for width in (dim, dim, value_dim, value_dim, value_dim)
        )
        lse = np.zeros((1, 2, 300), np.float32)
        options = {"backend": "cupy_raw"}
        selection = llsa.select(q, k, levels=3, block_size=8, topk=2, **options)
        llsa.attend(q, k, v, selection, **options)
        for needs in ("q", "k", "v", "qk", "qv", "kv", "qkv"):
            before = len(launched)
            llsa.attend_backward(dout, q, k, v, out, lse, selection, needs=tuple(needs), **options)
            launched_for[needs] = set(launched[before:])
        assert launched_for["q"] <= launched_for["qkv"], "dq alone has no compilation of its own"
    asked = []

    def counted(code, _, options):  # in the place of cuda.core.Program, which compiles it
        asked.append((code, tuple(options.define_macro)))
        return SimpleNamespace(compile=lambda *_, **__: SimpleNamespace(code=b"machine code"))

    monkeypatch.setattr("cuda.core.Program", counted)
    llsa.precompile("float32", dim, value_dim, block_size=8, arch="sm_90")
    assert len(asked) == len(set(asked)) == len(compilations(launched))
    no_compiler()
    for kernel in launched:
        program.compile_cubin(kernel, "sm_90")


# --- what goes wrong


class FakeCuPy:
    """The part of CuPy that `program` uses, on a machine with one GPU of compute capability 9.0."""

    class CUDADriverError(RuntimeError):
        pass

    class CUDARuntimeError(RuntimeError):
        pass

    def __init__(self):
        self.loaded = []
        self.fails_at_load = self.fails_at_once = None
        runtime = SimpleNamespace(
            getDevice=lambda: 0,
            setDevice=self.set_device,
            getDeviceCount=self.count,
            runtimeGetVersion=lambda: 13020,
            CUDARuntimeError=self.CUDARuntimeError,
        )
        driver = SimpleNamespace(
            CUDADriverError=self.CUDADriverError,
            funcSetAttribute=lambda *_: None,
            CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8,
        )
        device = SimpleNamespace(compute_capability="90")
        self.module = ModuleType("cupy")
        self.module.__spec__ = ModuleSpec("cupy", None)
        self.module.cuda = SimpleNamespace(
            runtime=runtime,
            driver=driver,
            Device=lambda _: device,
            Module=lambda: SimpleNamespace(load=self.load, get_function=self.function),
        )

    def set_device(self, device):
        self.device = device

    def count(self):
        if self.fails_at_once:
            raise self.CUDARuntimeError(self.fails_at_once)
        return 1

    def load(self, code):
        if self.fails_at_load:
            raise self.CUDADriverError(self.fails_at_load)
        self.loaded.append(code)

    def function(self, name):
        return SimpleNamespace(ptr=0, name=name)


@pytest.fixture
def cupy(monkeypatch):
    """FakeCuPy as the installed one, and nothing loaded yet."""
    fake = FakeCuPy()
    caches = (program.architecture, program.cuda_runtime)
    monkeypatch.setitem(sys.modules, "cupy", fake.module)
    monkeypatch.setattr(program, "_functions", {})
    monkeypatch.setattr(program, "_modules", {})
    for cached in caches:
        cached.cache_clear()
    yield fake
    for cached in caches:
        cached.cache_clear()


class Machine:
    """The driver's libraries and the installed packages, as a test says they are."""

    def __init__(self):
        self.capabilities = [(9, 0)]
        self.driver = 13000
        """What libcuda tells; None: it is not there."""
        self.packages = {"cuda-bindings": "13.1.0", "cupy-cuda13x": "14.2.0"}

    def library(self, name, *arguments, **options):
        if name in ("libnvidia-ml.so.1", "nvml.dll", "libcuda.so.1", "nvcuda.dll"):
            if name == ("libcuda.so.1" if self.driver else None) or (name == "libnvidia-ml.so.1" and self.capabilities):
                return self
            raise OSError(f"{name}: cannot open shared object file")
        return self.real(name, *arguments, **options)

    real = ctypes.CDLL

    def version(self, package):
        if package not in self.packages:
            raise PackageNotFoundError(package)
        return self.packages[package]

    def cuDriverGetVersion(self, version):  # noqa: N802
        version._obj.value = self.driver

    def nvmlInit_v2(self):  # noqa: N802
        return 0

    def nvmlDeviceGetCount_v2(self, count):  # noqa: N802
        count._obj.value = len(self.capabilities)

    def nvmlDeviceGetHandleByIndex_v2(self, i, handle):  # noqa: N802
        handle._obj.value = i + 1

    def nvmlDeviceGetCudaComputeCapability(self, handle, major, minor):  # noqa: N802
        major._obj.value, minor._obj.value = self.capabilities[handle.value - 1]

    def nvmlShutdown(self):  # noqa: N802
        pass


@pytest.fixture
def machine(cupy, monkeypatch):
    """A machine on which everything is as it should be."""
    here = Machine()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("ctypes.CDLL", here.library)
    monkeypatch.setattr("importlib.metadata.version", here.version)
    caches = (backends._reasons, program.compiler)
    for cached in caches:
        cached.cache_clear()
    yield here
    for cached in caches:
        cached.cache_clear()


CASE = backends.Case("attention", "bfloat16", 64, 64, 16, (8,))


def refused(*words):
    """cupy_raw cannot run here for one reason, in which these words are."""
    (reason,) = llsa.backends()["cupy_raw"]
    for word in words:
        assert word in reason, reason
    with pytest.raises(RuntimeError, match="backend 'cupy_raw' cannot run here") as caught:
        llsa.precompile("bfloat16", 64, backend="cupy_raw")
    assert reason in str(caught.value)
    assert len(reason) < 400


@on_compiler
def test_a_machine_on_which_all_is_well(machine):
    assert llsa.backends()["cupy_raw"] == llsa.backends()["numba_cuda"] == ()
    assert backends.choose("auto", "cuda:0", CASE).name == "cupy_raw"
    machine.driver = 12000
    machine.packages = {"cuda-bindings": "12.9.0", "cupy-cuda12x": "14.2.0"}
    backends._reasons.cache_clear()
    assert llsa.backends()["cupy_raw"] == llsa.backends()["numba_cuda"] == ()


@on_compiler
@pytest.mark.parametrize("package", ["cuda-bindings", "cupy-cuda13x"])
def test_a_driver_too_old(package, machine):
    machine.driver = 12040
    machine.packages = {"cuda-bindings": "12.9.0"} | {package: machine.packages[package]}
    words = ("driver serves CUDA 12.4", f"{package} (CUDA 13)", "580 or newer", "'llsa-np[cuda12]'")
    refused(*words)
    if package == "cupy-cuda13x":  # which Numba does without
        assert backends.choose("auto", "cuda:0", CASE).name == "numba_cuda"
    else:
        with pytest.raises(ValueError, match=r"cupy_raw: the NVIDIA driver.*numba_cuda: the NVIDIA driver"):
            backends.choose("auto", "cuda:0", CASE)


@on_compiler
def test_no_driver_and_no_device(machine):
    machine.driver = None
    refused("libcuda is missing", "NVIDIA_DRIVER_CAPABILITIES")
    machine.capabilities = []
    backends._reasons.cache_clear()
    refused("no CUDA device", "driver is missing")


@on_compiler
def test_devices_that_are_not_served(machine):
    machine.capabilities = [(7, 5)]
    refused("compute capability 7.5", "8.0 or more")
    machine.capabilities = [(99, 0)]
    backends._reasons.cache_clear()
    refused("does not know sm_990", "sm_90, ", "pip install --upgrade nvidia-cuda-nvrtc")
    machine.capabilities = [(99, 0), (9, 0)]
    backends._reasons.cache_clear()
    assert llsa.backends()["cupy_raw"] == ()


@on_compiler
@pytest.mark.parametrize("what", ["no compiler", "a broken compiler", "no headers"])
def test_a_compiler_that_is_not_there(what, machine, monkeypatch):
    """cuda-core is installed, NVRTC or its headers are not, or cannot be loaded: the next backend serves."""
    from cuda.pathfinder import DynamicLibNotFoundError

    def load(_):
        if what == "no compiler":
            raise DynamicLibNotFoundError("No such file: libnvrtc.so.13")
        raise RuntimeError("Failed to dlopen libnvrtc.so.13: invalid ELF header")

    if what != "no headers":
        monkeypatch.setattr("cuda.pathfinder.load_nvidia_dynamic_lib", load)
        words = ("NVRTC is not installed", "'llsa-np[cuda13]'")
        if what == "a broken compiler":
            words = ("NVRTC cannot be loaded", "invalid ELF header", "--force-reinstall nvidia-cuda-nvrtc")
    else:
        monkeypatch.setattr("cuda.pathfinder.find_nvidia_header_directory", lambda _: None)
        words = ("CUDA's headers are not installed", "'llsa-np[cuda13]'")
    refused(*words)
    assert backends.choose("auto", "cuda:0", CASE).name == "numba_cuda"
    with pytest.raises(RuntimeError, match="precompile: CUDA's ") as caught:
        llsa.precompile("bfloat16", 64, arch="sm_90")
    assert words[0] in str(caught.value)


@on_compiler
@pytest.mark.parametrize("package", ["cupy", "cuda.core", "cuda.bindings"])
def test_a_package_that_is_not_there(package, machine, monkeypatch):
    plain = backends.find_spec
    monkeypatch.setattr(backends, "find_spec", lambda name: None if name == package else plain(name))
    refused(f"not installed: {package.replace('.', '-')} (pip install 'llsa-np[cuda13]'")


@on_compiler
def test_an_error_of_the_compiler_is_told():
    """In one line; its whole log is what that comes from."""
    kernel = QUICK._replace(defines=(("ELEMENT_FLOAT32", "1"), ("WHOLE", "oops(")))
    with pytest.raises(RuntimeError, match=r"cupy_raw: pool\.cu did not compile for sm_90 .*error: ") as caught:
        program.compile_cubin(kernel, "sm_90a")
    assert "\n" not in str(caught.value)
    assert "compilation log" in str(caught.value.__cause__)
    with pytest.raises(RuntimeError, match=r"cupy_raw: NVRTC .* does not know sm_999, but .*sm_90, .*pip install"):
        program.compile_cubin(QUICK, "sm_999")


@on_compiler
def test_a_driver_that_does_not_take_what_was_compiled(cupy, machine, cache_folder):
    cupy.fails_at_load = "CUDA_ERROR_INVALID_IMAGE: device kernel image is invalid"
    told = r"cupy_raw: .* driver, of CUDA 13\.0, does not load pool\.cu .*sm_90: CUDA_ERROR_INVALID_IMAGE.*580 or newer"
    with pytest.raises(RuntimeError, match=told) as caught:
        program.function(QUICK)
    assert isinstance(caught.value.__cause__, FakeCuPy.CUDADriverError)
    cupy.fails_at_load = "CUDA_ERROR_OUT_OF_MEMORY: out of memory"
    with pytest.raises(MemoryError, match=r"no room for pool\.cu, [\d,]+ bytes"):
        program.function(QUICK)
    cupy.fails_at_load = None
    assert program.function(QUICK).name == "pool", "an error is not kept"


@on_compiler
def test_a_driver_that_cupy_does_not_take(cupy, machine):
    """Of a CuPy whose package does not tell what it was built for."""
    machine.driver = 12040
    cupy.fails_at_once = "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version"
    told = r"CuPy, built for CUDA 13\.2, cannot use the NVIDIA driver, of CUDA 12\.4: cudaErrorInsufficientDriver.*580"
    for call in (lambda: program.OnDevice(0).__enter__(), lambda: program.precompile([QUICK], None)):
        with pytest.raises(RuntimeError, match=told) as caught:
            call()
        assert isinstance(caught.value.__cause__, FakeCuPy.CUDARuntimeError)
    cupy.fails_at_once = None
    with program.OnDevice(0):
        assert cupy.device == 0


@on_compiler
def test_threads_that_call_at_once(cupy, cache_folder):
    """A kernel is loaded once, and kernels of one compilation come from one module."""
    kernels = {kernel.name: kernel for kernel in transpose.transpose_kernels()}
    count, place = kernels["count_pairs"], kernels["place_pairs"]
    assert {found.name for found in at_once(lambda: program.function(count))} == {"count_pairs"}
    assert program.function(place).name == "place_pairs"
    program.precompile(transpose.transpose_kernels(), None)
    assert len(cupy.loaded) == 1


def test_memory_that_numba_does_not_get(monkeypatch):
    """Numba has an error of its own for it, which does not tell how much was asked for."""
    ours = pytest.importorskip("llsa_np.adapters.numba_arrays", reason="numba-cuda is not installed")
    named = ours.cuda.cudadrv.driver.CudaAPIError
    error = named(2, "Call to cuMemAlloc results in CUDA_ERROR_OUT_OF_MEMORY")

    def fail(*_):
        raise error

    monkeypatch.setattr(ours.cuda, "device_array", fail)
    monkeypatch.setattr(ours.cuda, "to_device", fail)
    for call in (lambda: ours.empty((2, 3), np.dtype(np.float32)), lambda: to_device(np.zeros(6, np.float32))):
        error.code = 2
        with pytest.raises(MemoryError, match="no memory left for 24 bytes") as caught:
            call()
        assert caught.value.__cause__ is error
        error.code = 999
        with pytest.raises(named):
            call()


# --- arguments

STRUCTS = {
    ("levels.cuh", "Level"): LEVEL,
    ("pool.cu", "Part"): pool.PART,
    ("select.cu", "Arguments"): select.ARGUMENTS.format,
    ("attend.cu", "Arguments"): attend.ARGUMENTS.format,
    ("attend_backward.cu", "Arguments"): attend_backward.ARGUMENTS.format,
    ("transpose.cu", "Arguments"): transpose.ARGUMENTS.format,
    ("unpool.cu", "Arguments"): attend_backward.UNPOOL.format,
    ("unpool.cu", "Finish"): attend_backward.FINISH.format,
    ("unpool.cu", "Gather"): attend_backward.GATHER.format,
    ("unpool.cu", "Clear"): attend_backward.CLEAR.format,
}
"""What kernels take, as C tells it, and the format in which it is packed."""


def spelled_out(packed):
    """A format of `struct` with a letter for every value: "2iq0q" as "iiq"."""
    return re.sub(r"(\d+)(\w)", lambda found: int(found[1]) * found[2], packed)


def body_of(source, name):
    """What stands between a struct's braces, without comments."""
    text = re.sub(r"//[^\n]*", "", (program.FOLDER / source).read_text())
    (body,) = re.findall(rf"struct {name} {{(.*?)}};", text, re.DOTALL)
    return body


def fields_of(source, name):
    """The format of every field of a struct, by its text."""
    kinds = {"i64": "q", "int": "i", "float": "f", "Array": program.ARRAY, "Level": LEVEL}
    fields = {}
    for declaration in filter(None, map(str.strip, body_of(source, name).split(";"))):
        kind, rest = re.fullmatch(r"(?:const )?(\w+)(.*)", declaration, re.DOTALL).groups()
        for field in rest.split(","):
            value = spelled_out("Q" if "*" in rest else kinds[kind])
            fields[re.search(r"\w+", field)[0]] = value * (MOST_LEVELS if "[MOST_LEVELS]" in field else 1)
    return fields


@on_compiler
@pytest.mark.parametrize(("source", "name"), STRUCTS)
def test_arguments_are_packed_as_c_lays_them_out(source, name, tmp_path, cache_folder):
    """Type for type in C's order, and each field where the compiler says that it is."""
    fields, packed = fields_of(source, name), STRUCTS[source, name]
    assert spelled_out(packed) == "".join(fields.values())
    checks, before = [f"sizeof(given::{name}) == {struct.calcsize(packed)}"], ""
    for field, value in fields.items():
        checks.append(f"__builtin_offsetof(given::{name}, {field}) == {struct.calcsize(f'{before}0{value[0]}')}")
        before += value
    file = tmp_path / "layout.cu"
    file.write_text(
        f"#include <levels.cuh>\nstruct Row;\nnamespace given {{ struct {name} {{ {body_of(source, name)} }}; }}\n"
        + "\n".join(f'static_assert({check}, "");' for check in checks)
    )
    program.compile_cubin(program.Kernel(str(file), "", (("ELEMENT_FLOAT32", "1"),), 1), "sm_90")


def test_lists_lie_side_by_side_in_the_arguments():
    """The sizes of the lists go into the gradients' arguments as they come."""
    names = list(fields_of("attend_backward.cu", "Arguments"))
    first = names.index(transpose.Lists._fields[0])
    assert tuple(names[first : first + len(transpose.Lists._fields)]) == transpose.Lists._fields


# --- what is served


@on_compiler
def test_workspace_is_bounded_by_shapes():
    """At 65,536 tokens, batch 2 and 4 heads, forward and backward take less than 100 MiB beyond inputs and results."""
    for tokens, block_size, levels, kept in (
        (2**16, 16, 2, 8),
        (2**16, 16, 3, 8),
        (2**16, 64, 1, 64),
        (2**18, 16, 3, 8),
    ):
        hierarchy = Hierarchy(tokens, block_size, levels)
        options = check_attend_options("test", None, True, None, "full", levels=levels, dim=64)
        spaces = attend_backward.backward_spaces(
            *(2, 8 // 2, 8 // 2, 64, 64, hierarchy, hierarchy, (kept,) * levels, options, frozenset("qkv"))
        )
        size = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in spaces)
        pooled = 2 * 8 * sum(hierarchy.lengths[1:]) * 64 * 2
        selected = 8 * sum(hierarchy.lengths[1:]) * kept * 4
        assert size + pooled + selected <= 100 * 2**20 * tokens // 2**16


def test_refusals_name_what_is_served():
    backend = importlib.import_module("llsa_np.gpu.cupy_raw.backend").backend
    case = backends.Case("attention", "float64", 12, 264, 12, (65,))
    assert backend.refusals(case) == [
        "serves float16, bfloat16, float32, not float64",
        "serves D of 16..256 in steps of 8, not 12",
        "serves Dv of 16..256 in steps of 8, not 264",
        "serves block_size 8, 16, 32, 64, not 12",
        "serves topk of 1..64, not 65",
    ]
    assert backend.refusals(case._replace(dtype="bfloat16", dim=72, value_dim=16, block_size=8, topk=(1, 64))) == []


@emulated
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("block_size", [8, 32])
def test_lists_that_are_cut_into_pieces(block_size, group, monkeypatch):
    """A key block that all queries select makes many pieces of work, and their sum has the same bits again."""
    monkeypatch.setattr(transpose, "LEAST_SPLIT", 2)
    case = Case(dtype="float32", query_tokens=300, key_tokens=2 * block_size + 3, levels=2, topk=1, group=group)
    case = case.but(block_size=block_size, dim=16, value_dim=24, data="one_popular_key")
    of = transpose.lists_of(0, Hierarchy(case.key_tokens, block_size, 2), Hierarchy(300, block_size, 2), 1, group)
    assert 300 * group // 16 > 2 * of.split, "one list is longer than two pieces"
    first = run(case, "cupy_raw", NumPy)
    assert_within_bounds(case, first, reference(case, first.selection))
    again = run(case, "cupy_raw", NumPy, selection=first.selection)
    for name in first.arrays:
        assert_same_bits(first[name], again[name])


BY_ROWS = Case(
    dtype="float32", query_tokens=200, key_tokens=500, block_size=16, levels=2, topk=2, batch=2, dim=16, value_dim=24
)
"""With a ragged last row."""


@pytest.fixture
def by_rows(monkeypatch):
    """Levels whose queries are read row by row although rows are short; and how many such launches were planned."""
    monkeypatch.setattr(attend_backward, "LEAST_ROW_PIECE", 64)
    monkeypatch.setattr(attend_backward, "QUERIES_PER_KEY", 1)
    monkeypatch.setattr(plans, "plans", {})

    def count():
        names = [launch.kernel.name for plan in plans.plans.values() if plan for launch in plan.recording.launches]
        return names.count("key_gradient_rows")

    return count


@emulated
@pytest.mark.parametrize(
    ("case", "levels"),
    [
        (BY_ROWS, 1),
        (BY_ROWS.but(group=2, batch=1, data="one_popular_key"), 1),
        (BY_ROWS.but(block_size=32, key_tokens=2100, batch=1, data="tied"), 1),
        (BY_ROWS.but(levels=3, topk=(2, 2, 1), batch=1), 2),  # one hands down to the next
        (BY_ROWS.but(enrich=(1,), batch=1), 1),  # nothing is handed down to it
        (BY_ROWS.but(dtype="bfloat16", dim=136, value_dim=144, batch=1), 2),  # dk and dv in launches of their own
        (BY_ROWS.but(topk=3), 0),  # a row has two tokens to select
    ],
    ids=["pieces", "group", "two warps a parent", "two levels", "on top", "wide", "empty columns"],
)
def test_queries_read_row_by_row(case, levels, by_rows):
    results = run(case, "cupy_raw", NumPy)
    assert_within_bounds(case, results, reference(case, results.selection))
    assert by_rows() == levels
    again = run(case, "cupy_raw", NumPy, selection=results.selection)
    for name in results.arrays:
        assert_same_bits(results[name], again[name])


@emulated
def test_rows_that_kept_less(by_rows):
    """Or nothing: what other rows have in their places does not count; and each gradient is the same alone."""
    q, k, v, dout, dlse = BY_ROWS.arrays()
    selection = llsa.select(q, k, backend="numpy", **BY_ROWS.select_options)
    levels = [level.copy() for level in selection]
    levels[1][0, :, :, 1] = -1
    levels[1][1, :, :1] = -1
    selection = llsa.Selection(levels, block_size=16, query_tokens=200, key_tokens=500)
    results = run(BY_ROWS, "cupy_raw", NumPy, (q, k, v, dout, dlse), selection)
    assert_within_bounds(BY_ROWS, results, reference(BY_ROWS, selection))
    assert by_rows() == 1
    out, lse = llsa.attend(q, k, v, selection, backend="cupy_raw", **BY_ROWS.attend_options)
    for needed in ("k", "v"):
        alone = llsa.attend_backward(
            *(dout, q, k, v, out, lse, selection),
            **BY_ROWS.attend_options | {"dlse": dlse, "needs": (needed,), "backend": "cupy_raw"},
        )
        assert_same_bits(alone["qkv".index(needed)], results[f"d{needed}"])
    assert by_rows() == 3


@emulated
def test_pieces_of_the_coarsest_level_do_not_depend_on_the_batch(monkeypatch):
    """Nor on the number of heads: a batch entry has the same bits alone."""
    case = Case(dtype="float32", query_tokens=600, key_tokens=90, levels=1, topk=1, batch=2, kv_heads=2, group=1)
    case = case.but(block_size=8, dim=16, value_dim=16)
    assert attend_backward.dense_pieces(600, 1, 12)[0] > 1
    arrays = case.arrays()
    both = run(case, "cupy_raw", NumPy, arrays)
    alone = run(case.but(batch=1), "cupy_raw", NumPy, tuple(x[1:] for x in arrays))
    for name in both.arrays:
        assert_same_bits(both[name][1:], alone[name])


@emulated
@pytest.mark.parametrize(("batch", "group", "length", "columns", "parents"), [(2, 2, 13, 3, 5), (1, 2, 700, 8, 900)])
def test_transpose_is_stable(batch, group, length, columns, parents):
    """Every parent's list is the ascending list of the rows that name it, and the pieces of work add up; also where
    there are more counters than a block adds up at once."""
    kv_heads, run, split = 2, 16, 2
    rng = np.random.default_rng(parents)
    selected = rng.integers(-2, parents + 2, (batch, kv_heads * group, length, columns)).astype(np.int32)
    lists, row_count = batch * kv_heads, group * length
    ranges = min(transpose.MOST_RANGES, transpose.MOST_STARTS * row_count * columns // parents)
    spare = row_count * columns // split
    of = transpose.Lists(length, row_count, columns, parents, ranges, run, 4, 4, split, spare)
    starts, rows, items = (np.full(size, 2**30, np.int32) for size in transpose.transpose_spaces(lists, of))
    recording = Recording()
    arrays = (selected, starts, rows, items)
    stand_ins = [recording.argument(x, numpy_arrays.adapter) for x in arrays]
    transpose.transpose(stand_ins[0], of, kv_heads, *stand_ins[1:], recording)
    launches = program.Launches(recording.launches, {x.ptr: (i, 0) for i, x in enumerate(stand_ins)}, "cpu")
    launches([numpy_arrays.adapter.pointer(x) for x in arrays], 0)
    ends = starts.reshape(lists, -1)[:, ranges - 1 :: ranges][:, :parents]
    rows, items = rows.reshape(lists, -1), items.reshape(lists, -1)
    for i_list, of_list in enumerate(selected.reshape(lists, row_count, columns)):
        start, pieces = 0, 0
        for parent in range(parents):
            expected = np.nonzero(of_list == parent)[0]
            assert rows[i_list, start : ends[i_list, parent]].tolist() == expected.tolist()
            assert items[i_list, parent] == pieces
            pieces += max(1, -(-len(expected) // split))
            start = ends[i_list, parent]
        assert items[i_list, parents] == pieces <= parents + spare


@emulated
@pytest.mark.parametrize("unaligned", [(), (0,), (1,), (2,), (0, 1), (0, 1, 2)], ids=str)
def test_arrays_pooled_in_one_launch(unaligned, monkeypatch):
    """Those whose rows can be moved in pieces, and those whose cannot, with three levels, so that sums go on."""
    case = Case(dtype="float32", query_tokens=600, key_tokens=700, dim=24, value_dim=72, block_size=8, levels=4, topk=2)
    arrays = list(case.but(batch=2, kv_heads=2).arrays())
    for i in unaligned:
        padded = np.zeros((*arrays[i].shape[:3], arrays[i].shape[3] + 1), np.float32)
        padded[..., 1:] = arrays[i]
        arrays[i] = padded[..., 1:]
    q, k, v = arrays[:3]
    options = {"block_size": 8, "levels": 4, "topk": 2, "return_lse": True}
    monkeypatch.setattr(plans, "plans", {})
    results = llsa.attention(q, k, v, backend="cupy_raw", **options)
    (plan,) = plans.plans.values()
    names = [launch.kernel.name for launch in plan.recording.launches]
    kinds = len({0 in unaligned, 1 in unaligned, 2 in unaligned})
    assert names.count("pool") == names.count("pool_sums") == kinds
    for result, expected in zip(results, llsa.attention(q, k, v, backend="numpy", **options)):
        assert abs(result - expected).max() < 1e-5


@emulated
@pytest.mark.parametrize(
    ("dtype", "dim", "value_dim"),
    [
        ("float16", 72, 40),
        ("float32", 72, 40),
        ("bfloat16", 136, 128),
        ("float32", 192, 16),
        ("bfloat16", 256, 200),
        ("float32", 256, 200),
    ],
)
def test_wide_tiles(dtype, dim, value_dim):
    """The others, and the other dtypes, run on GPUs alone: g++ takes half a minute for each."""
    case = Case(dtype=dtype, query_tokens=40, key_tokens=75, dim=dim, value_dim=value_dim, block_size=16, topk=2)
    results = run(case, "cupy_raw", NumPy)
    assert_within_bounds(case, results, reference(case, results.selection))


@emulated
@pytest.mark.parametrize("what", ["barrier", "unwaited", "unaligned"])
def test_the_emulator_catches(what, tmp_path):
    """A barrier that some threads do not reach, a read before a copy was waited for, a misaligned copy."""
    body = {
        "barrier": "if (threadIdx.x) __syncthreads();",
        "unwaited": "copy_async(tile, a.x, true); copies_commit(); a.x[4] = tile[0] == a.x[0]; copies_wait<0>();",
        "unaligned": "copy_async(tile, a.x + 1, true);",
    }[what]
    emulator = Path(__file__).parent / "emulator"
    code = f"""
#include "cuda.h"
#include <instructions.cuh>
struct Arguments {{ float* x; }};
void kernel(Arguments a) {{ alignas(16) static float tile[4]; {body} }}
int main() {{
    alignas(16) float x[8] = {{1, 2, 3, 4}};
    emulator::launch(1, 32, 0, [&] {{ kernel(Arguments{{x}}); }});
    return x[4] == 1;
}}
"""
    command = ["g++", "-std=c++20", "-w", f"-I{emulator}", f"-I{program.FOLDER}", "-x", "c++", "-", "-o"]
    where = tmp_path / "kernel"
    subprocess.run([*command, str(where)], input=code, text=True, check=True)
    done = subprocess.run([str(where)], capture_output=True, text=True, check=False)
    if what == "unwaited":
        assert done.returncode == 0, "the tile held the numbers before they were waited for"
    else:
        assert done.returncode != 0
        assert "emulator:" in done.stderr
