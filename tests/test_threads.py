"""Calls from several threads at once, and what a call leaves behind."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from calls import assert_same_bits, run
from frameworks import NumPy
from strategies import EMULATED, SIMULATED, Case
from threadpoolctl import threadpool_info, threadpool_limits

import llsa_np as llsa
from llsa_np import threads
from llsa_np.threads import run as run_tasks

CASE = Case(dtype="float32", batch=2, kv_heads=2, group=2, query_tokens=700, key_tokens=700, dim=16, value_dim=16)


def blas_threads():
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


@pytest.fixture(autouse=True)
def threads_for_all(monkeypatch):
    """Small calls take threads too, and BLAS has two of its own."""
    monkeypatch.setattr(threads, "FEW_NUMBERS", 0)
    monkeypatch.setattr(threads, "cores", lambda: 4)
    monkeypatch.setattr(threads, "_controller", None)  # it knows the libraries of its first call, SciPy's may be later
    with threadpool_limits(2, "blas"):
        yield


def test_threads_change_no_bit(monkeypatch):
    case = CASE.but(group=1)
    found = run(case, "numpy", NumPy)
    monkeypatch.setattr(threads, "FEW_NUMBERS", 10**9)
    alone = run(case, "numpy", NumPy)
    for name in alone.arrays:
        assert_same_bits(found[name], alone[name])


@pytest.mark.skipif(SIMULATED or EMULATED, reason="runs one launch at a time, slowly")
def test_calls_from_many_threads_at_once(backend, framework):
    expected = run(CASE.served(), backend, framework)
    before = blas_threads()  # of what the call loads, too
    with ThreadPoolExecutor(8) as pool:
        for results in pool.map(lambda _: run(CASE.served(), backend, framework), range(24)):
            for name in expected.arrays:
                assert_same_bits(results[name], expected[name])
    assert 2 in before
    assert blas_threads() == before, "the number of BLAS threads was not put back"


def test_an_error_in_a_thread_comes_out_and_blas_is_put_back():
    before = blas_threads()
    assert 2 in before

    def fail(task):
        assert blas_threads() == [1] * len(before)
        if task == 5:
            raise RuntimeError("task 5")

    with pytest.raises(RuntimeError, match="task 5"):
        run_tasks(fail, list(range(8)), 10**6)
    assert blas_threads() == before


def test_whatever_the_caller_does_about_warnings():
    """NaN and overflow are results: no warning, and no error where the caller made errors of them."""
    q = np.full((1, 2, 600, 4), 1e30, np.float32)
    q[0, 0, 5] = np.nan
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        selection = llsa.select(q, q)
        out, lse = llsa.attend(q, q, q, selection)
        llsa.attend_backward(out, q, q, q, out, lse, selection)
        llsa.merge((out, lse), (out, lse))
        llsa.coverage(q, q, selection, q, queries=3)
        llsa.pool(q)
