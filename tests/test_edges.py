"""The edges of what can be asked: empty, tiny, deep, tied, not finite, from outside, and large in memory."""

import os
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from calls import assert_same_bits, assert_within_bounds, reference, run
from frameworks import NumPy
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DTYPES, EMULATED, SIMULATED, Case, cases, examples

import llsa_np as llsa
from llsa_np import plans
from llsa_np.accuracy import LSE_BOUND, OUT_BOUND, error, lse_error


@pytest.mark.parametrize(("batch", "kv_heads", "group"), [(0, 2, 1), (2, 0, 1), (2, 2, 0), (0, 0, 0)])
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_empty_batch_or_heads(backend, framework, batch, kv_heads, group, layout):
    case = Case(batch=batch, kv_heads=kv_heads, group=group, layout=layout, value_dim=3, dtype="float32").served()
    results = run(case, backend, framework)
    assert results["out"].shape == (batch, kv_heads * group, 20, case.value_dim)
    assert results["lse"].shape == (batch, kv_heads * group, 20)
    assert results["dk"].shape == (batch, kv_heads, 20, case.dim)
    for name in ("dk", "dv"):
        assert (results[name] == 0).all(), "keys that no query reads have zero gradients"
    assert [level.shape[:2] for level in results.selection] == [(batch, kv_heads * group)]
    pooled = llsa.pool(framework.array(case.arrays()[1]), levels=2, layout=layout, backend=backend)
    assert case.to_bhnd(framework.to_numpy(pooled[1])).shape == (batch, kv_heads, 1, case.dim)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token(backend, framework, dtype):
    case = Case(dtype=dtype, query_tokens=1, key_tokens=1, levels=3, topk=5).served()
    results = run(case, backend, framework)
    q, k, v, *_ = (x.astype(np.float64) for x in case.arrays())
    assert [level[0, 0].tolist() for level in results.selection] == [[[0, -1, -1, -1, -1]]] * 3
    assert error(results["out"], v, np.abs(v)) <= OUT_BOUND[case.dtype]
    assert lse_error(results["lse"], case.dim**-0.5 * (q * k).sum(-1) + np.log(4)) <= LSE_BOUND[case.dtype]


def test_levels_past_one_token_repeat(backend, framework):
    """Each repeat takes part as a level of its own, its weight N counted each time."""
    case = Case(key_tokens=10, query_tokens=10, block_size=4, levels=5, topk=3)
    results = run(case, backend, framework)
    for level in (2, 3, 4, 5):
        rows = results.selection[level]
        assert (rows[..., 0] == 0).all()
        assert rows.shape[2] == 1
        if level > 2:
            assert (rows[..., 1:] == -1).all()
    q, k, *_ = (x.astype(np.float64) for x in case.arrays())
    lse = []
    for enrich in ((), (3,), (3, 4), (3, 4, 5)):
        lse.append(run(case, backend, framework, enrich=enrich)["lse"])
    once = np.exp(lse[1]) - np.exp(lse[0])
    mean_key = k.mean(axis=2, keepdims=True)
    np.testing.assert_allclose(once, 10 * np.exp(0.5 * (q * mean_key).sum(-1)), rtol=1e-10)
    np.testing.assert_allclose(np.exp(lse[3]) - np.exp(lse[0]), 3 * once, rtol=1e-10)


def test_block_size_beyond_the_length(backend, framework):
    for block_size in (20, 21, 1000, 2**40, 2**61):
        case = Case(block_size=block_size, levels=1, topk=3, key_tokens=20, query_tokens=20, enrich=())
        results = run(case, backend, framework)
        assert (results.selection[1][..., 0] == 0).all()
        q, k, v, *_ = case.arrays()
        weights = np.exp(0.5 * q @ k.swapaxes(2, 3))
        np.testing.assert_allclose(results["out"], weights @ v / weights.sum(-1, keepdims=True), rtol=1e-9)


def test_topk_beyond_the_candidates(backend, framework):
    many, more = (64, 60) if backend == "cupy_raw" else (100, 70) if SIMULATED else (1000, 700)
    case = Case(key_tokens=33, query_tokens=33, topk=(many, more), levels=2).served()
    results = run(case, backend, framework)
    assert results.selection.topk == (many, more)
    upper, lower = -(-33 // case.block_size**2), -(-33 // case.block_size)
    assert results.selection[2].shape == (1, 1, upper, more)
    assert results.selection[2][0, 0, 0].tolist() == [*range(upper), *[-1] * (more - upper)]
    assert results.selection[1][0, 0, 0].tolist() == [*range(lower), *[-1] * (many - lower)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_scores_go_to_the_lower_index(backend, framework, dtype):
    """All keys alike, whatever the numbers: the first ones win, at every length and dim."""
    sizes = ((24, 3), (136, 7), (304, 33), (520, 64))  # multiples of 2**3: exact means
    for tokens, dim in sizes[:1] if SIMULATED or EMULATED else sizes:
        case = Case(
            dtype=dtype, key_tokens=tokens, query_tokens=17, dim=dim, block_size=2, levels=3, topk=5, seed=dim
        ).served()
        q, k, v, dout, dlse = case.arrays()
        k = np.broadcast_to(k[:, :, :1], k.shape)
        if case.block_size > 2:  # means of more than two keys are exact where the keys have few digits
            k = np.round(k * 4) / np.asarray(4, k.dtype)
        selection = run(case, backend, framework, (q, k, v, dout, dlse)).selection
        for level in range(1, 4):
            length = -(-tokens // case.block_size**level)
            first = [j if j < length else -1 for j in range(5)]
            assert (selection[level] == first).all(), f"{tokens} tokens, dim {dim}, level {level}"


@pytest.mark.parametrize(
    ("dtype", "queries", "tokens", "dim", "options"),
    [
        ("float32", 1024, 8192, 320, {}),
        ("float64", 1024, 8192, 192, {}),
        ("float32", 1024, 8192, 128, {"levels": 2, "topk": 17}),
        ("bfloat16", 1024, 4096, 64, {"levels": 1, "topk": 40, "block_size": 2}),
        ("float64", 3143, 3143, 64, {"levels": 1, "topk": 1, "block_size": 7}),
        ("float32", 7168, 7168, 48, {"levels": 2, "topk": 3, "block_size": 12}),
        ("float32", 1, 256, 8200, {"levels": 1, "topk": 3, "block_size": 2}),
        ("float64", 1, 118, 9000, {"levels": 1, "topk": 3, "block_size": 2}),
    ],
)
@pytest.mark.skipif(SIMULATED or EMULATED, reason="thousands of candidates take hours where threads are simulated")
def test_equal_scores_among_many(backend, framework, dtype, queries, tokens, dim, options):
    """The same with so many candidates that they are scored in several parts."""
    rng = np.random.default_rng(dim)
    key = (np.round(rng.standard_normal((1, 1, 1, dim)) * 4) / 4).astype(DTYPES[dtype])  # means of it are exact
    k = np.broadcast_to(key, (1, 1, tokens, dim))
    for _ in range(8 if queries == 1 else 1):
        q = rng.standard_normal((1, 1, queries, dim)).astype(DTYPES[dtype])
        selection = llsa.select(framework.array(q), framework.array(k), backend=backend, **options)
        for level in selection:
            rows = framework.to_numpy(level)
            assert (rows == np.arange(rows.shape[3])).all()


def test_signed_zeros_are_equal(backend, framework):
    b, dim = (8, 16) if backend == "cupy_raw" else (2, 1)
    q, k = np.zeros((1, 1, b, dim), np.float32), np.zeros((1, 1, 6 * b, dim), np.float32)
    q[..., 0] = 1
    k[..., 0] = np.array([-0.0, 0.0, -0.0, 0.0, 1.0, -1.0], np.float32).repeat(b)
    selection = llsa.select(framework.array(q), framework.array(k), block_size=b, levels=1, topk=3, backend=backend)
    assert framework.to_numpy(selection[1])[0, 0, 0].tolist() == [0, 1, 4]


@pytest.mark.parametrize("dtype", DTYPES)
def test_order_of_scores(backend, framework, dtype):
    """+inf > finite > -inf > NaN, all NaNs equal."""
    values = [np.nan, -np.inf, 1.0, np.inf, -np.nan, -2.0, np.inf, np.nan]
    b, dim = (8, 16) if backend == "cupy_raw" else (2, 1)
    k, q = np.zeros((1, 1, 8 * b, dim), DTYPES[dtype]), np.ones((1, 1, b, dim), DTYPES[dtype])
    k[..., 0] = np.array(values, np.float64).repeat(b).astype(DTYPES[dtype])
    best_first = [3, 6, 2, 5, 1, 0, 4, 7]
    for topk in range(1, 9):
        selection = llsa.select(
            framework.array(q), framework.array(k), block_size=b, levels=1, topk=topk, backend=backend
        )
        assert framework.to_numpy(selection[1])[0, 0, 0].tolist() == sorted(best_first[:topk])


@given(
    case=cases(exponents=(0, 0, 0, 0), data="normal"),
    bad=st.sampled_from([np.nan, np.inf, -np.inf]),
    where=st.sampled_from(["q", "k", "v"]),
    place=st.floats(0, 0.999),
)
@settings(max_examples=examples(60, simulated=4))
def test_not_finite_stays_where_arithmetic_puts_it(backend, framework, case, bad, where, place):
    case = case.but(memory="contiguous", layout="bhnd")
    arrays = dict(zip(("q", "k", "v", "dout", "dlse"), case.arrays()))
    x = arrays[where]
    token = int(place * x.shape[2])
    x[0, 0, token] = bad
    results = run(case, backend, framework, tuple(arrays.values()))
    clean = run(case, backend, framework)
    finite = np.isfinite(results["out"].astype(np.float64)).all(axis=-1)
    if where == "q":  # its own row, and the selection of its b**L group
        span = case.block_size**case.depth
        mine = (token // span * span <= np.arange(case.query_tokens)) & (
            np.arange(case.query_tokens) < (token // span + 1) * span
        )
        others = results["out"].copy()
        others[0, 0, mine] = clean["out"][0, 0, mine]
        assert_same_bits(others, clean["out"])
        assert finite[0, 0][np.arange(case.query_tokens) != token].all()
    else:
        assert finite[1:].all(), "a batch entry reached another"
        assert finite[:, case.group :].all(), "a head reached another"
        if where == "v" and case.enrich == ():
            attended = np.zeros((case.group, case.query_tokens), bool)
            for h in range(case.group):
                rows = results.selection[1][0, h]
                hit = (rows == token // case.block_size).any(axis=1)
                attended[h] = np.repeat(hit, case.block_size)[: case.query_tokens]
            # Where the weight underflows to 0 the product is still NaN, so exactly the attending rows are touched.
            assert (finite[0, : case.group] == ~attended).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_values_do_not_overflow(backend, framework, dtype):
    case = Case(dtype=dtype, key_tokens=50, query_tokens=50, dim=8).served()
    q, k, v, dout, dlse = case.arrays()
    large = 100 if dtype == "float16" else 1e4
    results = run(case, backend, framework, (q * DTYPES[dtype](large), k * DTYPES[dtype](large), v, dout, dlse))
    for name, x in results.arrays.items():
        assert np.isfinite(x.astype(np.float64)).all() or (dtype == "float16" and name in ("dq", "dk")), name


def outside(rows, block_size=4, **sizes):
    """A Selection of one level from a list of rows."""
    return llsa.Selection([np.array(rows, np.int32)[None, None]], block_size=block_size, **sizes)


def test_a_row_without_candidates(backend, framework):
    """out 0, lse -inf, no gradient, even where dO is NaN; the others as if it were not there."""
    case = Case(levels=1, enrich=(), dtype="float32").served()
    b = case.block_size
    case, empty = case.but(key_tokens=3 * b, query_tokens=3 * b), slice(b, 2 * b)
    selection = outside([[0, 2], [-1, -1], [1, -1]], b, query_tokens=3 * b, key_tokens=3 * b)
    q, k, v, dout, dlse = case.arrays()
    clean = run(case, backend, framework, (q, k, v, dout, dlse), selection)
    assert (clean["out"][:, :, empty] == 0).all()
    assert (clean["lse"][:, :, empty] == -np.inf).all()
    assert np.isfinite(clean["lse"][:, :, :b]).all()
    assert (clean["dq"][:, :, empty] == 0).all()
    dout, dlse = dout.copy(), dlse.copy()
    dout[:, :, empty], dlse[:, :, empty] = np.nan, np.nan
    dirty = run(case, backend, framework, (q, k, v, dout, dlse), selection)
    for name in clean.arrays:
        assert_same_bits(clean[name], dirty[name])


def test_selections_outside_their_parents_children(backend, framework):
    """Level 1 need not follow from level 2: attention reads each level's rows as they are."""
    rows = [
        np.array([[0, 7], [3, 4], [1, 5]] * 4, np.int32)[:12][None, None],
        np.array([[2], [0], [1]], np.int32)[None, None],
    ]
    selection = llsa.Selection(rows, block_size=4, query_tokens=45, key_tokens=45)
    case = Case(levels=2, key_tokens=45, query_tokens=45)
    results = run(case, backend, framework, selection=selection)
    q, k, *_ = (x[0, 0] for x in case.arrays())
    t = 21  # its level-1 ancestor is 5, row [1, 5]; its level-2 ancestor is 1, row [0]
    level1 = [k[4 * j : 4 * j + 4].mean(0) for j in range(4)]
    level2 = [k[0:16].mean(0), k[16:32].mean(0), k[32:45].mean(0)]
    tokens = [k[j] for j in (*range(4, 8), *range(20, 24))]
    weights = [1] * 8 + [4] * 4 + [16, 16, 13]
    logits = np.array([0.5 * q[t] @ key for key in (*tokens, *level1, *level2)]) + np.log(weights)
    assert results["lse"][0, 0, t] == pytest.approx(np.log(np.exp(logits).sum()), rel=1e-12)


@pytest.mark.parametrize("garbage", [-2, 3, 1000, 2**31 - 1, -(2**31)])
def test_unchecked_indices_out_of_range_count_as_absent(backend, framework, garbage):
    """Without validation an index outside 0..n_l - 1 counts as -1, forward and backward."""
    case = Case(levels=1, dtype="float32").served()
    tokens = 2 * case.block_size + 2
    case = case.but(key_tokens=tokens, query_tokens=tokens)
    wild = [np.array([[0, garbage], [1, garbage], [garbage, garbage]], np.int32)[None, None]]
    sizes = {"block_size": case.block_size, "query_tokens": tokens, "key_tokens": tokens}
    selection = llsa.Selection([framework.array(wild[0])], **sizes, validate=False)
    tame = outside([[0, -1], [1, -1], [-1, -1]], **sizes)
    q, k, v, dout, dlse = (framework.array(x) for x in case.arrays())
    out, lse = llsa.attend(q, k, v, selection, backend=backend, enrich=())
    gradients = llsa.attend_backward(dout, q, k, v, out, lse, selection, dlse=dlse, backend=backend, enrich=())
    expected = run(case, backend, framework, selection=tame, enrich=())
    for x, name in zip((out, lse, *gradients), ("out", "lse", "dq", "dk", "dv")):
        assert_same_bits(framework.to_numpy(x), expected[name])


def test_slices_of_queries(backend, framework):
    """A slice that starts at a multiple of b**L and ends at one, or at M, gives the slice of the result: bit for bit on
    a GPU, while NumPy's BLAS may sum products of other sizes in another order."""
    case = Case(
        dtype="float32", block_size=4, levels=2, query_tokens=45, key_tokens=50 if SIMULATED else 200, dim=8
    ).served()
    span = case.block_size**2
    case = case.but(query_tokens=2 * span + 13)
    q, k, v, dout, dlse = case.arrays()
    whole = run(case, backend, framework, (q, k, v, dout, dlse))
    for first, last in ((0, span), (span, 2 * span), (2 * span, 2 * span + 13), (span, 2 * span + 13)):
        rows = slice(first, last)
        own, arrays = case.but(query_tokens=last - first), (q[:, :, rows], k, v, dout[:, :, rows], dlse[:, :, rows])
        part = run(own, backend, framework, arrays)
        for level in (1, 2):
            size = case.block_size**level
            there = whole.selection[level][:, :, first // size : -(-last // size)]
            assert np.array_equal(part.selection[level], there)
        if backend == "numpy":
            assert_within_bounds(own, part, reference(own, part.selection, arrays))
            continue
        for name in ("out", "lse", "dq"):
            assert_same_bits(part[name], whole[name][:, :, rows])


@pytest.mark.parametrize("which", range(4), ids=["q", "k", "v", "dout"])
def test_one_number_for_all_dims(backend, framework, which):
    """A stride of 0 along the dims, as the gradient of a plain sum has; or along all axes."""
    case = Case(dtype="float32").served()
    for keep in (3, 0):  # axes of which one entry is repeated: the last, or all
        arrays = list(case.arrays())
        first = arrays[which][..., :1] if keep else arrays[which][:1, :1, :1, :1]
        wide = np.zeros((*first.shape[:3], 8), first.dtype)  # so that the other strides are multiples of 16 bytes
        wide[..., :1] = first
        arrays[which] = np.broadcast_to(wide[..., :1], arrays[which].shape)
        results = run(case, backend, framework, arrays)
        assert_within_bounds(case, results, reference(case, results.selection, arrays))


def test_an_infinite_key_and_a_ragged_tail_of_queries(backend, framework):
    """Queries that are not there give no gradient to a key whose scores are all -inf."""
    b = 16 if backend == "cupy_raw" else 4
    case = Case(dtype="float32", key_tokens=2 * b, block_size=b, enrich=()).served()
    for tokens in (b + 3, b):
        here = case.but(query_tokens=tokens)
        q, k, v, dout, dlse = here.arrays()
        q[..., 0] = np.abs(q[..., 0]) + 0.1
        k[0, 0, b + 2, 0] = -np.inf
        results = run(here, backend, framework, (q, k, v, dout, dlse))
        plain = run(here, "numpy", NumPy, (q, k, v, dout, dlse), results.selection)
        for name in ("dk", "dv"):
            assert np.array_equal(np.isfinite(results[name]), np.isfinite(plain[name])), f"{name}, {tokens} queries"


def test_read_only_inputs(backend, framework):
    case = Case(dtype="bfloat16").served()
    arrays = case.arrays()
    for x in arrays:
        x.setflags(write=False)
    for a, b in zip(
        run(case, backend, framework, arrays).arrays.values(), run(case, backend, framework).arrays.values()
    ):
        assert_same_bits(a, b)


def test_inputs_are_left_alone(backend, framework):
    case = Case(dtype="float32").served()
    arrays = case.arrays()
    copies = [x.copy() for x in arrays]
    run(case, backend, framework, arrays)
    for x, copy in zip(arrays, copies):
        assert_same_bits(x, copy)


@pytest.mark.parametrize("block_size", [300] if SIMULATED else [1500, 4096])
def test_pooling_constant_values_in_large_blocks(backend, framework, block_size):
    """Fact 2 where a block is long: adding its tokens one after another would drift."""
    v = np.full((1, 1, block_size, 1), 0.1, np.float32)
    (pooled,) = llsa.pool(framework.array(v), block_size=block_size, backend=backend)
    x = v[:, :, :1].astype(np.float64)
    assert error(framework.to_numpy(pooled), x, x) <= OUT_BOUND["float32"]


@pytest.mark.parametrize("block_size", [300] if SIMULATED else [1500, 4096])
def test_attending_to_constant_values_in_large_blocks(backend, framework, block_size):
    """The same of attention."""
    v = np.full((1, 1, block_size, 1), 0.1, np.float32)
    q, k, v_given = map(framework.array, (np.ones((1, 1, 1, 1), np.float32), v, v))
    out = llsa.attention(q, k, v_given, block_size=block_size, levels=1, backend=backend)
    x = v[:, :, :1].astype(np.float64)
    assert error(framework.to_numpy(out), x, x) <= OUT_BOUND["float32"]


def test_attending_to_constant_values_in_one_block_of_65536():
    """In the reference."""
    v = np.full((1, 1, 2**16, 1), 0.1, np.float32)
    out = llsa.attention(np.ones((1, 1, 1, 1), np.float32), v, v, block_size=2**16, levels=1)
    x = v[:, :, :1].astype(np.float64)
    assert error(out, x, x) <= OUT_BOUND["float32"]


@pytest.mark.parametrize("dtype", [">f8", ">f4", ">f2"])
def test_other_byte_orders_are_numbers_all_the_same(dtype):
    case = Case(dtype={"8": "float64", "4": "float32", "2": "float16"}[dtype[-1]])
    plain = run(case, "numpy", NumPy)
    arrays = [x.astype(dtype) if x.ndim == 4 else x for x in case.arrays()]
    swapped = run(case, "numpy", NumPy, arrays)
    for name, x in plain.arrays.items():
        assert_same_bits(swapped[name].astype(x.dtype), x)


@pytest.mark.parametrize(
    ("dtype", "shape", "options"),
    [
        (np.float32, (2, 2**16, 64), {}),
        (ml_dtypes.bfloat16, (2, 2**16, 64), {}),
        (np.float32, (2, 2**16, 64), {"block_size": 2, "levels": 12, "topk": 4}),
        (np.float32, (2, 2**16, 64), {"block_size": 64, "topk": 32}),
        (
            np.float32,
            (2, 2**13, 64),
            {"levels": 1, "topk": 4096},
        ),  # everything kept: pieces of candidates, not all at once
        (np.float32, (2, 2**16, 8), {"levels": 2, "topk": (8, 1024)}),
        (np.float32, (8, 2**11, 1024), {"block_size": 2}),
        (np.float32, (16, 2**12, 32), {"levels": 1, "topk": 64}),
    ],
)
def test_memory(dtype, shape, options, monkeypatch):
    """Beyond results, their float32 accumulators, pooled levels and the selection: at most 256 MiB, on 16 threads."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64), raising=False)
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.standard_normal((1, *shape), dtype=np.float32).astype(dtype) for _ in range(4))
    spare = 256 * 2**20

    def peak(call):
        tracemalloc.start()
        result = call()
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result, used

    pooled = [sum(x.nbytes for x in llsa.pool(y, **shallow(options, y))) for y in (q, k, v)]
    sums = max(pooled) * 4 // q.itemsize + 4 * q.size // shape[1]  # float32 sums while pooling
    selection, used = peak(lambda: llsa.select(q, k, **options))
    chosen = sum(level.nbytes for level in selection)
    assert used <= chosen + pooled[0] + pooled[1] + sums + spare
    (out, lse), used = peak(lambda: llsa.attend(q, k, v, selection))
    assert used <= out.nbytes + lse.nbytes + pooled[1] + pooled[2] + sums + spare
    _, used = peak(lambda: llsa.attend_backward(dout, q, k, v, out, lse, selection))
    accumulators = 2 * (4 * q.size + max(pooled) * 4 // q.itemsize)  # of dk and dv, on every level
    assert used <= 3 * q.nbytes + pooled[1] + pooled[2] + accumulators + spare


def test_calls_alike_on_the_host(monkeypatch):
    """Go by one plan, whatever their strides and class; other layouts and options by others; each with its own bits."""
    monkeypatch.setattr(plans, "plans", {})
    x = np.random.default_rng(0).standard_normal((2, 12, 24, 8)).astype(np.float32)
    seen = [x[:, :, ::2], x[:, :, 12:], x[:, :, :12], x[:, ::-1, ::-2], np.asfortranarray(x[:, :, 3:15])]
    of_options = [{}, {"layout": "bnhd"}, {"topk": 1}, {"return_lse": True}]

    def call(x, options):
        result = llsa.attention(x, x, x, **{"block_size": 4, "levels": 2, "topk": 2} | options)
        return [y.tobytes() for y in (result if isinstance(result, tuple) else (result,))]

    found = [[call(y, options) for options in of_options] for y in seen]
    assert len(plans.plans) == len(of_options)
    for y, of in zip(seen, found):
        for options, bits in zip(of_options, of):
            plans.plans.clear()
            assert call(np.ascontiguousarray(y), options) == bits
    with ThreadPoolExecutor(4) as threads:
        again = list(threads.map(lambda y: call(y, {}), seen * 5))
    assert again == [of[0] for of in found] * 5


def shallow(options, x):
    """Options of `pool` for the levels that `select` would make."""
    block_size = options.get("block_size", 16)
    return {"block_size": block_size, "levels": options.get("levels", llsa.default_levels(x.shape[2], block_size))}
