"""JAX on a GPU: whose memory and whose stream, and XLA's graphs."""

import numpy as np
import pytest
from calls import assert_same_bits
from frameworks import HAS_JAX

import llsa_np as llsa
from llsa_np.backends import serves_gpu

if not HAS_JAX or not serves_gpu():
    pytest.skip("there is no CUDA device, or no JAX", allow_module_level=True)

import jax
import jax.numpy as jnp

from llsa_np.adapters import jax_arrays

if "cuda" not in {device.platform.replace("gpu", "cuda") for device in jax.devices()}:
    pytest.skip("JAX has no CUDA device", allow_module_level=True)

OPTIONS = {"levels": 2, "topk": 4}


def on_gpu(seed=0, tokens=300, dtype="float32"):
    """q, k, v, 16-bit or 32-bit."""
    keys = jax.random.split(jax.random.key(seed), 3)
    return [jax.random.normal(key, (2, heads, tokens, 32), dtype) for key, heads in zip(keys, (4, 2, 2))]


def host(results):
    return [np.asarray(x) for x in jax.tree.leaves(results)]


def assert_same(ours, theirs):
    for x, y in zip(host(ours), host(theirs), strict=True):
        assert_same_bits(x, y)


def training_step(backend):
    def loss(q, k, v):
        out, lse = llsa.attention(q, k, v, return_lse=True, backend=backend, **OPTIONS)
        return jnp.square(out.astype("float32")).sum() + lse.sum()

    return jax.value_and_grad(loss, argnums=(0, 1, 2))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_same_bits_as_other_frameworks(backend, dtype):
    """CuPy's arrays of the same numbers."""
    cupy = pytest.importorskip("cupy", reason="cupy is not installed")
    q, k, v = on_gpu(dtype=dtype)
    ours = llsa.attention(q, k, v, return_lse=True, backend=backend, **OPTIONS)
    theirs = llsa.attention(
        *(cupy.asarray(np.asarray(x)) for x in (q, k, v)), return_lse=True, backend=backend, **OPTIONS
    )
    assert_same(ours, [cupy.asnumpy(x) for x in theirs])


def test_memory_is_xlas_own(backend, monkeypatch):
    """The kernels read the caller's arrays and fill the results where they lie, the workspace comes from XLA, and CuPy
    allocates nothing."""
    cupy = pytest.importorskip("cupy", reason="cupy is not installed")
    seen, plain = [], jax_arrays.Call.__call__

    def spied(self, context, out, *given):
        seen.append([jax_arrays.pointer(x, False) for x in (*given, *out)])
        return plain(self, context, out, *given)

    monkeypatch.setattr(jax_arrays.Call, "__call__", spied)
    q, k, v = on_gpu(tokens=301)
    pool = cupy.get_default_memory_pool()
    before = pool.total_bytes()
    selection = llsa.select(q, k, backend=backend, **OPTIONS)
    out, lse = llsa.attend(q, k, v, selection, backend=backend)
    jax.block_until_ready((out, lse))
    assert pool.total_bytes() == before
    first, second = seen
    assert first[:2] == [x.unsafe_buffer_pointer() for x in (q, k)]
    assert first[2 : 2 + len(selection)] == [x.unsafe_buffer_pointer() for x in selection]
    inputs = [q, k, v, *selection]
    assert second[: len(inputs) + 2] == [x.unsafe_buffer_pointer() for x in (*inputs, out, lse)]


@pytest.mark.parametrize("wrapped", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_contents_may_change(backend, wrapped):
    """What XLA keeps of a call, a graph of its kernels among it, reads the arrays of the next call."""
    step = wrapped(training_step(backend))
    reference = training_step(backend)
    for seed in range(6):
        of = on_gpu(seed)
        assert_same(step(*of), reference(*of))


def test_many_calls_in_one_program(backend):
    """One behind the other, on XLA's stream."""
    q, k, v = on_gpu()

    def layer(x):
        return llsa.attention(x, k, v, backend=backend, **OPTIONS)

    looped = jax.jit(lambda q: jax.lax.scan(lambda x, _: (layer(x), None), q, length=8)[0])(q)
    expected = q
    for _ in range(8):
        expected = layer(expected)
    assert_same(looped, expected)


def test_arrays_on_the_host_are_not_moved(backend):
    q, k, v = (jax.device_put(x, jax.devices("cpu")[0]) for x in on_gpu())
    with pytest.raises(ValueError, match=r"the arrays are on cpu"):
        llsa.attention(q, k, v, backend=backend)
    out = llsa.attention(q, k, v, **OPTIONS)
    assert out.devices() == q.devices()
    assert_same(out, llsa.attention(*(np.asarray(x) for x in (q, k, v)), **OPTIONS))
    on_both = (q, *on_gpu()[1:])
    with pytest.raises(ValueError, match=r"q is on cpu and k on cuda:0"):
        llsa.attention(*on_both)


def test_a_host_backend_for_arrays_on_a_gpu(backend):
    with pytest.raises(ValueError, match=r"the arrays are on cuda:0"):
        llsa.attention(*on_gpu(), backend="numpy")


def test_the_second_gpu(backend):
    if len(jax.devices("cuda")) < 2:
        pytest.skip("there is one GPU")
    of = on_gpu()
    there = [jax.device_put(x, jax.devices("cuda")[1]) for x in of]
    step = jax.jit(training_step(backend))
    results = step(*there)
    assert results[1][0].devices() == {jax.devices("cuda")[1]}
    assert_same(results, step(*of))
    mesh = jax.make_mesh((2,), ("a",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices("cuda")[:2])
    spec = jax.sharding.PartitionSpec("a")
    sharded = jax.shard_map(
        lambda *x: llsa.attention(*x, backend=backend, **OPTIONS), mesh=mesh, in_specs=spec, out_specs=spec
    )
    assert_same(jax.jit(sharded)(*of), llsa.attention(*of, backend=backend, **OPTIONS))
