"""The site builds without a warning, every page executed; and what the README shows is true."""

import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def test_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in ("index", "how_it_works", "three_times", "without_a_gpu", "api", "choosing", "promises"):
        assert (tmp_path / f"{page}.html").exists()


def blocks_of(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_readme_python_runs():
    assert blocks_of("README.md")
    for block in blocks_of("README.md"):
        subprocess.run(
            [sys.executable, "-W", "error", "-c", block], check=True, capture_output=True, text=True, cwd=ROOT
        )


def test_the_recipe_for_another_frameworks_gradients():
    """The autograd function that api.md shows has the gradients that torch finds by differences."""
    (recipe,) = (block for block in blocks_of("docs/api.md") if "autograd" in block)
    names = {}
    exec(recipe, names)
    tensors = [torch.randn(1, 2, 9, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(names["Attention"].apply, tensors)


def test_readme_links_lead_somewhere():
    for page in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / page).read_text()
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (ROOT / target).exists(), f"{page} links to {target}"
