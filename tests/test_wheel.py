"""What a user installs: the wheel, in a fresh environment, away from the sources."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

CODE = """
import importlib.resources as resources
import numpy as np
import llsa_np, llsa_np.gpu, llsa_np.adapters
x = np.random.default_rng(0).standard_normal((1, 2, 300, 8))
assert "site-packages" in llsa_np.__file__, llsa_np.__file__
assert np.isfinite(llsa_np.attention(x, x, x)).all()
print(sum(1 for path in resources.files("llsa_np.gpu").rglob("*.cu")))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_the_package_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {"llsa_np", wheel.name.partition("-py3")[0] + ".dist-info"}
    sources = {
        f"llsa_np/{target}{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in (("llsa_np", ""), ("gpu", "gpu/"), ("adapters", "adapters/"))
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".cu", ".cuh") or path.name == "py.typed"
    }
    assert sources <= set(names)
    assert any(name.endswith("LICENSE") for name in names)


def test_wheel_works_in_a_fresh_environment(wheel, tmp_path):
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python = venv / "bin" / "python"
    constraints = ROOT / "tests" / "constraints.txt"
    command = [python, "-m", "pip", "install", "--quiet", "--constraint", constraints, wheel]
    subprocess.run(command, check=True, capture_output=True, text=True)
    done = subprocess.run([python, "-c", CODE], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert int(done.stdout) == len(list((ROOT / "gpu").rglob("*.cu")))
    help_text = subprocess.run([venv / "bin" / "llsa", "--help"], check=True, capture_output=True, text=True).stdout
    assert "explain" in help_text
    # Without its extra the command says what to install.
    missing = subprocess.run([venv / "bin" / "llsa", "check"], capture_output=True, text=True, check=False)
    assert missing.returncode == 2
    assert "pip install 'llsa-np[explain]'" in missing.stderr
    assert "Traceback" not in missing.stderr
