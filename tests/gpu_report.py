"""`make gpu-report`: what a GPU says of this code, into docs/measurements/<card>.json.

Parts: the suite on this GPU, and on JAX's arrays; compute-sanitizer's memcheck, racecheck and initcheck over a small
set of calls; speed, beside dense attention through PyTorch in the same process; overhead, what calls cost the host;
ranks, one sequence over several GPUs; errors over their bounds; whether runs repeat each other; and steps, the forms of
one step beside each other. Each is kept by backend. What is run alone is merged into the file; what the file says of
kernels that have changed since is dropped from it.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

import gpu_small_set

ROOT = Path(__file__).parent.parent
BACKENDS = ("numba_cuda", "cupy_raw")
SUITE = (
    "test_backends",
    "test_numba_kernels",
    "test_facts",
    "test_against_float64",
    "test_edges",
    "test_merge",
    "test_threads",
    "test_pytorch_cuda",
    "test_dlpack_cuda",
)
TOOLS = ("memcheck", "racecheck", "initcheck")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all")
    parser.add_argument("--backend", choices=(*BACKENDS, "all"), default="all")
    parser.add_argument("--tokens", type=int, nargs="+", help="lengths whose speed is measured")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "measurements")
    args = parser.parse_args()
    card, driver = gpu()
    path = args.out / f"{re.sub('[^a-z0-9]+', '-', card.lower()).strip('-')}.json"
    report = current(json.loads(path.read_text())) if path.exists() else {}
    report |= {"card": card, "driver": driver, "python": platform.python_version(), "versions": versions()}
    for part in PARTS if args.part == "all" else (args.part,):
        for backend in BACKENDS if args.backend == "all" else (args.backend,):
            if {"steps": "numba_cuda", "overhead": "cupy_raw", "ranks": "cupy_raw"}.get(part, backend) != backend:
                continue  # only Numba tells steps in several forms, and only CUDA C++ is launched by plans
            if part == "ranks" and gpus() < 2:
                print("ranks: not measured, there is one GPU", flush=True)
                continue
            # No times of kernels whose results have not been seen to be right
            for what in ["errors"] * (part == "speed" and backend not in report.get("errors", {})) + [part]:
                add(report, what, backend, MAKE[what](args, backend))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(report, indent=1) + "\n")
                print(f"{what} of {backend}: written to {path}", flush=True)
    bad = [counts["failed"] for part in ("suite", "jax") for counts in report.get(part, {}).values()]
    bad += [count for found in report.get("sanitizer", {}).values() for count in found.values()]
    bad += [found["different"] for found in report.get("repeats", {}).values()]
    return int(any(bad))


def add(report, part, backend, told):
    """What a part tells of a backend, in the place of what it told before."""
    report.setdefault("sources", {})[backend] = sources(backend)
    if isinstance(told, list):
        report[part] = told + [row for row in report.get(part, []) if row["backend"] != backend]
    else:
        report.setdefault(part, {})[backend] = told


def current(report):
    """A report without what it says of kernels that are not those of today."""
    kept = {name: digest for name, digest in report.get("sources", {}).items() if digest == sources(name)}
    for part in PARTS:
        if isinstance(report.get(part), list):
            report[part] = [row for row in report[part] if row["backend"] in kept]
        elif part in report:
            report[part] = {name: told for name, told in report[part].items() if name in kept}
    return report | {"sources": kept}


def gpu():
    """The card's name and the driver's version."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    first = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    card, driver = first.split(", ")
    return card, driver


def gpus():
    """How many there are."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return len(subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines())


def sources(backend):
    """A hash of all code of a backend's kernels; what was measured of them holds whatever their comments say."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "gpu" / backend).rglob("*")):
        if path.suffix in (".py", ".cu", ".cuh"):
            comment = r"(?m)^ *#.*\n|  # .*$" if path.suffix == ".py" else r"(?m)^ *//.*\n| *//.*$"
            code = re.sub(comment, "", path.read_text())
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + code.encode())
    return digest.hexdigest()


def versions():
    found = {}
    for name in (
        "numpy",
        "numba",
        "numba-cuda",
        "cupy-cuda13x",
        "cupy-cuda12x",
        "cuda-core",
        "torch",
        "jax",
        "hypothesis",
    ):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def suite(_, backend):
    """The property suite with one backend, on all frameworks but JAX."""
    return run_suite(backend, SUITE, "not jax")


def jax(_, backend):
    """The same on JAX's arrays. In processes of their own, for with XLA's threads about, a graph that PyTorch captures
    there may be spoilt."""
    return run_suite(backend, (*SUITE, "test_jax_cuda"), "jax")


def run_suite(backend, modules, names):
    """How many tests of these modules and names pass, fail and are skipped."""
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "suite.xml"
        files = [str(ROOT / "tests" / f"{name}.py") for name in modules]
        command = [sys.executable, "-m", "pytest", "-q", "-n", str(min(16, os.cpu_count() or 1)), "-k", names]
        command += ["-p", "no:cacheprovider", "-p", "no:benchmark"]  # pytest-benchmark warns of xdist
        command += [f"--backend={backend}", f"--junitxml={xml}", *files]
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


def sanitizer(_, backend):
    """Errors that each tool of compute-sanitizer reports over gpu_small_set.py, or its exit status."""
    found = {}
    for tool in TOOLS:
        command = ["compute-sanitizer", "--tool", tool]
        if tool == "memcheck":  # not of the driver: libraries ask it for functions, and do without those that it lacks
            command += ["--report-api-errors", "no"]
        command += [sys.executable, str(ROOT / "tests" / "gpu_small_set.py"), backend]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", done.stdout + done.stderr)
        found[tool] = int(summary.group(1)) if summary and done.returncode == 0 else f"exit status {done.returncode}"
        if found[tool]:
            print((done.stdout + done.stderr)[-3000:])
    return found


def errors(_, backend):
    """The largest error over its bound (spec.md, Rounding), by dtype, over gpu_small_set.py."""
    return gpu_small_set.check([backend])


def repeats(_, backend):
    """Runs that gave other bits than the first."""
    import gpu_speed

    return gpu_speed.repeats(backend)


def speed(args, backend):
    """Whole calls on this GPU, medians, beside dense attention of the same run."""
    import gpu_speed

    rows = []
    for row in gpu_speed.rows(backend, args.tokens):
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def overhead(_, backend):
    """What calls cost the host."""
    import gpu_overhead

    return list(gpu_overhead.rows(backend))


def ranks(_, backend):
    """One sequence over all GPUs of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        script = str(ROOT / "tests" / "gpu_ranks.py")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus()}", script]
        subprocess.run([*command, str(out)], check=True)
        return json.loads(out.read_text())


def steps(_, backend):
    """Milliseconds of each form of a step that the Numba kernels tell in more than one, on the same arrays: all else
    that the call does (pooling, before selection) is in it as well, and is told as its own form."""
    import cupy as cp
    from gpu_speed import MAIN, median_ms, tensors

    import llsa_np as llsa
    from llsa_np.gpu.numba_cuda import attend, attend_two_passes, select
    from llsa_np.gpu.numba_cuda import backend as operations

    q, k, v, _ = (cp.from_dlpack(x) for x in tensors(MAIN))
    levels = MAIN["levels"]
    shape = {"backend": backend} | {name: MAIN[name] for name in MAIN if name not in ("topk", "data")}
    rows = []

    def add(step, form, topk, call):
        rows.append(shape | {"step": step, "form": form, "topk": topk, "ms": median_ms(call)[0]})
        print(json.dumps(rows[-1]), flush=True)

    def pool_both():
        return [llsa.pool(x, levels=levels, backend=backend) for x in (q, k)]

    form_of = select.form_of
    for topk in (4, 8, 16, 32, 64):
        kept = {}
        for form in ("serial", "bitonic", "bits"):
            select.form_of = lambda *_, form=form: form
            call = lambda topk=topk: llsa.select(q, k, levels=levels, topk=topk, backend=backend)  # noqa: E731
            kept[form] = call()
            if any((a != b).any() for a, b in zip(kept["serial"], kept[form])):
                raise ValueError(f"top-k: {form} keeps others than serial at K = {topk}")
            add("top_k", form, topk, call)
    select.form_of = form_of
    add("top_k", "pooling alone", 8, pool_both)

    selection = llsa.select(q, k, levels=levels, backend=backend)
    forms = {
        "two passes": (attend_two_passes.attend_two_passes, attend_two_passes.attend_two_passes_spaces),
        "online": (attend.attend, attend.attend_spaces),  # last, so that it stays
    }
    outs = {}
    for form, (operations.attend, operations.attend_spaces) in forms.items():
        outs[form], _ = llsa.attend(q, k, v, selection, backend=backend)
        add("softmax", form, 8, lambda: llsa.attend(q, k, v, selection, backend=backend))
    two, one = (cp.asnumpy(out).astype("f4") for out in outs.values())
    gap = abs(two - one).max()
    if not gap < 0.02:
        raise ValueError(f"softmax: two passes and online differ by {gap}")
    add("softmax", "pooling alone", 8, lambda: [llsa.pool(x, levels=levels, backend=backend) for x in (k, v)])
    return rows


MAKE = {
    "suite": suite,
    "jax": jax,
    "sanitizer": sanitizer,
    "errors": errors,
    "repeats": repeats,
    "speed": speed,
    "overhead": overhead,
    "ranks": ranks,
    "steps": steps,
}
PARTS = tuple(MAKE)

if __name__ == "__main__":
    sys.exit(main())
