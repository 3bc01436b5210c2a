"""Every backend and framework against float64 under the same selection, on drawn calls."""

import dense
import numpy as np
import pytest
from calls import assert_same_bits, assert_within_bounds, reference, run, with_arrays
from hypothesis import given, settings
from strategies import DTYPES, EMULATED, SIMULATED, Case, cases, examples

import llsa_np as llsa
from llsa_np.accuracy import SMALLEST_FLOAT16, UNIT_ROUNDOFF, selection_is_right


@given(case=cases())
@settings(max_examples=examples(500))
def test_results_and_gradients(backend, framework, case):
    results = run(case, backend, framework)
    assert_within_bounds(case, results, reference(case, results.selection))


def the_reference_once(backend, framework):
    """Its tiles are the same for arrays of all frameworks."""
    if backend == "numpy" and framework.name != "numpy":
        pytest.skip("the reference has its long calls with NumPy's arrays")


@pytest.mark.skipif(SIMULATED or EMULATED, reason="too many tokens for the simulator and the emulator")
@pytest.mark.parametrize(
    ("data", "changes"),
    [("normal", {}), ("one_popular_key", {}), ("normal", {"group": 7, "block_size": 16, "topk": (2, 8, 8)})],
)
def test_many_tokens(backend, framework, data, changes):
    """Lists, counters and sums that are longer than what a block takes at once; and rows of thousands of queries."""
    the_reference_once(backend, framework)
    case = Case(dtype="float32", query_tokens=20_011, key_tokens=40_001, dim=16, value_dim=24, group=2, data=data)
    case = case.but(block_size=8, topk=4, levels=3).but(**changes)
    results = run(case, backend, framework)
    assert_within_bounds(case, results, reference(case, results.selection))


@given(case=cases())
@settings(max_examples=examples(200))
def test_selection(backend, framework, case):
    q, k, *_ = case.arrays()
    selection = llsa.select(framework.array(q), framework.array(k), backend=backend, **case.select_options)
    rows = with_arrays(selection, framework.to_numpy)
    assert rows.topk == case.topks
    assert selection_is_right(case.to_bhnd(q), case.to_bhnd(k), rows)


@given(case=cases())
@settings(max_examples=examples(80))
def test_attention_is_select_then_attend(backend, framework, case):
    q, k, v, *_ = (framework.array(x) for x in case.arrays())
    selection = llsa.select(q, k, backend=backend, **case.select_options)
    out, lse = llsa.attend(q, k, v, selection, backend=backend, **case.attend_options)
    together = llsa.attention(q, k, v, backend=backend, return_lse=True, **(case.select_options | case.attend_options))
    assert_same_bits(framework.to_numpy(together[0]), framework.to_numpy(out))
    assert_same_bits(framework.to_numpy(together[1]), framework.to_numpy(lse))


@given(case=cases())
@settings(max_examples=examples(80))
def test_pool(backend, framework, case):
    _, k, *_ = case.arrays()
    levels = llsa.pool(
        framework.array(k), block_size=case.block_size, levels=case.depth, layout=case.layout, backend=backend
    )
    x = case.to_bhnd(k).astype(np.longdouble)  # whose own sum is off by less than what is allowed to one of sums
    assert len(levels) == case.depth
    for level, pooled in enumerate(levels, 1):
        pooled = case.to_bhnd(framework.to_numpy(pooled))
        assert pooled.dtype == k.dtype
        span = case.block_size**level
        for j in range(-(-case.key_tokens // span)):
            mean = x[:, :, j * span : (j + 1) * span].mean(axis=2)
            size = np.abs(x[:, :, j * span : (j + 1) * span]).mean(axis=2)
            roundoff = UNIT_ROUNDOFF[case.dtype]  # of the one rounding, besides that of a sum of sums of b
            summing = UNIT_ROUNDOFF["float64" if case.dtype == "float64" else "float32"] * 2 * case.block_size * level
            allowed = roundoff * np.abs(mean) + summing * size + (SMALLEST_FLOAT16 if case.dtype == "float16" else 0)
            assert (np.abs(pooled[:, :, j].astype(np.float64) - mean) <= allowed).all()


@given(case=cases(dtypes=("float32", "bfloat16")))
@settings(max_examples=examples(80))
def test_memory_order_and_layout_change_nothing(backend, framework, case):
    """The same numbers in any memory order and in both layouts give the same bits."""
    case = case.but(memory="contiguous") if case.memory == "expanded" else case
    results = run(case, backend, framework)
    plain = run(case.but(memory="contiguous", layout="bhnd"), backend, framework)
    for name in results.arrays:
        assert_same_bits(results[name], plain[name])


@given(case=cases())
@settings(max_examples=examples(60, simulated=3, emulated=2))
def test_only_what_is_needed(backend, framework, case):
    """Each gradient alone has the bits that it has among the others."""
    q, k, v, dout, dlse = (framework.array(x) for x in case.arrays())
    selection = llsa.select(q, k, backend=backend, **case.select_options)
    out, lse = llsa.attend(q, k, v, selection, backend=backend, **case.attend_options)
    arguments = (dout, q, k, v, out, lse, selection)
    options = {"dlse": dlse, "backend": backend} | case.attend_options
    everything = llsa.attend_backward(*arguments, **options)
    for i, name in enumerate("qkv"):
        alone = llsa.attend_backward(*arguments, needs=(name,), **options)
        assert [x is None for x in alone] == [i != j for j in range(3)]
        assert_same_bits(framework.to_numpy(alone[i]), framework.to_numpy(everything[i]))
    assert llsa.attend_backward(*arguments, needs=(), **options) == (None, None, None)


@given(case=cases(dtypes=("float32", "float16")))
@settings(max_examples=examples(40, simulated=4))
def test_same_bits_every_time(backend, framework, case):
    first, second = run(case, backend, framework), run(case, backend, framework)
    for name in first.arrays:
        assert_same_bits(first[name], second[name])


LARGE = [
    Case(dtype="float32", key_tokens=3000, query_tokens=3000, dim=64, value_dim=64, block_size=16, topk=8, group=2),
    Case(dtype="bfloat16", key_tokens=4097, query_tokens=1030, dim=72, value_dim=40, block_size=16, topk=8, group=3),
    Case(
        dtype="float16", key_tokens=2500, query_tokens=2500, dim=32, value_dim=8, block_size=8, topk=(9, 5, 3), levels=3
    ),
    Case(dtype="float64", key_tokens=2500, query_tokens=2500, dim=16, value_dim=16, block_size=2, topk=4, levels=8),
    Case(dtype="float64", key_tokens=2100, query_tokens=3100, dim=16, value_dim=16, block_size=3, topk=5),
    Case(dtype="float32", key_tokens=2000, query_tokens=2000, dim=16, value_dim=16, block_size=64, topk=40),
    Case(dtype="float64", key_tokens=2500, query_tokens=2500, dim=16, value_dim=16, block_size=1500, topk=2),
    Case(
        dtype="float32", key_tokens=3000, query_tokens=3000, dim=8, value_dim=8, block_size=16, data="one_popular_key"
    ),
    Case(dtype="float64", key_tokens=2100, query_tokens=2100, dim=96, value_dim=96, block_size=16, levels=1, topk=120),
]


if SIMULATED or EMULATED:
    LARGE = [
        Case(dtype="float32", key_tokens=70, query_tokens=33, dim=9, value_dim=7, block_size=16, topk=3, group=2),
        Case(dtype="bfloat16", key_tokens=40, query_tokens=40, block_size=9, topk=6, data="one_popular_key"),
    ]


@pytest.mark.parametrize("case", LARGE, ids=lambda case: f"{case.key_tokens}-{case.block_size}-{case.dtype}")
def test_many_tiles(backend, framework, case):
    """Lengths that need many tiles of queries and several pieces of candidates, against code that has neither."""
    the_reference_once(backend, framework)
    case = case.served()
    results = run(case, backend, framework)
    expected = reference(case, results.selection)
    enrich, scale = tuple(range(1, case.depth + 1)), case.dim**-0.5
    q, k, v, dout, dlse = case.arrays()
    assert selection_is_right(q, k, results.selection)
    exact = {name: np.zeros(x.shape) for name, x in expected.results.items()}
    for h in range(case.heads):
        kv = h // case.group
        rows = {level: results.selection[level][0, h] for level in range(1, case.depth + 1)}
        options = (case.block_size, case.depth, enrich, case.reweight, scale)
        head = dense.attention(
            q[0, h], k[0, kv], v[0, kv], rows, *options, dout[0, h], dlse[0, h], round_to=DTYPES[case.dtype]
        )
        for name, x in zip(("out", "lse", "dq"), head):
            exact[name][0, h] = x
        exact["dk"][0, kv] += head[3]
        exact["dv"][0, kv] += head[4]
        if case.dtype == "float64":
            chosen = dense.select(q[0, h], k[0, kv], case.block_size, case.depth, case.topks, DTYPES[case.dtype])
            assert all(np.array_equal(chosen[level], rows[level]) for level in rows)
    expected.results.update(exact)
    assert_within_bounds(case, results, expected)
