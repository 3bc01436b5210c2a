"""Backends and frameworks as parameters, poisoned outputs, and the last lines that say what ran."""

import os
from collections import Counter

import frameworks
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import llsa_np as llsa
from llsa_np.adapters.numpy_arrays import NumpyAdapter

settings.register_profile(
    "suite",
    deadline=None,
    derandomize=True,  # the same cases on every run; `llsa check` is where new ones come from
    print_blob=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


def pytest_generate_tests(metafunc):
    """`backend`: every backend that can run here. tests/test_backends.py skips once for each of the others."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize(
            "backend", [name for name, reasons in llsa.backends().items() if not reasons], scope="session"
        )


@pytest.fixture(scope="session", params=frameworks.FRAMEWORKS)
def framework(request):
    """Every array framework that the suite calls with."""
    return frameworks.FRAMEWORKS[request.param]


@pytest.fixture(scope="session", autouse=True)
def poisoned_outputs():
    """New arrays hold NaN, or indices that are out of range, so that what a backend does not write cannot pass."""
    plain = NumpyAdapter.empty

    def poisoned(self, *args, **kwargs):
        array, view = plain(self, *args, **kwargs)
        array.fill(2**30 if array.dtype == np.int32 else np.nan)
        return array, view

    NumpyAdapter.empty = poisoned
    yield
    NumpyAdapter.empty = plain


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    name = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
    if name and report.when == "call":
        report.user_properties.append(("backend", name))


def pytest_terminal_summary(terminalreporter):
    """Which backends ran, and why others did not: a green run cannot hide one."""
    counts = Counter()
    for status in ("passed", "failed"):
        for report in terminalreporter.stats.get(status, []):
            counts.update(value for key, value in report.user_properties if key == "backend")
    terminalreporter.section("backends")
    for name, reasons in llsa.backends().items():
        line = (
            f"{name}: {counts[name]} tests ran"
            if counts[name] or not reasons
            else f"{name}: not run: {'; '.join(reasons)}"
        )
        terminalreporter.write_line(line)
