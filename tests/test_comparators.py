"""The comparators must catch what they are there for: each planted mutation of a right result is found out.

A mutation is planted where a real bug sits: in the levels, weights, tails or strides that the computation is given.
"""

import importlib
import math

import numpy as np
import pytest
from calls import assert_same_bits, reference, run
from frameworks import NumPy
from hypothesis import assume, given, settings
from strategies import DTYPES, Case, cases

import llsa_np as llsa
from llsa_np.accuracy import (
    GRADIENT_BOUND,
    LSE_BOUND,
    OUT_BOUND,
    compare,
    error,
    exact,
    lse_error,
    selection_is_right,
)
from llsa_np.attend_backward import unpool
from llsa_np.options import AttendOptions
from llsa_np.tiles import Tile

CASE = Case(dtype="float32", query_tokens=45, key_tokens=45, dim=8, value_dim=8, levels=2, topk=2, group=2, kv_heads=2)


def worst(results, case=CASE, expected=None):
    expected = reference(case, results.selection) if expected is None else expected
    return compare(results.arrays, expected, case.dtype)


def test_a_right_result_passes():
    assert max(worst(run(CASE, "numpy", NumPy)).values()) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dropped_level(dtype):
    case = CASE.but(dtype=dtype)
    right = run(case, "numpy", NumPy)
    for level in (1, 2):
        rest = tuple(other for other in (1, 2) if other != level)
        wrong = run(case, "numpy", NumPy, selection=right.selection, enrich=rest)
        ratios = worst(wrong, case, reference(case, right.selection))
        assert min(ratios.values()) > 1, f"dropping level {level} passed: {ratios}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_missing_count_weight(dtype):
    case = CASE.but(dtype=dtype)
    right = run(case, "numpy", NumPy)
    wrong = run(case, "numpy", NumPy, selection=right.selection, reweight=False)
    assert min(worst(wrong, case, reference(case, right.selection)).values()) > 1


def test_the_tails_count_taken_for_a_whole_block(monkeypatch):
    """The last token of every coarse level weighed as if it stood for b**l tokens."""

    def whole(level, hierarchy, piece):
        return level * math.log(hierarchy.block_size)

    ratios = mutated(monkeypatch, "attend", "log_weights", whole)
    assert min(ratios.values()) > 1, ratios


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_off_by_one_tail(dtype):
    """The last key never read: what is left is attention over one key fewer."""
    case = CASE.but(dtype=dtype)
    right = run(case, "numpy", NumPy)
    q, k, v, dout, dlse = case.arrays()
    k, v = k.copy(), v.copy()
    k[:, :, -1], v[:, :, -1] = 0, 0
    wrong = run(case, "numpy", NumPy, (q, k, v, dout, dlse), right.selection)
    assert min(worst(wrong, case, reference(case, right.selection)).values()) > 1


@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
def test_a_wrong_stride(name):
    """One input read with the strides of its transpose: the same numbers in another order."""
    case = CASE.but(dtype="bfloat16")
    right = run(case, "numpy", NumPy)
    arrays = dict(zip(("q", "k", "v", "dout", "dlse"), case.arrays()))
    x = arrays[name]
    arrays[name] = np.ascontiguousarray(x.swapaxes(2, 3)).reshape(x.shape)
    wrong = run(case, "numpy", NumPy, tuple(arrays.values()), right.selection)
    ratios = worst(wrong, case, reference(case, right.selection))
    assert max(ratios.values()) > 1, ratios


@pytest.mark.parametrize("name", ["out", "lse", "dq", "dk", "dv"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_element_never_written(name, value):
    results = run(CASE, "numpy", NumPy)
    results[name].flat[-1] = value
    assert worst(results)[name] == math.inf


@pytest.mark.parametrize("name", ["out", "lse", "dq", "dk", "dv"])
def test_a_row_of_zeros(name):
    results = run(CASE, "numpy", NumPy)
    results[name][0, -1, -1] = 0
    assert worst(results)[name] > 1


@pytest.mark.parametrize("name", ["out", "lse", "dq", "dk", "dv"])
def test_a_wrong_dtype_or_shape(name):
    results = run(CASE, "numpy", NumPy)
    right = results[name]
    results.arrays[name] = right.astype(np.float64)
    assert worst(results)[name] == math.inf
    results.arrays[name] = right[:, :, :-1]
    assert worst(results)[name] == math.inf


def mutated(monkeypatch, module, name, mutation):
    """The results with one function of the package replaced, and their ratios to the reference of the right ones."""
    right = run(CASE, "numpy", NumPy)
    expected = reference(CASE, right.selection)
    monkeypatch.setattr(importlib.import_module(f"llsa_np.{module}"), name, mutation)
    return worst(run(CASE, "numpy", NumPy, selection=right.selection), CASE, expected)


def test_key_gradients_not_divided_by_the_count(monkeypatch):
    def undivided(levels, hierarchy):
        scaled = {level: x * hierarchy.counts(level)[:, None].astype(x.dtype) for level, x in levels.items()}
        return unpool(scaled, hierarchy)

    ratios = mutated(monkeypatch, "attend_backward", "unpool", undivided)
    assert min(ratios["dk"], ratios["dv"]) > 1
    assert max(ratios["out"], ratios["dq"]) <= 1


def test_a_dropped_dlse():
    right = run(CASE, "numpy", NumPy)
    ratios = worst(
        run(CASE, "numpy", NumPy, selection=right.selection, dlse=False), CASE, reference(CASE, right.selection)
    )
    assert min(ratios["dq"], ratios["dk"]) > 1


def test_a_missing_delta(monkeypatch):
    """dS = P (dO v^T + dlse): what is left when out is taken for zero."""
    right = run(CASE, "numpy", NumPy)
    expected = reference(CASE, right.selection)
    q, k, v, dout, dlse = CASE.arrays()
    zero = np.zeros_like(right["out"])
    options = CASE.attend_options
    dq, dk, dv = llsa.attend_backward(dout, q, k, v, zero, right["lse"], right.selection, dlse=dlse, **options)
    ratios = compare({"dq": dq, "dk": dk, "dv": dv}, expected, CASE.dtype)
    assert min(ratios["dq"], ratios["dk"]) > 1
    assert ratios["dv"] <= 1


def test_query_heads_reading_the_wrong_kv_head():
    """h % kv_heads instead of h // group."""
    right = run(CASE, "numpy", NumPy)
    q, k, v, dout, dlse = CASE.arrays()
    wrong = run(CASE, "numpy", NumPy, (q, k[:, ::-1], v[:, ::-1], dout, dlse), right.selection)
    assert min(worst(wrong, CASE, reference(CASE, right.selection)).values()) > 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_bounds_are_not_loose(dtype):
    """A result off by twice its bound fails in every dtype, and one off by half of it passes."""
    case = CASE.but(dtype=dtype)
    right = run(case, "numpy", NumPy)
    expected = reference(case, right.selection)
    rng = np.random.default_rng(0)
    for name in ("out", "dq", "dk", "dv"):
        bound = (OUT_BOUND if name == "out" else GRADIENT_BOUND)[dtype]
        for times, fails in ((2.5, True), (0.5, False)):
            noise = rng.standard_normal(right[name].shape)
            size = max(np.linalg.norm(expected.results[name]), np.linalg.norm(expected.sizes[name]) / 2)
            off = expected.results[name] + noise * (times * bound * size / np.linalg.norm(noise))
            ratio = compare({name: off.astype(DTYPES[dtype])}, expected, dtype)[name]
            assert (ratio > 1) == fails, f"{name} off by {times} times its bound has the ratio {ratio}"
    for times, fails in ((2.0, True), (0.5, False)):
        off = expected.results["lse"] + times * LSE_BOUND[dtype] * max(1, np.abs(expected.results["lse"]).max())
        off = off.astype(np.float64 if dtype == "float64" else np.float32)
        assert (compare({"lse": off}, expected, dtype)["lse"] > 1) == fails


def test_lse_of_empty_rows():
    assert lse_error(np.array([1.0, -np.inf]), np.array([1.0, 0.0])) == math.inf
    assert lse_error(np.array([1.0, 0.0]), np.array([1.0, -np.inf])) == math.inf
    assert lse_error(np.array([1.0, np.nan]), np.array([1.0, 0.0])) == math.inf
    assert lse_error(np.array([3.0, -np.inf]), np.array([1.0, -np.inf])) == 2.0


def test_nothing_against_nothing():
    zero = np.zeros((1, 1, 2, 3))
    assert error(zero, zero, zero) == 0
    assert error(zero + 1e-30, zero, zero) == math.inf


@given(case=cases(exponents=(0, 0, 0, 0)))
@settings(max_examples=40)
def test_sizes_are_never_below_the_results(case):
    """T is the sum with nothing cancelling, so no element of the result exceeds what it is made of."""
    results = run(case, "numpy", NumPy)
    expected = reference(case, results.selection)
    for name in ("out", "dv"):
        assert (np.abs(expected.results[name]) <= expected.sizes[name] * (1 + 1e-9) + 1e-12).all()
    for name in ("dq", "dk"):
        # a_tj has a mean of |dO_d v_d| in it where the sum has their product, at most sqrt(Dv) times as much
        limit = expected.sizes[name] * math.sqrt(case.value_dim) * (1 + 1e-9) + 1e-12
        assert (np.abs(expected.results[name]) <= limit).all()


def test_lambda_is_the_largest_product():
    q, k, v, *_ = CASE.arrays()
    selection = llsa.Selection(
        [np.broadcast_to(np.arange(12, dtype=np.int32), (1, 4, 12, 12)), np.zeros((1, 4, 3, 1), np.int32)],
        block_size=4,
        query_tokens=45,
        key_tokens=45,
    )
    checked = AttendOptions(levels=(0,), reweight=True, scale=0.5, precision="full")
    largest = exact(q, k, v, selection, checked).largest
    q, k = np.abs(q.astype(np.float64)), np.abs(np.repeat(k, 2, axis=1).astype(np.float64))
    assert largest == pytest.approx(0.5 * (q @ k.swapaxes(2, 3)).max(), rel=1e-6)


@given(case=cases(dtypes=("float32", "bfloat16"), exponents=(0, 0, 0, 0), data="normal"))
@settings(max_examples=60)
def test_wrong_selections_are_caught(case):
    q, k, *_ = case.arrays()
    q, k = case.to_bhnd(q), case.to_bhnd(k)
    selection = run(case, "numpy", NumPy).selection
    assert selection_is_right(q, k, selection)
    rows = [level.copy() for level in selection]
    coarsest, length = rows[-1], selection.key_hierarchy.lengths[-1]
    assume(coarsest.shape[3] < length)  # something was rejected

    def with_coarsest(changed):
        changed = [*rows[:-1], changed.astype(np.int32)]
        made = object.__new__(llsa.Selection)
        for name in llsa.Selection.__slots__:
            object.__setattr__(made, name, getattr(selection, name))
        object.__setattr__(made, "_arrays", tuple(changed))
        return made

    out_of_range, unsorted, short = coarsest.copy(), coarsest.copy(), coarsest.copy()
    out_of_range[0, 0, 0, -1] = length
    unsorted[0, 0, 0] = unsorted[0, 0, 0, ::-1]
    short[0, 0, 0, -1] = -1
    assert not selection_is_right(q, k, with_coarsest(out_of_range))
    assert not selection_is_right(q, k, with_coarsest(short))
    if coarsest.shape[3] > 1:
        assert not selection_is_right(q, k, with_coarsest(unsorted))
        repeated = coarsest.copy()
        repeated[0, 0, 0, 1] = repeated[0, 0, 0, 0]
        assert not selection_is_right(q, k, with_coarsest(repeated))


def test_the_worst_tokens_instead_of_the_best():
    case = CASE.but(dtype="float32", levels=1, data="normal")
    q, k, *_ = case.arrays()
    wrong = llsa.select(-q, k, block_size=4, levels=1, topk=2)
    assert not selection_is_right(q, k, wrong)
    assert selection_is_right(-q, k, wrong)


def test_children_of_somebody_elses_parents():
    case = CASE.but(dtype="float32")
    q, k, *_ = case.arrays()
    selection = run(case, "numpy", NumPy).selection
    rows = np.stack([selection[1][:, :, (i + 5) % 12] for i in range(12)], axis=2)
    moved = llsa.Selection([rows, selection[2]], block_size=4, query_tokens=45, key_tokens=45)
    assert not selection_is_right(q, k, moved)


def test_options_reach_the_reference():
    """The reference itself answers to every option, or a backend that ignores one would pass."""
    right = run(CASE, "numpy", NumPy)
    plain = reference(CASE, right.selection).results["out"]
    for options in ({"enrich": ()}, {"enrich": (2,)}, {"reweight": False}, {"scale": 1.0}):
        assert np.abs(reference(CASE, right.selection, **options).results["out"] - plain).max() > 1e-3


def test_queries_beyond_the_first_tile_reading_their_neighbours_rows(monkeypatch):
    """A mistake that no short case shows: an index off by one from the second tile of queries on."""
    from test_against_float64 import LARGE, test_many_tiles

    right = Tile.ancestors

    def wrong(self, span):
        rows = right(self, span)
        return slice(rows.start - 1, rows.stop - 1) if self.first >= 1024 and rows.start > 0 else rows

    monkeypatch.setattr(Tile, "ancestors", wrong)
    with pytest.raises(AssertionError, match="over their bounds"):
        test_many_tiles("numpy", NumPy, LARGE[0])


def test_same_bits_are_the_same_bits():
    zero, nan = np.zeros(3), np.full(3, np.nan)
    assert_same_bits(nan, -nan)
    for a, b in ((zero, -zero), (zero, nan), (zero, zero.astype(np.float32)), (zero, zero[:2]), (zero, zero + 1e-300)):
        with pytest.raises(AssertionError):
            assert_same_bits(a, b)
