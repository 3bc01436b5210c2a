"""Running a Case through the public functions of one backend and framework, and judging what comes back."""

from dataclasses import dataclass

import numpy as np

import llsa_np as llsa
from llsa_np.accuracy import compare, exact
from llsa_np.options import check_attend_options


@dataclass
class Results:
    """What a Case gave, as host arrays (batch, heads, tokens, dim)."""

    arrays: dict
    selection: llsa.Selection

    def __getitem__(self, name):
        return self.arrays[name]

    def selection_of(self, framework):
        """The selection again, in arrays of a framework."""
        return with_arrays(self.selection, framework.array)


def with_arrays(selection, convert):
    return llsa.Selection(
        [convert(level) for level in selection],
        block_size=selection.block_size,
        query_tokens=selection.query_tokens,
        key_tokens=selection.key_tokens,
    )


def run(case, backend, framework, arrays=None, selection=None, dlse=True, **attend_options):
    """select, attend and attend_backward on the case's arrays (or those given, in its layout)."""
    q, k, v, dout, dlse_array = (framework.array(x) for x in (case.arrays() if arrays is None else arrays))
    options = case.attend_options | attend_options
    if selection is None:
        selection = llsa.select(q, k, backend=backend, **case.select_options)
    elif isinstance(selection[1], np.ndarray):
        selection = with_arrays(selection, framework.array)
    out, lse = llsa.attend(q, k, v, selection, backend=backend, **options)
    gradients = llsa.attend_backward(
        dout, q, k, v, out, lse, selection, dlse=dlse_array if dlse else None, backend=backend, **options
    )
    results = dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *gradients)))
    back = {name: case.to_bhnd(framework.to_numpy(x)) for name, x in results.items()}
    return Results(back, with_arrays(selection, framework.to_numpy))


def reference(case, selection, arrays=None, dlse=True, **attend_options):
    """The float64 reference of a Case under a selection."""
    q, k, v, dout, dlse_array = case.arrays() if arrays is None else arrays
    options = case.attend_options | attend_options
    options.pop("layout")
    checked = check_attend_options("reference", **options, precision="full", levels=selection.levels, dim=case.dim)
    return exact(
        *(case.to_bhnd(x) for x in (q, k, v)), selection, checked, case.to_bhnd(dout), dlse_array if dlse else None
    )


def assert_within_bounds(case, results, expected):
    """Every result's error is within spec.md's bound."""
    ratios = compare(results.arrays, expected, case.dtype)
    assert max(ratios.values()) <= 1, f"errors over their bounds: {ratios} for {case!r}"


def assert_same_bits(a, b):
    """Equal arrays, NaN where NaN, and the same sign of zero."""
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    if a.tobytes() != b.tobytes():
        a64, b64 = a.astype(np.float64), b.astype(np.float64)
        same = np.isnan(a64) & np.isnan(b64)
        same |= (a64 == b64) & (np.signbit(a64) == np.signbit(b64))
        assert same.all(), f"{(~same).sum()} of {same.size} elements differ"
