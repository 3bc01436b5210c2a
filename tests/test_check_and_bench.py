"""`llsa check` and `llsa bench`: what they print, what they find, and how they end."""

import argparse
import importlib
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import llsa_np as llsa
from llsa_np import numpy_backend
from llsa_np.cli import COMMANDS, main, overhead
from llsa_np.cli.check import draw
from llsa_np.cli.dense import caution, numpy_dense, time_dense, torch_dense


@pytest.fixture(autouse=True)
def few_calls(monkeypatch):
    """For an overhead that nobody reads."""
    monkeypatch.setattr(overhead, "CALLS", 5)


def test_check_passes_and_prints_a_line_that_runs(capsys):
    assert main(["check", "--seconds", "2", "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    for word in ("float16", "bfloat16", "float32", "seed 3", "within its bound"):
        assert word in printed
    line = re.search(r'^python -c "(.*)"$', printed, re.MULTILINE).group(1)
    again = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True)
    ratios = eval(again.stdout, {"inf": np.inf})
    assert set(ratios) == {"out", "lse", "dq", "dk", "dv", "selection"}
    assert max(ratios.values()) <= 1


def test_check_finds_a_planted_bug(capsys, monkeypatch):
    right = numpy_backend.backend.attend

    def off_by_a_little(*arguments):
        right(*arguments)
        out = arguments[5]
        out[..., -1, :] *= 2

    monkeypatch.setattr(numpy_backend.NumpyBackend, "attend", staticmethod(off_by_a_little))
    assert main(["check", "--seconds", "1", "--seed", "3"]) == 1
    assert "over its bound" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["check", "--seconds", "0"], "--seconds is 0"),
        (["bench", "--heads", "0"], "--heads is 0"),
        (["bench", "--tokens", "0"], "--tokens is 0"),
        (["bench", "--out", "."], "--out is ., a folder"),
    ],
)
def test_mistakes_are_one_sentence(arguments, words, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("command", ["check", "bench"])
def test_a_backend_that_cannot_run_here(command, capsys):
    if not llsa.backends()["cupy_raw"]:
        pytest.skip("cupy_raw can run here")
    assert main([command, "--backend", "cupy_raw"]) == 2
    assert "cannot run here" in capsys.readouterr().err


def test_trials_are_drawn_again_from_their_seed():
    trials = [[draw(np.random.default_rng(5), dtype) for dtype in ("float16", "float32")] for _ in range(2)]
    assert trials[0] == trials[1]
    rng = np.random.default_rng(0)
    drawn = [draw(rng, "bfloat16") for _ in range(300)]
    assert min(t.key_tokens for t in drawn) < 5
    assert max(t.key_tokens for t in drawn) > 1000
    assert {t.layout for t in drawn} == {"bhnd", "bnhd"}
    assert any(t.enrich == () for t in drawn)
    assert any(t.query_tokens != t.key_tokens for t in drawn)


def test_bench_writes_its_figures(tmp_path, capsys):
    out = tmp_path / "new" / "folder" / "bench.json"
    arguments = ["--tokens", "256", "300", "--heads", "2", "--dim", "8", "--repeats", "1", "--out", str(out)]
    assert main(["bench", *arguments]) == 0
    figures = json.loads(out.read_text())
    assert figures["machine"]["cores"] >= 1
    assert [row["tokens"] for row in figures["speed"]] == [256, 300]
    for row in figures["speed"]:
        assert row["forward_ms"] > 0
        assert row["backward_ms"] > 0
        assert next(iter(row["peers"].values()))["forward_ms"] > 0
    assert "times faster" in capsys.readouterr().out


def test_bench_times_nothing_while_a_check_is_red(tmp_path, capsys, monkeypatch):
    right = numpy_backend.backend.attend

    def wrong(*arguments):
        right(*arguments)
        lse = arguments[6]
        lse += 1

    monkeypatch.setattr(numpy_backend.NumpyBackend, "attend", staticmethod(wrong))
    out = tmp_path / "bench.json"
    assert main(["bench", "--tokens", "256", "--heads", "1", "--dim", "8", "--out", str(out)]) == 1
    assert not out.exists()
    assert "over their bounds" in capsys.readouterr().out


def test_dense_attention_is_dense_attention():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, heads, n, 8)) for heads, n in ((4, 30), (2, 40), (2, 40)))
    weights = np.exp(q @ np.repeat(k, 2, axis=1).swapaxes(2, 3) / np.sqrt(8))
    expected = weights @ np.repeat(v, 2, axis=1) / weights.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(numpy_dense(q, k, v), expected, rtol=1e-12)
    np.testing.assert_allclose(torch_dense(q, k, v)().numpy(), expected, rtol=1e-12, atol=1e-14)
    dense = time_dense(q, k, v, queries=20, repeats=1)
    assert dense.queries == 20
    assert dense.seconds > 0
    assert dense.by == "torch"


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (6, 1)])
@pytest.mark.parametrize("scale", [None, 1.0, 0.03])
def test_dense_attentions_agree(heads, scale):
    rng = np.random.default_rng(0)
    shapes = ((heads[0], 30, 8), (heads[1], 40, 8), (heads[1], 40, 5))
    q, k, v = (rng.standard_normal((2, *shape), dtype=np.float32) for shape in shapes)
    out = torch_dense(q, k, v, scale)()
    assert out.dtype == torch.float32
    np.testing.assert_allclose(out.numpy(), numpy_dense(q, k, v, scale), rtol=1e-4, atol=1e-6)
    if scale is not None:
        assert not np.allclose(out.numpy(), numpy_dense(q, k, v), rtol=1e-2)


def test_few_queries_of_dense_attention_are_warned_of(tmp_path, capsys):
    assert caution(512, 65536) == caution(300, 300) == ""
    arguments = ["--tokens", "300", "--heads", "1", "--dim", "8", "--repeats", "1", "--out", str(tmp_path / "b.json")]
    assert main(["bench", *arguments, "--dense-queries", "299"]) == 0
    printed = capsys.readouterr().out
    assert "Caution: dense attention timed on 299 queries and scaled up to 300 looks slower" in printed
    assert "1 head, D = 8" in printed
    assert main(["bench", *arguments]) == 0
    assert "Caution" not in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command):
    parser = argparse.ArgumentParser()
    importlib.import_module(f"llsa_np.cli.{command}").add_arguments(parser)
    for action in parser._actions:
        if action.dest != "help":
            assert "default: " in action.help, action.dest
    parser.format_help()
