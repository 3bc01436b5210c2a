"""Which backends there are, what keeps them from running here, and the words that say so."""

import numpy as np
import pytest

import llsa_np as llsa
from llsa_np.backends import NAMES


@pytest.mark.parametrize("name", NAMES)
def test_runs_here(name):
    """Shown as a skip with every reason where a backend cannot run, so that no run hides one."""
    reasons = llsa.backends()[name]
    if reasons:
        pytest.skip(f"backend {name} cannot run here: {'; '.join(reasons)}")
    x = np.random.default_rng(0).standard_normal((1, 2, 20, 16), dtype=np.float32)
    assert np.isfinite(llsa.attention(x, x, x, backend=name)).all()


def test_numpy_always_runs():
    assert llsa.backends()["numpy"] == ()
    assert tuple(llsa.backends()) == NAMES
