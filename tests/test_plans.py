"""Calls that are worked out once: which are alike, and what a plan keeps. Run in the emulator's process."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, permutations

import numpy as np
import pytest
from calls import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import EMULATED

import llsa_np as llsa
from llsa_np import plans
from llsa_np.adapters.numpy_arrays import NumpyAdapter

if not EMULATED:
    pytest.skip("calls are planned for a backend that records (LLSA_CUDA_EMULATOR=1)", allow_module_level=True)

OPTIONS = {"block_size": 8, "topk": 2, "levels": 2, "backend": "cupy_raw"}


@pytest.fixture(autouse=True)
def kept(monkeypatch):
    """No plans yet; then those of calls that were recorded."""
    monkeypatch.setattr(plans, "plans", {})
    return lambda: [plan for plan in plans.plans.values() if plan is not None and plan.recording.has_launches]


def arrays(tokens=40, dim=16, value_dim=24, seed=0):
    """q, k, v, each of sizes of its own."""
    rng = np.random.default_rng(seed)
    shapes = ((4, tokens, dim), (2, tokens + 9, dim), (2, tokens + 9, value_dim))
    return [rng.standard_normal((2, *shape), dtype=np.float32) for shape in shapes]


def reference(q, k, v, **options):
    return llsa.attention(q, k, v, **OPTIONS | {"backend": "numpy"} | options)


def assert_close(x, y):
    assert abs(x - y).max() < 1e-5


@pytest.mark.parametrize("order", list(permutations("qkv")), ids="".join)
def test_arrays_by_name_in_any_order(order, kept):
    of = dict(zip("qkv", arrays()))
    expected = reference(**of)
    for names in (order, "qkv", order):
        assert_close(llsa.attention(**{name: of[name] for name in names}, **OPTIONS), expected)
    assert_close(llsa.attention(*of.values(), **OPTIONS), expected)
    assert_close(llsa.attention(of["q"], v=of["v"], k=of["k"], **OPTIONS), expected)
    assert len(kept()) == 1


def test_gradients_by_name_in_any_order(kept):
    q, k, v = arrays()
    selection = llsa.select(k=k, q=q, **OPTIONS)
    out, lse = llsa.attend(q, k, v, selection, backend="cupy_raw")
    of = {"dout": out, "q": q, "k": k, "v": v, "out": out, "lse": lse, "selection": selection}
    names = list(of)
    expected = llsa.attend_backward(**of, dlse=lse, backend="numpy")
    for order in (names[::-1], names, names[3:] + names[:3]):
        found = llsa.attend_backward(dlse=lse, **{name: of[name] for name in order}, backend="cupy_raw")
        for x, y in zip(found, expected):
            assert_close(x, y)
    without = llsa.attend_backward(**of, backend="cupy_raw")
    assert abs(without[0] - expected[0]).max() > 1e-3, "without dlse it is another call"
    assert len(kept()) == 4


def test_arrays_that_do_not_belong():
    """Before and after there is a plan: given twice, too many, or of another function's."""
    q, k, v = arrays()
    for _ in range(2):
        for call, words in (
            (lambda: llsa.attention(q, k, v, q=q, **OPTIONS), "multiple values"),
            (lambda: llsa.attention(q, k, v, v, **OPTIONS), "positional argument"),
            (lambda: llsa.attention(q, k, v, out=q, **OPTIONS), "unexpected keyword argument 'out'"),
            (lambda: llsa.attention(q, k, **OPTIONS), "missing 1 required positional argument: 'v'"),
            (lambda: llsa.attention(q, k, None, **OPTIONS), "v is a NoneType"),
            (lambda: llsa.pool(q, k=3, backend="cupy_raw"), "unexpected keyword argument 'k'"),
        ):
            with pytest.raises(TypeError, match=words):
                call()
        llsa.attention(q, k, v, **OPTIONS)


OTHERS = [
    {"topk": 3},
    {"topk": (3, 2)},
    {"levels": 1},
    {"block_size": 16},
    {"reweight": False},
    {"enrich": ()},
    {"enrich": [1]},
    {"scale": 1},
    {"scale": 1.5},
    {"layout": "bnhd"},
]


@pytest.mark.parametrize("others", OTHERS, ids=str)
def test_options_tell_calls_apart(others):
    q, k, v = arrays(tokens=48)
    if "layout" in others:  # as many heads as tokens
        q, k, v = (np.ascontiguousarray(x[:, :1, :16].repeat(16, 1)) for x in (q, k, v))
    for options in ({}, others, {}):
        assert_close(llsa.attention(q, k, v, **OPTIONS | options), reference(q, k, v, **options))


@pytest.mark.parametrize("name", ["block_size", "topk", "levels", "reweight", "return_lse"])
def test_what_is_equal_is_not_the_same(name):
    """1, True and 1.0 are equal: a plan for one must not serve the others, which are refused or mean another thing."""
    q, k, v = arrays()
    right = {"block_size": 8, "topk": 1, "levels": 1, "reweight": True, "return_lse": False}
    llsa.attention(q, k, v, **OPTIONS | {name: right[name]})
    wrong = float(right[name]) if isinstance(right[name], bool) or right[name] > 1 else True
    with pytest.raises(ValueError, match=name):
        llsa.attention(q, k, v, **OPTIONS | {name: wrong})
    if name == "topk":
        llsa.attention(q, k, v, **OPTIONS | {"topk": (1, 1)})
        with pytest.raises(ValueError, match="topk"):
            llsa.attention(q, k, v, **OPTIONS | {"topk": (1, True)})


class Once:
    """Entries that can be had once."""

    def __init__(self, *entries):
        self.entries = iter(entries)

    def __iter__(self):
        return self.entries


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "entries",
    [lambda *x: (y for y in x), Once, lambda *x: np.array(x), lambda *x: set(x), lambda *x: list(x)],
    ids=["generator", "once", "array", "set", "list"],
)
def test_options_of_other_types(entries, dtype):
    """Also where the backend is found not to serve the case, and another call goes to the next one."""
    q, k, v = (x.astype(dtype) for x in arrays())
    name = "cupy_raw" if dtype == "float32" else "auto"
    for _ in range(2):
        found = llsa.attention(q, k, v, **OPTIONS | {"enrich": entries(2), "backend": name})
        assert_close(found, reference(q, k, v, enrich=(2,)))


@settings(max_examples=15)
@given(st.data())
def test_memory_tells_calls_apart(data):
    """Strides, offsets modulo 16 bytes and dtypes, with the plans of all other draws kept."""
    tokens, dim = data.draw(st.sampled_from([(40, 16), (40, 24)]))
    found = []
    for x in arrays(tokens, dim, dim):
        step, offset, order = data.draw(st.tuples(st.integers(1, 2), st.integers(0, 4), st.permutations(range(3))))
        batch, heads, n, d = x.shape
        sizes = [(heads, n, d)[axis] for axis in order]
        memory = np.zeros(batch * heads * n * (d + 4) * step + offset, np.float32)[offset:]
        memory = memory[: batch * sizes[0] * sizes[1] * sizes[2] * step].reshape(batch, *sizes[:2], sizes[2] * step)
        view = memory[..., ::step].transpose(0, *(1 + order.index(axis) for axis in range(3)))
        view[...] = x
        found.append(view)
    assert_close(llsa.attention(*found, **OPTIONS), reference(*found))


def test_sizes_without_elements(kept):
    for batch, heads in ((0, 2), (2, 0)):
        x = np.zeros((batch, heads, 40, 16), np.float32)
        for _ in range(2):
            out, lse = llsa.attention(x, x, x, return_lse=True, **OPTIONS)
            assert out.shape == x.shape
            assert lse.shape == (batch, heads, 40)
    assert len(kept()) == 2


def test_errors_are_not_kept(kept):
    q, k, v = arrays()
    for _ in range(2):
        with pytest.raises(ValueError, match="head dims"):
            llsa.attention(q, k[..., :8], v, **OPTIONS)
        with pytest.raises(NotImplementedError, match="cupy_raw serves block_size"):
            llsa.attention(q, k, v, **OPTIONS | {"block_size": 3})
    assert kept() == []


def test_a_backend_that_does_not_record(kept):
    """It is asked once, and serves every call."""
    q, k, v = arrays()
    options = OPTIONS | {"backend": "auto"}
    asked = []
    for _ in range(2):
        assert_same_bits(llsa.attention(q, k, v, **options), reference(q, k, v))
        asked.append(len(plans.plans))
    assert asked[0] == asked[1] > 0
    assert kept() == []


def test_a_selection_whose_arrays_were_changed():
    """By a framework's tools, which go past the constructor; and a class of one's own."""
    q, k, v = arrays()
    selection = llsa.select(q, k, **OPTIONS)

    class Mine(llsa.Selection):
        pass

    mine = Mine(list(selection), block_size=8, query_tokens=40, key_tokens=49)
    out, _ = llsa.attend(q, k, v, mine, backend="cupy_raw")
    assert_close(out, reference(q, k, v))
    for dtype in ("int64", "int16"):
        changed = selection._with_arrays(x.astype(dtype) for x in selection)
        with pytest.raises(TypeError, match=f"level 1 of selection has dtype {dtype}; it must be int32"):
            llsa.attend(q, k, v, changed, backend="cupy_raw")
    changed = selection._with_arrays(x[..., :1] for x in selection)
    with pytest.raises(ValueError, match="level 1 of selection has shape"):
        llsa.attend(q, k, v, changed, backend="cupy_raw")


def test_a_plan_keeps_no_array():
    class Array(np.ndarray):
        """One that can be watched."""

    q, k, v = (x.view(Array) for x in arrays())
    watched = [weakref.ref(x) for x in (q, k, v)]
    out, _ = llsa.attention(q, k, v, return_lse=True, **OPTIONS)
    del q, k, v, out
    gc.collect()
    assert [x() for x in watched] == [None] * 3


@pytest.mark.parametrize("one_room", [True, False])
def test_arrays_of_a_workspace_lie_apart(one_room, kept, monkeypatch):
    monkeypatch.setattr(plans, "ONE_ROOM", one_room)
    q, k, v = arrays(tokens=200)
    selection = llsa.select(q, k, **OPTIONS)
    out, lse = llsa.attend(q, k, v, selection, backend="cupy_raw")
    found = llsa.attend_backward(out, q, k, v, out, lse, selection, backend="cupy_raw")
    for x, y in zip(found, llsa.attend_backward(out, q, k, v, out, lse, selection, backend="numpy")):
        assert_close(x, y)
    for plan in kept():
        rooms = {}
        sizes = {x.ptr: x.size * x.dtype.itemsize for x in [*plan.recording.given, *plan.recording.made]}
        for ptr, place in plan.places.items():
            if ptr:
                rooms.setdefault(place.array, []).append((place.offset, place.offset + sizes[ptr]))
        for spans in rooms.values():
            spans.sort()
            assert all(end <= start for (_, end), (start, _) in pairwise(spans))
            assert all(start % plans.ALIGNMENT == 0 for start, _ in spans)
            assert one_room or len(spans) == 1


def test_the_one_not_needed_for_longest_makes_room(kept, monkeypatch):
    monkeypatch.setattr(plans, "MOST_PLANS", 3)
    recorded = []
    plain = plans.record
    monkeypatch.setattr(plans, "record", lambda *x: recorded.append(x[2]["x"].shape[2]) or plain(*x))
    often = np.zeros((1, 1, 50, 16), np.float32)
    for tokens in (20, 30, 40, 60, 70, 20):
        llsa.pool(often, block_size=8, backend="cupy_raw")
        llsa.pool(often[:, :, :20].repeat(4, 2)[:, :, :tokens], block_size=8, backend="cupy_raw")
        assert len(kept()) <= 3
    assert recorded == [50, 20, 30, 40, 60, 70, 20]


def test_threads_that_keep_plans_at_once(monkeypatch):
    """None sees another's half-done eviction; then calls whose plans come and go."""
    monkeypatch.setattr(plans, "MOST_PLANS", 2)
    sets = [(arrays(tokens=20 + 3 * (i % 3), seed=i), i) for i in range(24)]
    expected = [reference(*x) for x, _ in sets]
    with ThreadPoolExecutor(6) as threads:
        keys = list(threads.map(lambda x: plans.keep(x, None), range(2000)))
        assert len(keys) == 2000
    assert len(plans.plans) == 2
    for (x, _), of in zip(sets, expected):  # the emulator runs one launch at a time
        assert_close(llsa.attention(*x, **OPTIONS), of)


def test_frameworks_do_not_share_a_plan(kept, monkeypatch):
    """Though their arrays' sizes, strides and dtypes may read alike: results come from the caller's own."""

    class Other(np.ndarray):
        pass

    class OtherAdapter(NumpyAdapter):
        name = "other"

        def maker(self, shape, dtype, like):
            return lambda: np.empty(shape, dtype).view(Other)

    q, k, v = arrays()
    plain = plans.adapter_of_type
    other = OtherAdapter()
    monkeypatch.setattr(plans, "adapter_of_type", lambda kind: other if kind is Other else plain(kind))
    for kind in (np.ndarray, Other, np.ndarray):
        assert type(llsa.attention(*(x.view(kind) for x in (q, k, v)), **OPTIONS)) is kind
    assert len(kept()) == 2


@pytest.mark.parametrize("unaligned", [False, True])
def test_jax_hands_out_the_memory(unaligned, monkeypatch):
    """XLA's buffers take the place of arrays, results and workspace, also where 16 bytes cannot be moved at once."""
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    from llsa_np.adapters import jax_arrays

    called, plain = [], jax_arrays.Call.__call__

    def poisoned(self, context, out, *given):
        called.append(self.operation.name)
        for buffer in out:
            np.asarray(buffer).view(np.uint8)[...] = 0xFF
        if unaligned:
            given = [Moved(np.asarray(x)) for x in given]
        return plain(self, context, out, *given)

    monkeypatch.setattr(jax_arrays.Call, "__call__", poisoned)
    of = arrays(tokens=44 + unaligned)

    def loss(q, k, v):
        out, lse = llsa.attention(q, k, v, return_lse=True, **OPTIONS)
        return out.sum() + lse.sum(), (out, lse)

    given = [jax.numpy.asarray(x) for x in of]
    gradients, results = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*given)
    out, lse = llsa.attention(*of, return_lse=True, **OPTIONS)
    selection, ones = llsa.select(*of[:2], **OPTIONS), [np.ones_like(x) for x in (out, lse)]
    expected = llsa.attend_backward(ones[0], *of, out, lse, selection, dlse=ones[1], backend="cupy_raw")
    for x, y in zip((*results, *gradients), (out, lse, *expected), strict=True):
        assert_same_bits(np.asarray(x), y)
    assert called == ["attention", "attend_backward"]
    (level,) = llsa.pool(given[0], block_size=8, backend="cupy_raw")
    assert_close(np.asarray(level), llsa.pool(of[0], block_size=8)[0])


class Moved:
    """A buffer that begins four bytes past a multiple of 16."""

    def __init__(self, x):
        self.memory = np.zeros(x.nbytes + 20, np.uint8)
        first = -self.memory.ctypes.data % 16 + 4
        self.array = self.memory[first : first + x.nbytes].view(x.dtype).reshape(x.shape)
        self.array[...] = x

    def __array__(self, dtype=None, copy=None):
        return self.array
