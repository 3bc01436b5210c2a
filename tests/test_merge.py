"""merge: attention over disjoint keys, put together, is attention over all of them."""

import math
from dataclasses import replace

import numpy as np
import pytest
from calls import assert_same_bits, run, with_arrays
from hypothesis import given, settings
from strategies import DTYPES, Case, cases, examples

import llsa_np as llsa
from llsa_np.accuracy import LSE_BOUND, OUT_BOUND, attend_float64, error, lse_error, rounded_levels
from llsa_np.options import check_attend_options


@given(case=cases(exponents=(0, 0, 0, 0)))
@settings(max_examples=examples(60))
def test_parts_of_the_levels(backend, framework, case):
    """Level 0 apart from the coarse ones: two softmaxes merge into the one over the whole list."""
    if not framework.has_operations:
        pytest.skip(f"{framework.name} has no array operations")
    q, k, v, *_ = (framework.array(x) for x in case.arrays())
    selection = llsa.select(q, k, backend=backend, **case.select_options)
    options = {"backend": backend, "layout": case.layout, "scale": case.scale, "reweight": case.reweight}
    whole = llsa.attend(q, k, v, selection, **options)
    fine = llsa.attend(q, k, v, selection, enrich=(), **options)
    out, lse = (
        framework.to_numpy(x) for x in llsa.merge(fine, *[coarse(case, framework, selection)], layout=case.layout)
    )
    expected, size = framework.to_numpy(whole[0]), np.abs(framework.to_numpy(whole[0]))
    assert out.dtype == expected.dtype
    assert error(out, expected.astype(np.float64), size.astype(np.float64) + 1) <= 3 * OUT_BOUND[case.dtype]
    assert lse_error(lse, framework.to_numpy(whole[1]).astype(np.float64)) <= 4 * LSE_BOUND[case.dtype]


def coarse(case, framework, selection):
    """Attention over the coarse candidates alone, in float64: level 0 left out of the options."""
    q, k, v, *_ = (case.to_bhnd(x) for x in case.arrays())
    rows = with_arrays(selection, framework.to_numpy)
    options = check_attend_options("coarse", None, case.reweight, case.scale, "full", levels=case.depth, dim=case.dim)
    options = replace(options, levels=options.levels[:-1])
    levels = (rounded_levels(x, selection.key_hierarchy) for x in (k, v))
    out, lse = attend_float64(q.astype(np.float64), *levels, rows, options)
    out = out.swapaxes(1, 2) if case.layout == "bnhd" else out
    lse = lse.astype(np.float64 if case.dtype == "float64" else np.float32)
    return framework.array(out.astype(DTYPES[case.dtype])), framework.array(lse)


def pair(seed, dtype="float32", rows=6):
    rng = np.random.default_rng(seed)
    lse = rng.standard_normal((2, 3, rows)).astype("float64" if dtype == "float64" else "float32") * 3
    return rng.standard_normal((2, 3, rows, 4)).astype(DTYPES[dtype]), lse


@pytest.mark.parametrize("dtype", DTYPES)
def test_against_the_formula(framework, dtype):
    pairs = [pair(seed, dtype) for seed in range(4)]
    out, lse = (framework.to_numpy(x) for x in llsa.merge(*[tuple(map(framework.array, p)) for p in pairs]))
    outs, lses = zip(*[(a.astype(np.float64), b.astype(np.float64)) for a, b in pairs])
    total = sum(np.exp(b) for b in lses)
    expected = sum(np.exp(b)[..., None] * a for a, b in zip(outs, lses)) / total[..., None]
    assert out.dtype == DTYPES[dtype]
    assert error(out, expected, np.abs(expected)) <= 2 * OUT_BOUND[dtype]
    assert lse_error(lse, np.log(total)) <= LSE_BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_empty_row_changes_nothing_bit_for_bit(framework, dtype):
    first, second, third = (pair(seed, dtype) for seed in range(3))
    first[1][0, 0, 0] = -np.inf
    for rubbish in (0.0, 7.0, np.nan, np.inf):
        empty = (np.full_like(first[0], rubbish), np.full_like(first[1], -np.inf))
        for without in ((first,), (first, second), (first, second, third)):
            plain = llsa.merge(*without)
            for place in range(len(without) + 1):
                merged = llsa.merge(*without[:place], empty, *without[place:])
                assert_same_bits(merged[0], plain[0])
                assert_same_bits(merged[1], plain[1])
    out, lse = llsa.merge(first)
    assert_same_bits(lse, first[1])
    assert (out[0, 0, 0] == 0).all()
    assert_same_bits(out[0, 0, 1:], first[0][0, 0, 1:])


def test_empty_in_all(framework):
    nothing = (np.full((1, 1, 2, 3), np.nan, np.float32), np.full((1, 1, 2), -np.inf, np.float32))
    out, lse = llsa.merge(nothing, nothing)
    assert (out == 0).all()
    assert (lse == -np.inf).all()


@pytest.mark.parametrize("values", [(1e30, -1e30), (800.0, 800.0), (-800.0, -900.0)])
def test_extreme_lse(values):
    a, b = (np.full((1, 1, 1), value) for value in values)
    out, lse = llsa.merge((np.full((1, 1, 1, 1), 1.0), a), (np.full((1, 1, 1, 1), 3.0), b))
    high, low = max(values), min(values)
    assert lse[0, 0, 0] == high + math.log1p(math.exp(low - high))
    weight = 1 / (1 + math.exp(values[1] - values[0])) if values[1] - values[0] < 700 else 0.0
    assert out[0, 0, 0, 0] == pytest.approx(weight + 3 * (1 - weight), rel=1e-15)


def test_not_finite_lse():
    ones = np.ones((1, 1, 3, 1))
    a, b = np.array([[[np.inf, np.nan, 0.0]]]), np.zeros((1, 1, 3))
    out, lse = llsa.merge((ones, a), (ones, b))
    assert lse[0, 0].tolist()[0] == np.inf
    assert np.isnan(lse[0, 0, 1])
    assert np.isnan(out[0, 0, :2]).all()
    assert out[0, 0, 2, 0] == 1


def test_large_values_do_not_overflow():
    out = np.full((1, 1, 1, 1), 3e38, np.float32)
    lse = np.zeros((1, 1, 1), np.float32)
    assert llsa.merge((out, lse), (out, lse))[0][0, 0, 0, 0] == np.float32(3e38)


def test_negative_zero_stays(framework):
    out, lse = np.full((1, 1, 2, 2), -0.0, np.float32), np.zeros((1, 1, 2), np.float32)
    ours = tuple(map(framework.array, (out, lse)))
    empty = tuple(map(framework.array, (np.ones_like(out), np.full_like(lse, -np.inf))))
    for pairs in ([ours], [ours, empty], [empty, ours], [empty, ours, empty]):
        merged = llsa.merge(*pairs)
        assert_same_bits(framework.to_numpy(merged[0]), out)
        assert_same_bits(framework.to_numpy(merged[1]), lse)


def test_a_framework_without_array_operations(monkeypatch):
    from llsa_np.adapters.numpy_arrays import NumpyAdapter

    monkeypatch.setattr(NumpyAdapter, "namespace", lambda self, array: None)
    with pytest.raises(TypeError, match=r"merge: arrays of NumPy have no operations"):
        llsa.merge(pair(0))


def test_layout(framework):
    pairs = [pair(seed) for seed in range(2)]
    out, lse = llsa.merge(*pairs)
    moved = [(a.swapaxes(1, 2), b) for a, b in pairs]
    out_moved, lse_moved = llsa.merge(*moved, layout="bnhd")
    assert_same_bits(np.ascontiguousarray(out_moved.swapaxes(1, 2)), out)
    assert_same_bits(lse_moved, lse)


def test_halves_of_the_keys(backend, framework):
    """Dense attention over two halves of the keys, merged, is dense attention over all."""
    case = Case(dtype="float32", key_tokens=64, query_tokens=40, enrich=(), topk=64, levels=2, dim=8).served()
    q, k, v, dout, dlse = case.arrays()
    whole = run(case, backend, framework)
    halves = [
        run(case.but(key_tokens=32), backend, framework, (q, k[:, :, part], v[:, :, part], dout, dlse))
        for part in (slice(0, 32), slice(32, 64))
    ]
    out, lse = llsa.merge(*[(half["out"], half["lse"]) for half in halves])
    assert error(out, whole["out"].astype(np.float64), np.abs(whole["out"])) <= 2 * OUT_BOUND["float32"]
    assert lse_error(lse, whole["lse"].astype(np.float64)) <= 2 * LSE_BOUND["float32"]
