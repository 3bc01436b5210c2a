"""JAX: what makes a call one of its own functions. The numbers themselves the rest of the suite checks."""

import gc
import weakref
from functools import partial

import numpy as np
import pytest
from calls import assert_same_bits
from frameworks import HAS_JAX
from hypothesis import given, settings
from hypothesis import strategies as st

import llsa_np as llsa

if not HAS_JAX:
    pytest.skip("JAX is not installed, or kernels are simulated", allow_module_level=True)

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llsa_np import plans
from llsa_np.adapters import jax_arrays
from llsa_np.backends import Room
from llsa_np.recording import StandIn

OPTIONS = {"block_size": 4, "topk": 2, "levels": 2}


def arrays(batch=2, heads=4, kv_heads=2, queries=37, keys=41, dim=8, value_dim=6, dtype=np.float32, seed=0):
    """q, k, v of NumPy."""
    rng = np.random.default_rng(seed)
    shapes = (heads, queries, dim), (kv_heads, keys, dim), (kv_heads, keys, value_dim)
    return [rng.standard_normal((batch, *shape)).astype(dtype) for shape in shapes]


def on_jax(of):
    return [jnp.asarray(x) for x in of]


def loss(q, k, v):
    """A number that depends on out and lse, with cotangents of 1."""
    out, lse = llsa.attention(q, k, v, return_lse=True, **OPTIONS)
    return out.sum() + lse.sum()


def expected_gradients(q, k, v):
    """Of `loss`, by NumPy."""
    out, lse = llsa.attention(q, k, v, return_lse=True, **OPTIONS)
    selection = llsa.select(q, k, **OPTIONS)
    return llsa.attend_backward(np.ones_like(out), q, k, v, out, lse, selection, dlse=np.ones_like(lse))


def assert_same(ours, theirs):
    for x, y in zip(ours, theirs, strict=True):
        assert_same_bits(np.asarray(x), y)


@pytest.mark.parametrize("wrapped", [lambda f: f, jax.jit, jax.checkpoint], ids=["eager", "jit", "checkpoint"])
@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (0, 2), (0, 1, 2)], ids=str)
def test_gradients_that_are_asked_for(wrapped, asked, monkeypatch):
    """And no others."""
    needs = set()
    plain = jax_arrays.Call.__call__

    def seen(self, *given):
        if self.operation.name == "attend_backward":
            needs.update(dict(self.operation.options)["needs"])
        return plain(self, *given)

    monkeypatch.setattr(jax_arrays.Call, "__call__", seen)
    of = arrays(seed=hash(asked) % 100)
    found = jax.grad(wrapped(loss), argnums=asked)(*on_jax(of))
    assert_same(found, [expected_gradients(*of)[i] for i in asked])
    assert needs == {"qkv"[i] for i in asked}


@pytest.mark.parametrize("wrapped", [lambda f: f, jax.jit, jax.checkpoint], ids=["eager", "jit", "checkpoint"])
def test_calls_that_ask_for_other_gradients(wrapped):
    """In one program, and one after another: what one asks for the next one neither loses nor gets."""
    q, k, v = on_jax(arrays(heads=2, queries=41, value_dim=8))
    frozen = k + 1, v

    def twice(q, k, v):
        return llsa.attention(llsa.attention(q, k, v, **OPTIONS), *frozen, **OPTIONS).sum()

    middle, back = jax.vjp(lambda *x: llsa.attention(*x, **OPTIONS), q, k, v)
    expected = back(jax.grad(lambda x: llsa.attention(x, *frozen, **OPTIONS).sum())(middle))
    assert_same(jax.grad(wrapped(twice), argnums=(0, 1, 2))(q, k, v), [np.asarray(x) for x in expected])
    of_all = expected_gradients(*map(np.asarray, (q, k, v)))
    for asked in ((0, 1, 2), (0,), (0, 1, 2), (1,), (1, 2), (0, 1, 2)):
        assert_same(jax.grad(wrapped(loss), argnums=asked)(q, k, v), [of_all[i] for i in asked])


@pytest.mark.parametrize("result", [0, 1], ids=["out", "lse"])
def test_a_gradient_of_one_result(result):
    of = arrays()
    out, lse = llsa.attention(*of, return_lse=True, **OPTIONS)
    dout, dlse = (np.ones_like(out), None) if result == 0 else (np.zeros_like(out), np.ones_like(lse))
    expected = llsa.attend_backward(dout, *of, out, lse, llsa.select(*of[:2], **OPTIONS), dlse=dlse)
    of_one = jax.grad(lambda *x: llsa.attention(*x, return_lse=True, **OPTIONS)[result].sum(), argnums=(0, 1, 2))
    assert_same(of_one(*on_jax(of)), expected)


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_a_selection_crosses_jit(layout):
    """As a result, as an argument and inside; and gradients of attend know it."""
    of = arrays()
    if layout == "bnhd":
        of = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in of]
    options = {"layout": layout}
    q, k, v = on_jax(of)
    selection = jax.jit(lambda q, k: llsa.select(q, k, **OPTIONS, **options))(q, k)
    expected = llsa.select(*of[:2], **OPTIONS, **options)
    assert_same(selection, expected)
    assert repr(selection) == repr(expected)
    result = jax.jit(lambda q, k, v, s: llsa.attend(q, k, v, s, **options))(q, k, v, selection)
    assert_same(result, llsa.attend(*of, expected, **options))

    def together(q, k, v, selection):
        return sum(x.sum() for x in llsa.attend(q, k, v, selection, **options))

    ones = [np.ones_like(np.asarray(x)) for x in result]
    outs = [np.asarray(x) for x in result]
    gradients = llsa.attend_backward(ones[0], *of, *outs, expected, dlse=ones[1], **options)
    assert_same(jax.grad(together, argnums=(0, 1, 2))(q, k, v, selection), gradients)
    inside = jax.jit(jax.grad(lambda q: together(q, k, v, llsa.select(q, k, **OPTIONS, **options))))
    assert_same([inside(q)], gradients[:1])


@settings(max_examples=6)
@given(data=st.data())
def test_vmap(data):
    """Over any axis of any of the arrays, twice too, is a loop."""
    size = data.draw(st.integers(1, 3))
    axes = data.draw(st.tuples(*[st.sampled_from([None, 0, 1, 2, 4])] * 3).filter(any_mapped))
    one = arrays(batch=1, queries=9, keys=10)
    many = [x if axis is None else np.stack([(i + 1) * x for i in range(size)], axis) for x, axis in zip(one, axes)]
    mapped = jax.vmap(lambda q, k, v: (llsa.attention(q, k, v, **OPTIONS), *jax.grad(loss, (0, 1))(q, k, v)), axes)
    found = mapped(*on_jax(many))
    for i in range(size):
        of = [x if axis is None else (i + 1) * x for x, axis in zip(one, axes)]
        assert_same([x[i] for x in found], [llsa.attention(*of, **OPTIONS), *expected_gradients(*of)[:2]])
    twice = jax.vmap(mapped)(*(jnp.stack([x, x]) for x in on_jax(many)))
    assert_same([x[1] for x in twice], [np.asarray(x) for x in found])


def any_mapped(axes):
    return any(axis is not None for axis in axes)


def test_vmap_of_a_selection():
    q, k, v = (np.stack([x, 2 * x]) for x in arrays())

    def both(q, k, v):
        selection = llsa.select(q, k, **OPTIONS)
        return selection, llsa.attend(q, k, v, selection)

    selections, results = jax.vmap(both)(*on_jax((q, k, v)))
    for i in range(2):
        expected = llsa.select(q[i], k[i], **OPTIONS)
        assert_same([x[i] for x in selections], expected)
        assert_same([x[i] for x in results], llsa.attend(q[i], k[i], v[i], expected))


MESHES = {
    "batch and heads": (PartitionSpec("a", "b"), PartitionSpec("a", "b")),
    "heads": (PartitionSpec(None, ("a", "b")), PartitionSpec(None, ("a", "b"))),
    "keys that all share": (PartitionSpec("a", "b"), PartitionSpec(None, "b")),
}


@pytest.mark.parametrize("spec", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("jitted", [True, False], ids=["jit", "eager"])
def test_shard_map(spec, jitted):
    """Over batch and heads: the same bits, and gradients of what all shards share are summed over them."""
    if len(jax.devices("cpu")) < 4:
        pytest.skip("another flag than the suite's says how many CPU devices XLA makes")
    of_q, of_keys = spec
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices("cpu"))
    q, k, v = arrays(kv_heads=4)
    if of_keys[0] is None and of_q[0] is not None:
        k, v = k[:1], v[:1]
    whole = [q, *(np.repeat(x, q.shape[0] // x.shape[0], 0) for x in (k, v))]
    attention = jax.shard_map(
        lambda *x: llsa.attention(*x, return_lse=True, **OPTIONS),
        mesh=mesh,
        in_specs=(of_q, of_keys, of_keys),
        out_specs=(of_q, of_q),
    )
    attention = jax.jit(attention) if jitted else attention
    assert_same(attention(*on_jax((q, k, v))), llsa.attention(*whole, return_lse=True, **OPTIONS))
    found = jax.grad(lambda *x: sum(y.sum() for y in attention(*x)), argnums=(0, 1, 2))(*on_jax((q, k, v)))
    expected = [dx.reshape(-1, *x.shape).sum(0) for dx, x in zip(expected_gradients(*whole), (q, k, v))]
    assert_same(found, expected)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_shard_map_over_grouped_heads(kv_heads):
    """Of key heads fewer than devices: repeated first, or a single one shared."""
    mesh = jax.make_mesh((4,), ("h",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices("cpu")[:4])
    of = arrays(heads=8, kv_heads=kv_heads)
    q, k, v = on_jax(of)
    split = PartitionSpec(None, "h")
    of_keys = split if kv_heads > 1 else PartitionSpec()
    k, v = (jnp.repeat(x, 8 // kv_heads, axis=1) if kv_heads > 1 else x for x in (k, v))
    shard = jax.shard_map(
        partial(llsa.attention, **OPTIONS), mesh=mesh, in_specs=(split, of_keys, of_keys), out_specs=split
    )
    assert_same([shard(q, k, v)], [llsa.attention(*of, **OPTIONS)])


def test_arrays_on_several_devices_under_jit():
    """Without shard_map XLA brings them together; the numbers are the same."""
    mesh = jax.make_mesh((2,), ("a",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices("cpu")[:2])
    of = arrays()
    spread = [jax.device_put(x, jax.NamedSharding(mesh, PartitionSpec("a"))) for x in of]
    assert_same([jax.jit(lambda *x: llsa.attention(*x, **OPTIONS))(*spread)], [llsa.attention(*of, **OPTIONS)])


def test_scan_and_while():
    q, k, v = on_jax(arrays(queries=20, value_dim=8))
    step = jax.jit(lambda x: llsa.attention(x, k, v, **OPTIONS))
    looped = jax.lax.scan(lambda x, _: (step(x), None), q, length=3)[0]
    assert_same([looped], [np.asarray(step(step(step(q))))])
    assert jax.grad(lambda q: jax.lax.scan(lambda x, _: (step(x), None), q, length=2)[0].sum())(q).shape == q.shape


def test_what_cannot_be_differentiated_says_so():
    q, k, v = on_jax(arrays())
    selection = llsa.select(q, k, **OPTIONS)
    out, lse = llsa.attend(q, k, v, selection)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(loss, (q, k, v), (q, k, v))
    for twice in (
        lambda q: jax.grad(loss)(q, k, v).sum(),
        lambda q: llsa.attend_backward(out, q, k, v, out, lse, selection)[0].sum(),
    ):
        with pytest.raises(NotImplementedError, match="gradients of gradients"):
            jax.grad(twice)(q)


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, jnp.bfloat16])
def test_gradient_of_pool(layout, dtype):
    """<pool(x), y> = <x, gradient of y>, level by level."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 3, 29, 4) if layout == "bhnd" else (2, 29, 3, 4)).astype(dtype))
    levels, back = jax.vjp(lambda x: llsa.pool(x, block_size=3, levels=4, layout=layout), x)
    y = [jnp.asarray(rng.standard_normal(level.shape)).astype(dtype) for level in levels]
    (gradient,) = back(tuple(y))
    assert gradient.dtype == x.dtype
    assert gradient.shape == x.shape
    told = sum(float((a.astype("f8") * b.astype("f8")).sum()) for a, b in zip(levels, y))
    found = float((x.astype("f8") * gradient.astype("f8")).sum())
    assert abs(told - found) <= {2: 0.2, 4: 1e-4, 8: 1e-11}[x.dtype.itemsize]


def test_merge_is_differentiable_with_empty_rows():
    of = arrays()
    q, k, v = on_jax(of)
    out, lse = llsa.attention(q, k, v, return_lse=True, **OPTIONS)
    nothing = jnp.zeros_like(out), jnp.full_like(lse, -jnp.inf).at[0, 0, 0].set(0.0)

    def merged(out, lse, others):
        return sum(x.sum() for x in llsa.merge((out, lse), others))

    found = jax.jit(jax.grad(merged, argnums=(0, 1, 2)))(out, lse, nothing)
    for x in jax.tree.leaves(found):
        assert np.isfinite(x).all()
    assert float(abs(found[2][0][1]).max()) == 0


def test_memory_is_xlas_own(monkeypatch):
    """What the reference reads are the caller's arrays, where they lie."""
    seen, plain = [], jax_arrays.HostPlan.work

    def spied(self, given):
        seen.append([x.__array_interface__["data"][0] for x in given[:3]])
        return plain(self, given)

    monkeypatch.setattr(jax_arrays.HostPlan, "work", spied)
    q, k, v = on_jax(arrays(queries=52))
    llsa.attention(q, k, v, **OPTIONS)
    assert seen == [[x.unsafe_buffer_pointer() for x in (q, k, v)]]


class Memory:
    """What lies at a stand-in's address, for NumPy."""

    def __init__(self, of):
        self.__array_interface__ = {"data": (of.ptr, False), "shape": of.shape, "strides": of.strides, "version": 3}
        self.__array_interface__["typestr"] = of.dtype.str


class FromAddresses(plans.OperationPlan):
    """As of a backend on a GPU that cannot record its launches: here the reference, on the memory at the addresses."""

    def placed(self, value, pointers, stream):
        found = super().placed(value, pointers, stream)
        if isinstance(value, Room):
            assert found.stream == stream == 0
            assert value.stream is self.recording
        return np.asarray(Memory(found)) if isinstance(found, StandIn) else found


def test_operations_on_arrays_at_addresses(monkeypatch):
    """With all of the workspace in one buffer of XLA's."""
    given = arrays(queries=53, keys=29)
    monkeypatch.setattr(jax_arrays, "plan_from", FromAddresses)
    jax_arrays.plan_of.cache_clear()
    jax.clear_caches()
    try:
        for layout in ("bhnd", "bnhd"):
            q, k, v = (x if layout == "bhnd" else x.swapaxes(1, 2).copy() for x in given)
            options = OPTIONS | {"layout": layout}
            attention = partial(llsa.attention, return_lse=True, **options)
            out, pull = jax.vjp(attention, *on_jax((q, k, v)))
            expected = attention(q, k, v)
            assert_same(out, expected)
            dout, dlse = (np.ones_like(x) for x in expected)
            selection = llsa.select(q, k, **options)
            gradients = llsa.attend_backward(dout, q, k, v, *expected, selection, dlse=dlse, layout=layout)
            assert_same(pull((jnp.asarray(dout), jnp.asarray(dlse))), gradients)
    finally:
        jax_arrays.plan_of.cache_clear()
        jax.clear_caches()


class Watched(np.ndarray):
    """Of which one can tell when it is gone."""


def test_a_program_keeps_nothing_of_its_caller():
    def step():
        unrelated = np.ones(9).view(Watched)
        jax.jit(lambda q: llsa.attention(q, q, q, **OPTIONS))(jnp.ones((1, 2, 54, 4)))
        return weakref.ref(unrelated)

    seen = step()
    gc.collect()
    assert seen() is None
    with jax.checking_leaks():
        llsa.attention(*on_jax(arrays(queries=55)), **OPTIONS)


def test_calls_alike_are_compiled_once():
    q, k, v = on_jax(arrays(queries=53))
    llsa.attention(q, k, v, **OPTIONS)
    before = jax_arrays.plan_of.cache_info().misses
    compiled = jax_arrays.attention_of._cache_size()
    llsa.attention(2 * q, k, v, **OPTIONS)
    assert jax_arrays.plan_of.cache_info().misses == before
    assert jax_arrays.attention_of._cache_size() == compiled


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_bad_calls(jitted):
    """Are told before XLA compiles, in the words that all frameworks share."""
    of = arrays()
    given = on_jax(of)
    wrap = jax.jit if jitted else lambda f: f
    selection = llsa.select(*given[:2], **OPTIONS)
    on_host = np.asarray(given[1])
    for kind, words, call in (
        (TypeError, "q is an array of JAX and k one of NumPy", lambda q, k, v: llsa.attention(q, on_host, v)),
        (TypeError, "unexpected keyword argument 'blocksize'", lambda q, k, v: llsa.attention(q, k, v, blocksize=3)),
        (TypeError, "missing 1 required", lambda q, k, v: llsa.attention(q, k)),
        (ValueError, "has shape", lambda q, k, v: llsa.attention(q[0], k, v)),
        (TypeError, "has dtype int32", lambda q, k, v: llsa.attention(q.astype("int32"), k, v)),
        (ValueError, "the Selection was made for", lambda q, k, v: llsa.attend(q[:1], k[:1], v[:1], selection)),
        (TypeError, "selection is a", lambda q, k, v: llsa.attend(q, k, v, list(selection))),
        (
            RuntimeError,
            "backend 'cupy_raw' cannot run here",
            lambda q, k, v: llsa.attention(q, k, v, backend="cupy_raw"),
        ),
        (TypeError, "one of NumPy", lambda q, k, v: llsa.merge((q, on_host))),
        (
            TypeError,
            "scale is an array of JAX.*static_argnames",
            lambda q, k, v: llsa.attention(q, k, v, scale=q[0, 0, 0, 0]),
        ),
        (TypeError, "topk is an array of JAX", lambda q, k, v: llsa.attention(q, k, v, topk=q[0, 0, 0, :2])),
    ):
        if "cupy_raw" in words and not llsa.backends()["cupy_raw"]:
            continue
        with pytest.raises(kind, match=words):
            wrap(call)(*given)
    with pytest.raises(ValueError, match="scale is Array"):
        llsa.attention(*of, scale=jnp.float32(0.5))


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("options", "right"),
    [
        ({"reweight": 1}, {"reweight": True}),
        ({"block_size": 4.0}, {"block_size": 4}),
        ({"topk": (2.0, 1.0)}, {"topk": (2, 1)}),
        ({"topk": (2, True)}, {"topk": (2, 1)}),
        ({"topk": [[2]]}, {"topk": 2}),
        ({"topk": b"22"}, {"topk": 2}),
        ({"enrich": (True,)}, {"enrich": (1,)}),
        ({"enrich": (1.0,)}, {"enrich": (1,)}),
        ({"scale": np.array([0.5])}, {"scale": 0.5}),
        ({"layout": ["bhnd"]}, {"layout": "bhnd"}),
        ({"backend": "nope"}, {"backend": "numpy"}),
        ({"backend": 3}, {"backend": "auto"}),
        ({"backend": ["numpy"]}, {"backend": "auto"}),
    ],
    ids=str,
)
def test_options_that_are_wrong(options, right, jitted):
    """As with NumPy's arrays, and also after a call that was right and that Python takes for equal."""
    of = arrays(queries=20, keys=20)

    def attend(options):
        return lambda *given: llsa.attention(*given, **OPTIONS | {"topk": 2} | options)

    wrap = jax.jit if jitted else lambda f: f
    assert_same([wrap(attend(right))(*on_jax(of))], [attend(right)(*of)])
    with pytest.raises((TypeError, ValueError)) as theirs:
        attend(options)(*of)
    with pytest.raises(theirs.type) as ours:
        wrap(attend(options))(*on_jax(of))
    assert str(ours.value).partition(";")[2] == str(theirs.value).partition(";")[2]


@pytest.mark.parametrize("topk", [np.int64(2), np.array(2), (np.array(2), np.int32(1)), range(1, 3)], ids=str)
def test_options_of_numpys_types(topk):
    of = arrays(queries=20, keys=20)
    options = {"block_size": np.int32(4), "levels": np.array(2), "topk": topk}
    llsa.attention(*on_jax(of), block_size=4, levels=2, topk=(2, 1))
    assert_same([llsa.attention(*on_jax(of), **options)], [llsa.attention(*of, **options)])


def test_programs_for_other_platforms():
    """Are refused when they are compiled, in the words that say what is missing."""
    if llsa.backends()["cupy_raw"] == ():
        pytest.skip("there is a GPU")
    given = on_jax(arrays())
    traced = jax.jit(lambda *x: llsa.attention(*x, **OPTIONS)).trace(*given)
    with pytest.raises(ValueError, match=r"the arrays are on cuda:0.*What is missing: .*cupy"):
        traced.lower(lowering_platforms=("cuda",))
    with pytest.raises(NotImplementedError, match="served on the platforms cpu, cuda"):
        traced.lower(lowering_platforms=("tpu",))


def test_a_selection_that_is_partly_traced():
    q, k, _ = on_jax(arrays())
    levels = list(llsa.select(q, k, **OPTIONS))
    made = {"block_size": 4, "query_tokens": 37, "key_tokens": 41}
    assert len(jax.jit(lambda x: llsa.Selection([x, levels[1]], **made))(levels[0])) == 2


def test_a_selection_crosses_shard_map():
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices("cpu"))
    spec, of = PartitionSpec("a", "b"), arrays()
    split = {"mesh": mesh, "out_specs": spec}
    selection = jax.jit(jax.shard_map(lambda q, k: llsa.select(q, k, **OPTIONS), in_specs=(spec, spec), **split))(
        *on_jax(of[:2])
    )
    expected = llsa.select(*of[:2], **OPTIONS)
    assert repr(selection) == repr(expected)
    assert_same(selection, expected)
    attend = jax.shard_map(llsa.attend, in_specs=(spec,) * 4, **split)
    assert_same(jax.jit(attend)(*on_jax(of), selection), llsa.attend(*of, expected))


def test_keys_of_random_numbers_are_not_numbers():
    key = jax.random.key(0)
    with pytest.raises(TypeError, match="supported are"):
        llsa.pool(key, block_size=2)


def test_a_generator_of_levels_is_used_once():
    q, k, v = on_jax(arrays())
    plain = llsa.attention(q, k, v, **OPTIONS | {"enrich": (1,)})
    assert_same([llsa.attention(q, k, v, **OPTIONS | {"enrich": iter([1])})], [np.asarray(plain)])


def test_a_validated_selection():
    """From outside: checked where its values are at hand, and under jit left to its maker."""
    q, k, _ = on_jax(arrays())
    levels = list(llsa.select(q, k, **OPTIONS))
    made = {"block_size": 4, "query_tokens": 37, "key_tokens": 41}
    assert_same(llsa.Selection(levels, **made), [np.asarray(x) for x in levels])
    wrong = [levels[0] + 1000, *levels[1:]]
    with pytest.raises(ValueError, match="level 1 has the row"):
        llsa.Selection(wrong, **made)
    assert len(jax.jit(lambda x: llsa.Selection(x, **made))(levels)) == 2


def test_coverage():
    of = arrays()
    expected = llsa.coverage(*of[:2], llsa.select(*of[:2], **OPTIONS))
    q, k, _ = on_jax(of)
    assert np.array_equal(llsa.coverage(q, k, llsa.select(q, k, **OPTIONS))[0], expected[0])
