"""Arrays on a GPU of frameworks that nothing names: whose memory, which stream, which device."""

import gc
import importlib.util

import numpy as np
import pytest
from dlpack_producer import Array, lent

import llsa_np as llsa
from llsa_np.backends import serves_gpu

if not serves_gpu() or importlib.util.find_spec("cupy") is None:
    pytest.skip("there is no CUDA device, or no CuPy", allow_module_level=True)

import cupy as cp

from llsa_np.adapters import adapter_of_type

OPTIONS = {"levels": 2, "topk": 4}
DEVICES = range(cp.cuda.runtime.getDeviceCount())


def arrays(device=0, dtype="float32", seed=0):
    """q, k, v of CuPy's, on a device."""
    rng = np.random.default_rng(seed)
    with cp.cuda.Device(device):
        return [cp.asarray(rng.standard_normal((2, heads, 300, 32)), dtype=dtype) for heads in (4, 2, 2)]


def assert_same(ours, theirs):
    for x, y in zip(ours, theirs, strict=True):
        assert x.memory.device == y.device
        assert cp.asnumpy(x.memory).tobytes() == cp.asnumpy(y).tobytes()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_bits_and_the_device_of_cupys_call(backend, device, dtype):
    given = arrays(device, dtype)
    options = OPTIONS | {"backend": backend}
    of = [Array(x) for x in given]
    selection, expected = llsa.select(*of[:2], **options), llsa.select(*given[:2], **options)
    assert_same(selection, expected)
    result, right = (llsa.attend(*x, s, backend=backend) for x, s in ((of, selection), (given, expected)))
    assert_same(result, right)
    gradients = llsa.attend_backward(result[0], *of, *result, selection, backend=backend)
    assert_same(gradients, llsa.attend_backward(right[0], *given, *right, expected, backend=backend))
    assert_same([llsa.attention(*of, **options)], [llsa.attention(*given, **options)])


def test_memory_is_shared_and_given_back(backend, monkeypatch):
    given = arrays()
    llsa.attention(*(Array(x) for x in given), **OPTIONS, backend=backend)
    gc.collect()  # the first call compiles, and what that leaves in cycles is not asked about here
    of, seen, before = [Array(x) for x in given], [], set(lent)
    plain = type(adapter_of_type(Array)).lend

    def lend(self, array, *what):
        found = plain(self, array, *what)
        seen.append(found.data.ptr)
        return found

    monkeypatch.setattr(type(adapter_of_type(Array)), "lend", lend)
    llsa.attention(*of, **OPTIONS, backend=backend)
    assert seen == [x.data.ptr for x in given]
    assert set(lent) == before


@pytest.mark.parametrize("change", [lambda x: x[:, :, ::2], lambda x: x[:, :, ::-1], lambda x: x[:, :, 3:, 8:24]])
def test_strides_and_byte_offset(backend, change):
    given = [change(x) for x in arrays()]
    options = OPTIONS | {"backend": backend}
    assert_same([llsa.attention(*map(Array, given), **options)], [llsa.attention(*given, **options)])


@pytest.mark.parametrize("current", ["default", "another"])
def test_the_producers_stream_is_waited_for(backend, current):
    """It still works on the arrays while the call is made, and is asked for the stream that the kernels are on."""
    options = OPTIONS | {"backend": backend}
    expected = llsa.attention(*arrays(seed=1), **options)
    producers, ours = cp.cuda.Stream(non_blocking=True), cp.cuda.Stream(non_blocking=True)
    given, contents = arrays(), arrays(seed=1)
    busy = cp.ones((4096, 4096), cp.float32)
    busy @ busy
    cp.cuda.Device().synchronize()
    with producers:
        for _ in range(20):
            busy @ busy
        for x, y in zip(given, contents):
            x[...] = y
    of = [Array(x, stream=producers) for x in given]
    with ours if current == "another" else cp.cuda.Stream.null:
        result = llsa.attention(*of, **options)
        stream = cp.cuda.get_current_stream().ptr
        found = cp.asnumpy(result.memory)
    assert {x.asked[-1] for x in of} == {stream or 1}
    assert found.tobytes() == cp.asnumpy(expected).tobytes()


def test_devices_that_disagree(backend):
    (q, k, v), there = arrays(), len(DEVICES)
    assert type(llsa.attention(*map(Array, (q, k, v)), backend=backend)) is Array
    with pytest.raises(
        ValueError, match=rf"q, an array of dlpack_producer is on cuda:{there}, as .* says, and to CuPy"
    ):
        llsa.attention(Array(q, device=(2, there)), Array(k), Array(v))
    with pytest.raises(TypeError, match="q is an array of dlpack_producer and k one of CuPy"):
        llsa.attention(Array(q), k, v)
    with pytest.raises(ValueError, match=r"q is on cuda:0 and k on cpu"):
        llsa.attention(Array(q), Array(cp.asnumpy(k)), Array(v))
    if there > 1:
        with pytest.raises(ValueError, match=r"q, an array of .* is on cuda:1, as .* says, and its memory on cuda:0"):
            llsa.attention(Array(q, device=(2, 1)), Array(k), Array(v))
        with pytest.raises(ValueError, match="q is on cuda:0 and k on cuda:1"):
            llsa.attention(Array(q), *map(Array, arrays(1)[1:]))


def test_another_library(backend):
    """Whose arrays and streams are its own."""
    tvm_ffi = pytest.importorskip("tvm_ffi", reason="apache-tvm-ffi is not installed")
    given = arrays()
    of = [tvm_ffi.from_dlpack(x) for x in given]
    out = llsa.attention(*of, **OPTIONS, backend=backend)
    assert type(out) is type(of[0])
    expected = llsa.attention(*given, **OPTIONS, backend=backend)
    assert cp.asnumpy(cp.from_dlpack(out)).tobytes() == cp.asnumpy(expected).tobytes()
