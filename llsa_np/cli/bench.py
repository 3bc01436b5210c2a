"""`llsa bench`: this machine's backends against dense attention, in one process, correctness first."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import llsa_np as llsa
from llsa_np.accuracy import compare, exact
from llsa_np.backends import NAMES, check_backend
from llsa_np.cli import overhead
from llsa_np.cli.dense import FEW, caution, median_seconds, time_dense
from llsa_np.cli.words import count
from llsa_np.options import check_attend_options, check_integer

Array = NDArray[Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `llsa bench`."""
    parser.add_argument("--backend", choices=NAMES, help="time this one alone (default: every one that can run here)")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[4096, 16384, 65536], help="lengths (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=1, help="batch size (default: %(default)s)")
    parser.add_argument("--heads", type=int, default=8, help="attention heads (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=64, help="head dim (default: %(default)s)")
    parser.add_argument("--topk", type=int, default=8, help="tokens kept of each level (default: %(default)s)")
    parser.add_argument("--block-size", type=int, default=16, help="tokens of a block (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of which the median is reported (default: %(default)s)")
    parser.add_argument(
        "--dense-queries",
        type=int,
        default=1024,
        help=f"queries that dense attention is timed on and scaled from, best {FEW} or more (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("bench.json"), help="where the figures go (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Check, then time, every length on every backend; 1 if a check failed, and then no time is reported."""
    from rich.console import Console
    from rich.table import Table
    from tqdm import tqdm

    for name in ("batch", "heads", "dim", "repeats", "dense_queries"):
        check_integer("bench", f"--{name.replace('_', '-')}", getattr(args, name), 1, None)
    for tokens in args.tokens:
        check_integer("bench", "--tokens", tokens, 1, None)
    if args.backend is not None:
        check_backend("bench", args.backend)
    backends = [name for name, reasons in llsa.backends().items() if not reasons and args.backend in (None, name)]
    if args.out.is_dir():
        raise IsADirectoryError(f"bench: --out is {args.out}, a folder; give the name of a file for the figures")
    args.out.parent.mkdir(parents=True, exist_ok=True)  # now, not after all the timing
    console = Console()
    if warning := caution(args.dense_queries, max(args.tokens)):
        console.print(warning, style="yellow", highlight=False, soft_wrap=True)
    for backend in backends:
        ratios = check(backend, args)
        if max(ratios.values()) > 1:
            console.print(f"[red]{backend}: errors over their bounds, so nothing is timed: {ratios}")
            return 1
    rows = []
    for tokens in tqdm(args.tokens, desc="lengths", leave=False, disable=None):
        for backend in backends:
            rows.append(measure(backend, tokens, args))

    table = Table(
        title=f"float32, batch {args.batch}, {count(args.heads, 'head')}, D = {args.dim}, K = {args.topk}; ms, medians"
    )
    peers = list(rows[0]["peers"])
    for heading in ("backend", "tokens", "levels", "forward", "backward", *peers, "times faster, forward"):
        table.add_column(heading, justify="right")
    for row in rows:
        dense = [row["peers"][peer]["forward_ms"] for peer in peers]
        table.add_row(
            row["backend"],
            f"{row['tokens']:,}",
            str(row["levels"]),
            f"{row['forward_ms']:.1f}",
            f"{row['backward_ms']:.1f}",
            *(f"{ms:,.0f}" for ms in dense),
            f"{min(dense) / row['forward_ms']:.1f}",
        )
    console.print(table)
    queries = count(args.dense_queries, "query", "queries")
    console.print(f"Dense attention is timed on {queries} over all keys, and scaled.")
    figures: dict[str, Any] = {"machine": machine(), "speed": rows}
    if "numpy" in backends:
        figures["overhead"] = overhead.rows()
        for row in figures["overhead"]:
            added = row["public_us"] - row["operations_us"]
            console.print(
                f"At {row['tokens']} tokens the public call adds {added:.0f} us to the reference's "
                f"{row['operations_us']:.0f} us."
            )
    args.out.write_text(json.dumps(figures, indent=1) + "\n")
    console.print(f"Figures: {args.out}")
    return 0


def inputs(tokens: int, args: argparse.Namespace) -> list[Array]:
    """q, k, v, dout."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal((args.batch, args.heads, tokens, args.dim), dtype=np.float32) for _ in range(4)]


def check(backend: str, args: argparse.Namespace) -> dict[str, float]:
    """Errors over their bounds of a ragged length with the benchmark's options."""
    q, k, v, dout = inputs(1111, args)
    selection = llsa.select(q, k, block_size=args.block_size, topk=args.topk, backend=backend)  # type: ignore[arg-type]
    out, lse = llsa.attend(q, k, v, selection, backend=backend)  # type: ignore[arg-type]
    gradients = llsa.attend_backward(dout, q, k, v, out, lse, selection, backend=backend)  # type: ignore[arg-type]
    options = check_attend_options("bench", None, True, None, "full", levels=selection.levels, dim=args.dim)
    results = dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *gradients)))
    return compare(results, exact(q, k, v, selection, options, dout), "float32")


def measure(backend: Any, tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """Medians of whole calls: pooling, selection and attention; then the backward pass."""
    q, k, v, dout = inputs(tokens, args)
    options: Any = {"block_size": args.block_size, "topk": args.topk, "backend": backend}
    selection = llsa.select(q, k, **options)
    out, lse = llsa.attend(q, k, v, selection, backend=backend)
    dense = time_dense(q, k, v, args.dense_queries, args.repeats)
    return {
        "backend": backend,
        "dtype": "float32",
        "batch": args.batch,
        "heads": args.heads,
        "kv_heads": args.heads,
        "tokens": tokens,
        "dim": args.dim,
        "block_size": args.block_size,
        "topk": args.topk,
        "levels": selection.levels,
        "data": "random",
        "forward_ms": 1000 * median_seconds(lambda: llsa.attention(q, k, v, **options), args.repeats),
        "backward_ms": 1000
        * median_seconds(
            lambda: llsa.attend_backward(dout, q, k, v, out, lse, selection, backend=backend), args.repeats
        ),
        "peers": {f"{dense.by}_dense": {"forward_ms": 1000 * dense.seconds, "queries_timed": dense.queries}},
    }


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    packages = ("llsa-np", "numpy", "threadpoolctl", "torch")
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages if find_spec(name.replace("-", "_"))},
    }


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
