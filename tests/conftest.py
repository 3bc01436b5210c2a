"""Backends and frameworks as parameters, poisoned outputs, and the last lines that say what ran."""

import os
import sys
from collections import Counter, defaultdict
from contextlib import contextmanager, nullcontext

import frameworks
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from strategies import EMULATED, SIMULATED, running

import llsa_np as llsa
from llsa_np.adapters.numpy_arrays import NumpyAdapter

if SIMULATED:
    import simulator

    simulator.install()
if EMULATED:
    import cuda_emulator

    cuda_emulator.install()

settings.register_profile(
    "suite",
    deadline=None,
    derandomize=True,  # the same cases on every run; `llsa check` is where new ones come from
    print_blob=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


BACKENDS = [name for name, reasons in llsa.backends().items() if not reasons]


def pytest_addoption(parser):
    parser.addoption(
        "--backend", choices=("numba_cuda", "cupy_raw"), help="test this backend's calls and kernels alone"
    )


def pytest_configure(config):
    """In the simulator's own process the Numba kernels alone are tested, in the emulator's those in CUDA C++."""
    if SIMULATED or EMULATED:
        config.option.backend = "numba_cuda" if SIMULATED else "cupy_raw"
    if config.option.backend:
        BACKENDS[:] = [config.option.backend]


def pytest_generate_tests(metafunc):
    """`backend` and `framework`: every backend that can run here, with the arrays of every framework it serves.

    tests/test_backends.py skips once for each backend that cannot run.
    """
    pairs = [(backend, framework) for backend in BACKENDS for framework in frameworks.OF_BACKEND[backend]]
    needed = {"backend", "framework"} & set(metafunc.fixturenames)
    if len(needed) == 2:
        names = [f"{backend}-{framework.name}" for backend, framework in pairs]
        metafunc.parametrize(("backend", "framework"), pairs, ids=names, scope="session")
    elif "backend" in needed:
        metafunc.parametrize("backend", BACKENDS, scope="session")
    elif "framework" in needed:
        able = [framework for framework in dict.fromkeys(f for _, f in pairs) if framework.has_operations]
        metafunc.parametrize("framework", able, ids=[f.name for f in able], scope="session")


def pytest_collection_modifyitems(config, items):
    """Of one backend only what calls it, and its kernels' own tests."""
    if config.option.backend:
        own = {"numba_cuda": "_numba_kernels", "cupy_raw": ("_cuda_kernels", "_plans")}[config.option.backend]
        ours = [
            item
            for item in items
            if item.path.stem.endswith(own) or "backend" in getattr(getattr(item, "callspec", None), "params", ())
        ]
        config.hook.pytest_deselected(items=[item for item in items if item not in ours])
        items[:] = ours


@contextmanager
def fewer_cases(test, share):
    """A property's test draws one in so many of its cases."""
    drawn = getattr(test, "_hypothesis_internal_use_settings", None)
    if drawn is None or share == 1:
        yield
        return
    test = getattr(test, "__func__", test)
    test._hypothesis_internal_use_settings = settings(drawn, max_examples=-(-drawn.max_examples // share))
    try:
        yield
    finally:
        test._hypothesis_internal_use_settings = drawn


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Cases are drawn such that the test's backend serves them. A case that is written out and that it refuses is
    skipped, with its words."""
    params = getattr(getattr(item, "callspec", None), "params", {})
    backend, share = params.get("backend"), getattr(params.get("framework"), "share", 1)
    running["backend"] = backend
    try:
        with fewer_cases(item.obj, share):
            return (yield)
    except NotImplementedError as refusal:
        if backend == "cupy_raw" and "cupy_raw serves" in str(refusal):
            pytest.skip(str(refusal))
        raise
    finally:
        running["backend"] = None


def poison(array):
    """NaN everywhere, or indices that are out of range; in a workspace of bytes both, whatever they are read as."""
    device = getattr(array, "device", None)
    with device if hasattr(device, "use") else nullcontext():  # CuPy's, which works on the current one
        fill_with_poison(array)


def fill_with_poison(array):
    """The same, on the current device."""
    if str(array.dtype) in ("uint8", "torch.uint8"):
        value = 0x7FFF
        if hasattr(array, "fill_"):
            array.view(sys.modules["torch"].int16).fill_(value)
        elif hasattr(array, "fill"):
            array.view(np.int16).fill(value)
        else:
            array.copy_to_device(np.full(array.size // 2, value, np.int16).view(np.uint8))
        return
    if hasattr(array, "fill_"):  # a tensor, of torch's own dtypes
        array.fill_(np.nan if array.is_floating_point() else 2**30)
        return
    value = np.nan if array.dtype.kind in "fV" else 2**30  # ml_dtypes' bfloat16 is of kind V
    if hasattr(array, "fill") and array.dtype.name == "bfloat16":
        array.view(np.uint16).fill(0x7FC0)
    elif hasattr(array, "fill"):
        array.fill(value)
    else:  # bit for bit, as NumPy lends nobody the memory of a bfloat16 array
        from llsa_np.gpu.numba_cuda.cuda import with_dtype

        bits = np.dtype(f"u{array.dtype.itemsize}")
        with_dtype(array, bits).copy_to_device(np.full(array.shape, value, array.dtype).view(bits))


def poison_jax():
    """Buffers that XLA hands out for results and workspace, on a CPU; on a GPU those that CuPy can reach."""
    from llsa_np.adapters import jax_arrays

    plain = jax_arrays.Call.__call__

    def poisoned(self, context, out, *given):
        for buffer in out:
            if self.device == "cpu":
                poison(np.asarray(buffer))
            elif 0 not in buffer.shape:
                import cupy

                with cupy.cuda.Stream.from_external(FromXLA(context.stream)):
                    cupy.asarray(AsBytes(buffer)).fill(0xFF)  # NaN, and -1
        return plain(self, context, out, *given)

    jax_arrays.Call.__call__ = poisoned


class FromXLA:
    """A stream by its address, as CUDA's protocol has it."""

    def __init__(self, address):
        self.address = address

    def __cuda_stream__(self):
        return 0, self.address


class AsBytes:
    """A buffer's memory."""

    def __init__(self, buffer):
        of = buffer.__cuda_array_interface__
        size = int(np.prod(of["shape"])) * np.dtype(of["typestr"]).itemsize
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": of["data"], "version": 3}


@pytest.fixture(scope="session", autouse=True)
def poisoned_outputs():
    """New arrays, workspaces included, are poisoned, so that what a backend does not write cannot pass."""
    adapters = {"numpy": NumpyAdapter}
    if any(frameworks.Numba in frameworks.OF_BACKEND[backend] for backend in BACKENDS):
        from llsa_np.adapters.numba_arrays import NumbaAdapter

        adapters["numba"] = NumbaAdapter
    if frameworks.HAS_TORCH:
        from llsa_np.adapters.pytorch import TorchAdapter

        adapters["torch"] = TorchAdapter
    if frameworks.HAS_CUPY:
        from llsa_np.adapters.cupy_arrays import CupyAdapter

        adapters["cupy"] = CupyAdapter
    if frameworks.HAS_JAX:
        poison_jax()
    plain = {adapter: adapter.maker for adapter in adapters.values()}

    def poisoned(self, *args):
        make = plain[type(self)](self, *args)

        def made():
            array = make()
            poison(array)
            return array

        return made

    for adapter in plain:
        adapter.maker = poisoned
    yield
    for adapter, maker in plain.items():
        adapter.maker = maker


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    name = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
    if name and report.when == "call":
        report.user_properties.append(("backend", name))


def pytest_terminal_summary(terminalreporter):
    """Which backends ran, and why others did not: a green run cannot hide one. And which kernels were compiled."""
    told = defaultdict(list)
    for status in ("passed", "failed"):
        for report in terminalreporter.stats.get(status, []):
            for key, value in report.user_properties:
                told[key].append(value)
    counts = Counter(told["backend"])
    terminalreporter.section("backends")
    for name, reasons in llsa.backends().items():
        line = (
            f"{name}: {counts[name]} tests ran"
            if counts[name] or not reasons
            else f"{name}: not run: {'; '.join(reasons)}"
        )
        terminalreporter.write_line(line)
    if told["compiled"]:
        tiles = ", ".join(sorted(told["compiled of"]))
        number = f"{sum(told['compiled'])} of {max(told['programs'])} programs"
        terminalreporter.write_line(f"compiled: {number}, of {tiles}. `make kernels` compiles the others")
