"""Frameworks that nothing names: their arrays go through DLPack, and come back as their own."""

import enum
import gc
import importlib.util
import sys
import types

import numpy as np
import pytest
from calls import assert_same_bits
from dlpack_producer import Array, lent
from hypothesis import given, settings
from strategies import EMULATED, SIMULATED, cases

import llsa_np as llsa
from llsa_np.adapters import ADAPTERS, adapter_of_type

if SIMULATED or EMULATED:
    pytest.skip("arrays go through DLPack without a simulator", allow_module_level=True)

PRODUCERS = {"array_api_strict": "asarray", "mlx": "array", "tvm_ffi": "from_dlpack"}
DTYPES = ("float16", "float32")


@pytest.fixture(params=PRODUCERS, scope="module")
def package(request):
    """The name of a framework's top module."""
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return request.param


def made(package, x):
    """An array of a framework, from NumPy's."""
    module = importlib.import_module("mlx.core" if package == "mlx" else package)
    return getattr(module, PRODUCERS[package])(np.array(x, order="C"))


def back(x):
    return np.from_dlpack(x)


def assert_same(ours, theirs, like):
    for x, y in zip(ours, theirs, strict=True):
        assert type(x) is type(like)
        assert_same_bits(np.asarray(back(x)), np.asarray(y))


@settings(max_examples=25)
@given(case=cases(dtypes=("float32",)))
def test_the_same_bits_as_numpys(package, case):
    given = [made(package, x) for x in case.arrays()]
    q, k, v, dout, dlse = given
    host = [np.ascontiguousarray(x) for x in case.arrays()]
    selection, of = llsa.select(q, k, **case.select_options), llsa.select(*host[:2], **case.select_options)
    assert_same(selection, of, q)
    result, expected = (
        llsa.attend(q, k, v, selection, **case.attend_options),
        llsa.attend(*host[:3], of, **case.attend_options),
    )
    assert_same(result, expected, q)
    gradients = llsa.attend_backward(dout, q, k, v, *result, selection, dlse=dlse, **case.attend_options)
    assert_same(
        gradients,
        llsa.attend_backward(host[3], *host[:3], *expected, of, dlse=host[4], **case.attend_options),
        q,
    )
    options = case.select_options | case.attend_options
    assert_same([llsa.attention(q=q, k=k, v=v, **options)], [llsa.attention(*host[:3], **options)], q)


def arrays(package, dtype="float32"):
    if package == "array_api_strict" and dtype == "float16":
        pytest.skip("the array API has no float16")
    rng = np.random.default_rng(0)
    return [made(package, rng.standard_normal((1, 2, 30, 8)).astype(dtype)) for _ in range(3)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_parts_around_attention(package, dtype):
    q, k, v = arrays(package, dtype)
    host = [back(x) for x in (q, k, v)]
    assert_same(llsa.pool(q, block_size=4, levels=2), llsa.pool(host[0], block_size=4, levels=2), q)
    selection = llsa.select(q, k, block_size=4)
    pair = llsa.attend(q, k, v, selection)
    assert_same(llsa.merge(pair, pair), llsa.merge(*[[back(x) for x in pair]] * 2), q)
    mass, error = llsa.coverage(q, k, selection, v)
    expected = llsa.coverage(*host[:2], llsa.select(*host[:2], block_size=4), host[2])
    assert np.array_equal(mass, expected[0])
    assert np.array_equal(error, expected[1])
    again = llsa.Selection(list(selection), block_size=4, query_tokens=30, key_tokens=30)
    assert_same(llsa.attend(q, k, v, again), [back(x) for x in pair], q)
    assert llsa.attend_backward(pair[0], q, k, v, *pair, selection, needs=("k",))[0] is None


def test_memory_is_shared(package, monkeypatch):
    """On the way in the reference reads the producer's own memory."""
    seen = []
    of = adapter_of_type(type(arrays(package)[0]))
    plain = type(of).lend

    def lend(self, array, *what):
        lent = plain(self, array, *what)
        seen.append((back(array).ctypes.data, lent.ctypes.data))
        return lent

    monkeypatch.setattr(type(of), "lend", lend)
    llsa.attention(*arrays(package), block_size=4)
    assert len(seen) >= 3
    assert all(theirs == ours for theirs, ours in seen)


def test_what_is_mixed_is_named(package):
    q, k, v = arrays(package)
    with pytest.raises(TypeError, match=f"q is an array of {package} and k one of NumPy"):
        llsa.attention(q, back(k), v)
    with pytest.raises(TypeError, match=f"q is an array of NumPy and k one of {package}"):
        llsa.attention(back(q), k, v)
    others = [x for x in PRODUCERS if x != package and importlib.util.find_spec(x)]
    for other in others:
        with pytest.raises(TypeError, match=f"v one of {other}"):
            llsa.attention(q, k, made(other, back(v).copy()))
    for backend in ("numba_cuda", "cupy_raw"):
        with pytest.raises((ValueError, RuntimeError), match=backend):
            llsa.attention(q, k, v, backend=backend)


def test_a_dtype_that_does_not_go_through():
    mlx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    q, k, v = (x.astype(mlx.bfloat16) for x in arrays("mlx"))
    with pytest.raises(TypeError, match=r"^attention: q, an array of mlx .*bfloat16.*convert it to float32 or float16"):
        llsa.attention(q, k, v)


class Elsewhere:
    """An array on a device that no backend serves."""

    def __dlpack__(self, **_):
        raise BufferError

    def __dlpack_device__(self):
        return (14, 0)


class NoWayBack:
    """An array whose framework has no from_dlpack."""

    def __init__(self, x):
        self.x = x

    def __dlpack__(self, **options):
        return self.x.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.x.__dlpack_device__()


def test_what_no_backend_serves_says_so():
    with pytest.raises(ValueError, match="oneAPI, which no backend serves"):
        llsa.pool(Elsewhere())
    x = np.ones((1, 1, 4, 2), np.float32)
    with pytest.raises(TypeError, match="pool: x is an array of test_dlpack, which has no from_dlpack"):
        llsa.pool(NoWayBack(x))
    for place in ((StrangeKind.A, 0), None, 1, ("cpu", 0)):
        with pytest.raises((TypeError, ValueError), match="pool: x, an array of"):
            llsa.pool(Array(x, device=place or (None,)))
    llsa.pool(Array(x, device=(1, None)))


class StrangeKind(enum.Enum):
    A = 7


def test_errors_name_what_the_caller_gave():
    xp = pytest.importorskip("array_api_strict", reason="array_api_strict is not installed")
    q, h = xp.ones((1, 1, 8, 2)), np.ones((1, 1, 8, 2))
    selection = llsa.select(q, q, block_size=2)
    out, lse = llsa.attend(q, q, q, selection)
    of_lse = np.ones((1, 1, 8))
    for words, call in (
        ("pair 0 is a array_api_strict", lambda: llsa.merge(out, lse)),
        (
            "merge: out of pair 0 is an array of array_api_strict and lse of pair 0 one of NumPy",
            lambda: llsa.merge((out, of_lse)),
        ),
        ("selection is a list", lambda: llsa.attend(q, q, q, list(selection))),
        ("q is a list", lambda: llsa.attention([q, q], q, q)),
        ("v is a list", lambda: llsa.attention(q, q, h.tolist())),
        ("q is an array of array_api_strict and v one of NumPy", lambda: llsa.attention(q, q, h)),
        ("coverage: q is an array of array_api_strict and k one of NumPy", lambda: llsa.coverage(q, h, selection)),
    ):
        with pytest.raises(TypeError, match=words):
            call()


def test_a_dtype_that_is_lost_on_the_way_back():
    mlx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    with mlx.stream(mlx.cpu):
        x = mlx.array(np.ones((1, 1, 4, 2)), dtype=mlx.float64)
        with pytest.raises(
            TypeError, match=r"x is an array of mlx, whose from_dlpack makes .*float32 of a result's float64"
        ):
            llsa.pool(x)


def strided(x):
    """The same memory seen with gaps, backwards, with axes exchanged and from its middle."""
    return (x, x[:, :, ::2], x[:, :, ::-1], x[..., ::-2], x.swapaxes(1, 2)[:, :30], x[:, :, 3:40, 4:12])


def test_read_only_memory():
    """Of a producer that exports it."""
    xp = pytest.importorskip("array_api_strict", reason="array_api_strict is not installed")
    for seen in strided(np.random.default_rng(0).standard_normal((1, 2, 60, 16)).astype(np.float32)):
        seen.flags.writeable = False
        (level,) = llsa.pool(xp.from_dlpack(seen), block_size=4)
        assert_same([level], llsa.pool(seen, block_size=4), xp.asarray([1.0]))


def test_strides_and_byte_offset():
    """Negative strides, none, and a start that is not where the pointer points; all is given back at the end."""
    x = np.random.default_rng(0).standard_normal((1, 2, 60, 16)).astype(np.float32)
    for seen in strided(x):
        q = Array(seen)
        assert_same([llsa.attention(q, q, q, block_size=4)], [llsa.attention(seen, seen, seen, block_size=4)], q)
    assert_same(llsa.pool(Array(x, has_strides=False)), llsa.pool(x), q)
    del q
    gc.collect()
    assert not lent


def test_a_gpu_without_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    x = np.ones((1, 1, 4, 2), np.float32)
    with pytest.raises(
        ValueError, match=r"pool: x, an array of dlpack_producer is on cuda:0; .*CuPy, which is not ins"
    ):
        llsa.pool(Array(x, device=(2, 0)))


@pytest.mark.parametrize("package", ["torch", "cupy", "jax", "numba"])
def test_a_framework_that_is_half_installed(package, monkeypatch):
    """It made an array, and its adapter cannot be imported."""
    monkeypatch.setitem(sys.modules, ADAPTERS[package], None)
    monkeypatch.delattr(llsa.adapters, ADAPTERS[package].rpartition(".")[2], raising=False)
    monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    kind = type("Half", (), {"__module__": f"{package}.arrays"})
    with pytest.raises(ImportError, match=f"arrays of {package} cannot be read, as {package} is installed in part"):
        llsa.pool(kind())
    whole = type("Array", (), {"__module__": f"{package}.arrays", "as_subclass": None})
    monkeypatch.setattr(
        sys.modules[package], {"torch": "Tensor", "jax": "Array"}.get(package, "other"), whole, raising=False
    )
    with pytest.raises(ImportError, match=f"arrays of {package} cannot be read"):
        llsa.pool(whole())
    x = np.ones((1, 1, 4, 2), np.float32)
    assert type(llsa.pool(x)[0]) is np.ndarray
