"""The NumPy reference against plain loops over spec.md's formulas, in float64: nothing shared but the formulas."""

import brute_force
import numpy as np
from calls import assert_within_bounds, reference, run
from frameworks import NumPy
from hypothesis import assume, given, settings
from strategies import Limits, cases

SMALL = Limits(tokens=70, dim=6)


@given(case=cases(limits=SMALL, dtypes=("float64",), exponents=(0, 0, 0, 0)))
@settings(max_examples=300)
def test_attention_and_gradients(case):
    results = run(case, "numpy", NumPy)
    exact = reference(case, results.selection)  # for the sizes of sums; its results are replaced
    q, k, v, dout, dlse = (case.to_bhnd(x) for x in case.arrays())
    enrich = tuple(range(1, case.depth + 1)) if case.enrich is None else case.enrich
    scale = case.scale or case.dim**-0.5
    for n in range(case.batch):
        dk, dv = np.zeros(k[n].shape), np.zeros(v[n].shape)
        for h in range(case.heads):
            kv = h // case.group

            def rows_of(level, query, n=n, h=h):
                row = results.selection[level][n, h, query]
                return [int(j) for j in row if j >= 0]

            options = (case.block_size, case.depth, enrich, case.reweight, scale)
            expected = brute_force.attention(
                q[n, h], k[n, kv], v[n, kv], rows_of, *options, dout=dout[n, h], dlse=dlse[n, h]
            )
            for name, value in zip(("out", "lse", "dq"), expected):
                exact.results[name][n, h] = value
            dk[kv] += expected[3]
            dv[kv] += expected[4]
        exact.results["dk"][n], exact.results["dv"][n] = dk, dv
    assert_within_bounds(case, results, exact)


@given(case=cases(limits=SMALL, dtypes=("float64",), exponents=(0, 0, 0, 0)))
@settings(max_examples=300)
def test_selection(case):
    # Scores that tie must be exact to order alike however they are summed: means of small integers over powers of two.
    case = case.but(data="tied") if case.data == "constant" else case
    counts = [
        count
        for tokens in (case.query_tokens, case.key_tokens)
        for level in range(case.depth + 1)
        for count in brute_force.counts_of(tokens, case.block_size, level)
    ]
    assume(case.data != "tied" or all(count & (count - 1) == 0 for count in counts))
    q, k, *_ = (case.to_bhnd(x) for x in case.arrays())
    selection = run(case, "numpy", NumPy).selection
    for n in range(case.batch):
        for h in range(case.heads):
            expected = brute_force.select(q[n, h], k[n, h // case.group], case.block_size, case.depth, case.topks)
            for level, rows in expected.items():
                got = [[int(j) for j in row if j >= 0] for row in selection[level][n, h]]
                assert got == rows, f"level {level}, {case!r}"
