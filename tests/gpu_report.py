"""`make gpu-report`: what a GPU says of this code, into docs/measurements/<card>.json.

Parts: the suite on this GPU; compute-sanitizer's memcheck, racecheck and initcheck over a small set of calls; speed,
beside dense attention through PyTorch in the same process; and steps, the forms of one step beside each other. A part
that is run alone is merged into the file if the kernels have not changed since; else the file begins anew.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

import gpu_small_set

ROOT = Path(__file__).parent.parent
PARTS = ("suite", "sanitizer", "speed", "steps")
SUITE = (
    "test_backends",
    "test_numba_kernels",
    "test_facts",
    "test_against_float64",
    "test_edges",
    "test_merge",
    "test_threads",
)
TOOLS = ("memcheck", "racecheck", "initcheck")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 65536, 262144, 1048576])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "measurements")
    args = parser.parse_args()
    card, driver = gpu()
    path = args.out / f"{re.sub('[^a-z0-9]+', '-', card.lower()).strip('-')}.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    if report.get("sources") != sources():
        report = {"sources": sources()}
    report |= {"card": card, "driver": driver, "python": platform.python_version(), "versions": versions()}
    for part in PARTS if args.part == "all" else (args.part,):
        report[part] = {"suite": suite, "sanitizer": sanitizer, "speed": speed, "steps": steps}[part](args)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(f"{part}: written to {path}", flush=True)
    bad = report.get("suite", {}).get("failed", 0) or any(report.get("sanitizer", {}).values())
    return int(bool(bad))


def gpu():
    """The card's name and the driver's version."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    first = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    card, driver = first.split(", ")
    return card, driver


def sources():
    """A hash of everything under gpu/ that is code."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "gpu").rglob("*")):
        if path.suffix in (".py", ".cu", ".cuh"):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def versions():
    found = {}
    for name in ("numpy", "numba", "numba-cuda", "cupy-cuda13x", "cupy-cuda12x", "cuda-core", "torch", "hypothesis"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def suite(_):
    """The property suite with every backend that runs here."""
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "suite.xml"
        files = [str(ROOT / "tests" / f"{name}.py") for name in SUITE if (ROOT / "tests" / f"{name}.py").exists()]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n",
            str(min(16, os.cpu_count() or 1)),
            "-p",
            "no:cacheprovider",
        ]
        command += ["-p", "no:benchmark", f"--junitxml={xml}", *files]  # pytest-benchmark warns of xdist
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        totals = ElementTree.parse(xml).getroot().find("testsuite").attrib
    counts = {name: int(totals[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    if passed == 0 or status not in (0, 1):  # 1: some tests failed
        raise RuntimeError(f"suite: pytest ended with status {status} and {passed} tests passed")
    return {
        "passed": passed,
        "failed": failed,
        "skipped": counts["skipped"],
        "seconds": round(float(totals["time"]), 1),
    }


def sanitizer(_):
    """Errors that each tool of compute-sanitizer reports over gpu_small_set.py, or its exit status."""
    found = {}
    for tool in TOOLS:
        command = ["compute-sanitizer", "--tool", tool, sys.executable, str(ROOT / "tests" / "gpu_small_set.py")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", done.stdout + done.stderr)
        found[tool] = int(summary.group(1)) if summary and done.returncode == 0 else f"exit status {done.returncode}"
        if found[tool]:
            print((done.stdout + done.stderr)[-3000:])
    return found


def speed(args):
    """Whole calls on this GPU, medians, beside dense attention of the same run."""
    import cupy as cp

    import llsa_np as llsa

    backends = [name for name, reasons in llsa.backends().items() if not reasons and name != "numpy"]
    rows = []
    batch, heads, dim = 2, 4, 64
    gpu_small_set.main()  # raises, and there are no times, if a result is out of bounds
    for tokens in args.tokens:
        peers = dense_peers(batch, heads, tokens, dim)
        arrays = [random_bfloat16(cp, (batch, heads, tokens, dim), seed) for seed in range(4)]
        for backend in backends:
            for levels in sorted({llsa.default_levels(tokens), min(2, llsa.default_levels(tokens))}):
                rows.append(row(cp, llsa, backend, arrays, levels) | {"peers": peers})
                print(json.dumps(rows[-1]), flush=True)
        del arrays
        cp.get_default_memory_pool().free_all_blocks()
    return rows


def random_bfloat16(cp, shape, seed):
    import ml_dtypes
    import numpy as np

    x = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return cp.asarray(x.astype(ml_dtypes.bfloat16))


def row(cp, llsa, backend, arrays, levels):
    """One row of the report's `speed`. The peak is what CuPy's pool took from the card over a forward and a backward
    call, beyond inputs, dO, out and gradients."""
    q, k, v, dout = arrays
    batch, heads, tokens, dim = q.shape
    options = {"levels": levels, "backend": backend}
    pool = cp.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.total_bytes()
    selection = llsa.select(q, k, **options)
    out, lse = llsa.attend(q, k, v, selection, backend=backend)
    gradients = llsa.attend_backward(dout, q, k, v, out, lse, selection, backend=backend)
    peak = pool.total_bytes() - before - out.nbytes - sum(x.nbytes for x in gradients)
    del gradients
    forward = event_ms(cp, lambda: llsa.attention(q, k, v, **options))
    backward = event_ms(cp, lambda: llsa.attend_backward(dout, q, k, v, out, lse, selection, backend=backend))
    return {
        "backend": backend,
        "dtype": "bfloat16",
        "batch": batch,
        "heads": heads,
        "kv_heads": heads,
        "tokens": tokens,
        "dim": dim,
        "block_size": 16,
        "topk": 8,
        "levels": levels,
        "data": "random",
        "forward_ms": round(forward, 4),
        "backward_ms": round(backward, 4),
        "peak_extra_mib": round(peak / 2**20, 1),
    }


def steps(_):
    """Milliseconds of each form of a step that the Numba kernels tell in more than one, on the same arrays: all else
    that the call does (pooling, before selection) is in it as well, and is told as its own form."""
    import cupy as cp

    import llsa_np as llsa
    from llsa_np.gpu.numba_cuda import attend, attend_two_passes, backend, select

    batch, heads, tokens, dim, levels = 2, 4, 65536, 64, 2
    q, k, v = [random_bfloat16(cp, (batch, heads, tokens, dim), seed) for seed in range(3)]
    shape = {"backend": "numba_cuda", "dtype": "bfloat16", "batch": batch, "heads": heads, "tokens": tokens}
    shape |= {"dim": dim, "block_size": 16, "levels": levels}
    rows = []

    def add(step, form, topk, call):
        rows.append(shape | {"step": step, "form": form, "topk": topk, "ms": round(event_ms(cp, call), 4)})
        print(json.dumps(rows[-1]), flush=True)

    def pool_both():
        return [llsa.pool(x, levels=levels, backend="numba_cuda") for x in (q, k)]

    form_of = select.form_of
    for topk in (4, 8, 16, 32, 64):
        kept = {}
        for form in ("serial", "bitonic", "bits"):
            select.form_of = lambda *_, form=form: form
            call = lambda topk=topk: llsa.select(q, k, levels=levels, topk=topk, backend="numba_cuda")  # noqa: E731
            kept[form] = call()
            if any((a != b).any() for a, b in zip(kept["serial"], kept[form])):
                raise ValueError(f"top-k: {form} keeps others than serial at K = {topk}")
            add("top_k", form, topk, call)
    select.form_of = form_of
    add("top_k", "pooling alone", 8, pool_both)

    selection = llsa.select(q, k, levels=levels, backend="numba_cuda")
    forms = {
        "two passes": (attend_two_passes.attend_two_passes, attend_two_passes.attend_two_passes_spaces),
        "online": (attend.attend, attend.attend_spaces),  # last, so that it stays
    }
    outs = {}
    for form, (backend.attend, backend.attend_spaces) in forms.items():
        outs[form], _ = llsa.attend(q, k, v, selection, backend="numba_cuda")
        add("softmax", form, 8, lambda: llsa.attend(q, k, v, selection, backend="numba_cuda"))
    two, one = (cp.asnumpy(out).astype("f4") for out in outs.values())
    gap = abs(two - one).max()
    if not gap < 0.02:
        raise ValueError(f"softmax: two passes and online differ by {gap}")
    add("softmax", "pooling alone", 8, lambda: [llsa.pool(x, levels=levels, backend="numba_cuda") for x in (k, v)])
    return rows


def event_ms(cp, call, budget_ms=1500.0):
    """Median milliseconds by device events, after a warm-up."""
    call()
    cp.cuda.get_current_stream().synchronize()
    times = []
    while len(times) < 3 or (sum(times) < budget_ms and len(times) < 50):
        start, end = cp.cuda.Event(), cp.cuda.Event()
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(cp.cuda.get_elapsed_time(start, end))
    return statistics.median(times)


def dense_peers(batch, heads, tokens, dim):
    """FlashAttention-2 and cuDNN attention through PyTorch, both ways; none where they would take minutes."""
    from torch.nn.attention import SDPBackend

    if tokens > 300_000:
        return {}
    kernels = {"flash_attention_2": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    return {name: dense_peer(kernel, (batch, heads, tokens, dim)) for name, kernel in kernels.items()}


def dense_peer(kernel, shape):
    """Forward and backward milliseconds of one of PyTorch's kernels."""
    import torch
    from torch.nn.attention import sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    with sdpa_kernel(kernel):
        forward = torch_ms(torch, lambda: sdpa(q.detach(), k.detach(), v.detach()))
        out = sdpa(q, k, v)
        dout = torch.randn_like(out)
        backward = torch_ms(torch, lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))
    torch.cuda.empty_cache()
    return {"forward_ms": round(forward, 4), "backward_ms": round(backward, 4)}


def torch_ms(torch, call, budget_ms=1500.0):
    call()
    torch.cuda.synchronize()
    times = []
    while len(times) < 3 or (sum(times) < budget_ms and len(times) < 50):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())
