"""coverage against loops over dense attention."""

import brute_force
import numpy as np
import pytest
from calls import run
from frameworks import NumPy
from hypothesis import given, settings
from strategies import Case, Limits, cases

import llsa_np as llsa


@given(case=cases(limits=Limits(tokens=60, dim=6), dtypes=("float64", "bfloat16"), exponents=(0, 0, 0, 0)))
@settings(max_examples=60)
def test_against_loops(case):
    q, k, v, *_ = case.arrays()
    results = run(case, "numpy", NumPy)
    mass, error = llsa.coverage(q, k, results.selection, v, **case.attend_options)
    enrich = tuple(range(1, case.depth + 1)) if case.enrich is None else case.enrich
    scale = case.scale or case.dim**-0.5
    q, k, v = (case.to_bhnd(x).astype(np.float64) for x in (q, k, v))
    assert mass.shape == (case.batch, case.heads, case.depth + 1)
    assert error.shape == (case.batch, case.heads)
    for n, h in np.ndindex(q.shape[:2]):
        keys, values = k[n, h // case.group], v[n, h // case.group]

        def rows_of(level, query, n=n, h=h):
            return [int(j) for j in results.selection[level][n, h, query] if j >= 0]

        shares, outs = np.zeros(case.depth + 1), np.zeros((len(q[n, h]), v.shape[3]))
        for t in range(len(q[n, h])):
            p = np.exp(scale * keys @ q[n, h, t])
            p /= p.sum()
            outs[t] = p @ values
            finest = {}
            for level, j in brute_force.candidate_list(t, rows_of, len(keys), case.block_size, case.depth, enrich):
                for token in range(j * case.block_size**level, min((j + 1) * case.block_size**level, len(keys))):
                    finest[token] = min(level, finest.get(token, level))
            for token, level in finest.items():
                shares[level] += p[token]
        np.testing.assert_allclose(mass[n, h], shares / len(outs), rtol=1e-9, atol=1e-12)
        options = (case.block_size, case.depth, enrich, case.reweight, scale)
        out = brute_force.attention(q[n, h], keys, values, rows_of, *options)[0]
        np.testing.assert_allclose(error[n, h], np.linalg.norm(out - outs) / np.linalg.norm(outs), rtol=1e-7, atol=1e-9)


def test_sample_and_seed():
    case = Case(dtype="float32", query_tokens=300, key_tokens=300, dim=8, levels=2)
    q, k, *_ = case.arrays()
    selection = llsa.select(q, k, **case.select_options)
    few = [llsa.coverage(q, k, selection, queries=20, seed=seed)[0] for seed in (0, 0, 1)]
    assert (few[0] == few[1]).all()
    assert (few[0] != few[2]).any()
    np.testing.assert_allclose(few[0].sum(axis=-1), 1)
    everything, error = llsa.coverage(q, k, selection, queries=300)
    assert error is None
    np.testing.assert_allclose(few[0], everything, atol=0.1)


def test_keeping_everything_covers_everything():
    case = Case(dtype="float64", query_tokens=50, key_tokens=50, topk=50, enrich=())
    q, k, v, *_ = case.arrays()
    selection = llsa.select(q, k, **case.select_options)
    mass, error = llsa.coverage(q, k, selection, v, enrich=())
    np.testing.assert_allclose(mass[..., 0], 1)
    np.testing.assert_allclose(mass[..., 1:], 0)
    assert error.max() < 1e-12


def test_empty_heads():
    case = Case(kv_heads=0)
    q, k, v, *_ = case.arrays()
    selection = llsa.select(q, k, **case.select_options)
    mass, error = llsa.coverage(q, k, selection, v)
    assert mass.shape == (1, 0, 2)
    assert error.shape == (1, 0)


def test_nothing_is_warned_of_values_that_are_zero():
    case = Case(dtype="float64")
    q, k, v, *_ = case.arrays()
    _, error = llsa.coverage(q, k, llsa.select(q, k, **case.select_options), v * 0)
    assert error == pytest.approx(0)
