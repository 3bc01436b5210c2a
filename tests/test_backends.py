"""Which backends there are, what keeps them from running here, and the words that say so."""

import pytest

import llsa_np as llsa
from llsa_np.backends import NAMES


@pytest.mark.parametrize("name", NAMES)
def test_runs_here(name):
    """Shown as a skip with every reason where a backend cannot run, so that no run hides one."""
    reasons = llsa.backends()[name]
    if reasons:
        pytest.skip(f"backend {name} cannot run here: {'; '.join(reasons)}")
    assert name in ("numpy", "numba_cuda", "cupy_raw")


def test_numpy_always_runs():
    assert llsa.backends()["numpy"] == ()
    assert tuple(llsa.backends()) == NAMES
