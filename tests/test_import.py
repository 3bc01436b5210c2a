"""`import llsa_np` loads NumPy and nothing else."""

import subprocess
import sys

import pytest

LOADED = """
import sys
import numpy
before = set(sys.modules)
import llsa_np
print(*sorted(set(sys.modules) - before))
"""


def fresh(code, *options):
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_import_loads_no_framework():
    """Nor parts of the standard library that take long to load and that it does not need."""
    loaded = fresh(LOADED).split()
    ours = {"llsa_np", "numpy", "_editable_impl_llsa_np", "__editable___llsa_np_0_1_0_finder"}
    top = {name.partition(".")[0] for name in loaded}
    assert {name for name in top if name not in sys.stdlib_module_names} <= ours, top
    for slow in ("asyncio", "concurrent.futures", "http", "multiprocessing", "unittest"):
        assert slow not in loaded


def test_a_call_on_numpy_arrays_loads_no_framework():
    code = "import numpy, sys, llsa_np; x = numpy.ones((1, 1, 5, 4)); llsa_np.attention(x, x, x); llsa_np.backends()"
    names = fresh(code + "; print(' '.join(sys.modules))").split()
    for framework in ("cupy", "numba", "torch", "jax", "matplotlib"):
        assert framework not in names


def test_arrays_that_speak_to_a_framework_load_it_not():
    """A subclass of NumPy's arrays that torch's functions would take."""
    code = """
import numpy, sys, llsa_np
class Own(numpy.ndarray):
    @classmethod
    def __torch_function__(cls, *arguments, **options):
        return NotImplemented
x = numpy.ones((1, 1, 5, 4)).view(Own)
print(llsa_np.attention(x, x, x).shape, "torch" in sys.modules)
"""
    assert fresh(code).strip() == "(1, 1, 5, 4) False"


def test_functions_are_not_hidden_by_the_modules_they_come_from():
    code = """
import llsa_np
import llsa_np.pool, llsa_np.select, llsa_np.attend, llsa_np.attend_backward, llsa_np.merge, llsa_np.zorder
import llsa_np.coverage, llsa_np.selection, llsa_np.hierarchy, llsa_np.backends
print([name for name in llsa_np.__all__ if type(getattr(llsa_np, name)).__name__ == "module"])
"""
    assert fresh(code).strip() == "[]"


@pytest.mark.parametrize("options", [(), ("-O",), ("-W", "error")])
def test_under_every_flag(options):
    code = "import numpy, llsa_np; x = numpy.ones((1, 1, 5, 4)); print(llsa_np.attention(x, x, x).shape)"
    assert fresh(code, *options).strip() == "(1, 1, 5, 4)"


def test_help_is_quick_and_needs_no_extra():
    code = """
import sys
from llsa_np.cli import main
try:
    main(["--help"])
except SystemExit:
    print(*sys.modules)
"""
    for framework in ("matplotlib", "rich", "skimage", "torch"):
        assert framework not in fresh(code).split()
