"""`llsa check`: random calls on every backend that can run here, judged against float64."""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import llsa_np as llsa
from llsa_np.accuracy import compare, exact, selection_is_right
from llsa_np.backends import NAMES, check_backend
from llsa_np.options import check_attend_options

DTYPES = ("float16", "bfloat16", "float32", "float64")
RESULTS = ("out", "lse", "dq", "dk", "dv")


@dataclass(frozen=True)
class Trial:
    """One call, whole: its repr makes it again."""

    dtype: str
    batch: int
    kv_heads: int
    group: int
    query_tokens: int
    key_tokens: int
    dim: int
    value_dim: int
    block_size: int
    levels: int
    topk: tuple[int, ...]
    enrich: tuple[int, ...]
    reweight: bool
    layout: str
    tied: bool
    exponents: tuple[int, int, int, int]
    """q, k, v and dO are N(0, 1), or small integers if tied, times 2 to these."""
    seed: int

    def arrays(self) -> list[NDArray[Any]]:
        """q, k, v, dout in the trial's layout and dlse."""
        rng = np.random.default_rng(self.seed)
        dtype: Any = ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype
        heads = self.kv_heads * self.group
        arrays = []
        for (h, tokens, dim), exponent in zip(
            (
                (heads, self.query_tokens, self.dim),
                (self.kv_heads, self.key_tokens, self.dim),
                (self.kv_heads, self.key_tokens, self.value_dim),
                (heads, self.query_tokens, self.value_dim),
            ),
            self.exponents,
        ):
            shape = (self.batch, h, tokens, dim) if self.layout == "bhnd" else (self.batch, tokens, h, dim)
            x = rng.integers(-1, 2, shape).astype(float) if self.tied else rng.standard_normal(shape)
            arrays.append(np.ldexp(x, exponent).astype(dtype))
        lse_dtype = "float64" if self.dtype == "float64" else "float32"
        return [*arrays, rng.standard_normal((self.batch, heads, self.query_tokens)).astype(lse_dtype)]

    def run(self, backend: str) -> dict[str, float]:
        """Error over bound of every result on a backend (1 is what is allowed), infinite under "selection" if that
        is not one that `select` may return."""
        q, k, v, dout, dlse = self.arrays()
        options: Any = {"enrich": self.enrich, "reweight": self.reweight}
        where: Any = {"layout": self.layout, "backend": backend}
        selection = llsa.select(q, k, block_size=self.block_size, levels=self.levels, topk=self.topk, **where)
        out, lse = llsa.attend(q, k, v, selection, **options, **where)
        gradients = llsa.attend_backward(dout, q, k, v, out, lse, selection, dlse=dlse, **options, **where)

        def bhnd(x: NDArray[Any]) -> NDArray[Any]:
            return x.swapaxes(1, 2) if self.layout == "bnhd" and x.ndim == 4 else x

        checked = check_attend_options(
            "check", scale=None, precision="full", levels=self.levels, dim=self.dim, **options
        )
        reference = exact(bhnd(q), bhnd(k), bhnd(v), selection, checked, bhnd(dout), dlse)
        results = {name: bhnd(x) for name, x in zip(RESULTS, (out, lse, *gradients))}
        right = selection_is_right(bhnd(q), bhnd(k), selection)
        return compare(results, reference, self.dtype) | {"selection": 0.0 if right else math.inf}


def draw(rng: np.random.Generator, dtype: str) -> Trial:
    """A random trial: lengths from 1 to 2,000 evenly on a logarithmic scale, everything else evenly."""

    def length() -> int:
        return int(2 ** rng.uniform(0, 11))

    block_size, key_tokens = int(rng.choice([2, 3, 4, 8, 16, 16, 17, 32, 64])), length()
    levels = int(rng.integers(1, 5)) if rng.random() < 0.5 else llsa.default_levels(key_tokens, block_size)
    coarse = range(1, levels + 1)
    kv_heads = int(rng.integers(1, 3))
    return Trial(
        dtype=dtype,
        batch=int(rng.integers(1, 3)),
        kv_heads=kv_heads,
        group=int(rng.integers(1, 4)),
        query_tokens=key_tokens if rng.random() < 0.5 else length(),
        key_tokens=key_tokens,
        dim=int(rng.integers(1, 97)),
        value_dim=int(rng.integers(1, 97)),
        block_size=block_size,
        levels=levels,
        topk=tuple(int(k) for k in rng.integers(1, 17, levels)),
        enrich=tuple(level for level in coarse if rng.random() < 0.7),
        reweight=bool(rng.random() < 0.7),
        layout=str(rng.choice(["bhnd", "bnhd"])),
        tied=bool(rng.random() < 0.2),
        exponents=tuple(int(e) for e in (rng.integers(-8, 5, 4) if rng.random() < 0.5 else np.zeros(4))),  # type: ignore[arg-type]
        seed=int(rng.integers(2**31)),
    )


@dataclass
class Tally:
    """What one backend did in one dtype."""

    trials: int = 0
    worst: float = 0.0
    result: str = "-"
    trial: Trial | None = None

    def add(self, trial: Trial, ratios: dict[str, float]) -> None:
        """Count a trial, and keep it if it is the worst so far."""
        self.trials += 1
        name = max(ratios, key=lambda key: ratios[key])
        if self.trial is None or ratios[name] > self.worst:
            self.worst, self.result, self.trial = ratios[name], name, trial


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `llsa check`."""
    parser.add_argument("--backend", choices=NAMES, help="check this one alone (default: every one that can run here)")
    parser.add_argument("--seconds", type=float, default=30, help="how long to try (default: 30)")
    parser.add_argument("--seed", type=int, help="of the random calls (default: a new one every time)")


def run(args: argparse.Namespace) -> int:
    """Try until the time is up; 0 if every error was within its bound, else 1."""
    from rich.console import Console
    from rich.table import Table
    from tqdm import tqdm

    if not args.seconds > 0:
        raise ValueError(f"check: --seconds is {args.seconds}; allowed is a number above 0")
    if args.backend is not None:
        check_backend("check", args.backend)
    backends = [name for name, reasons in llsa.backends().items() if not reasons and args.backend in (None, name)]
    seed = int(np.random.SeedSequence().generate_state(1)[0]) if args.seed is None else args.seed
    rng = np.random.default_rng(seed)
    # In float64 the NumPy backend is the reference itself; the test suite holds it against plain loops.
    kinds = [(name, dtype) for name in backends for dtype in DTYPES if (name, dtype) != ("numpy", "float64")]
    tallies = {kind: Tally() for kind in kinds}

    start = time.monotonic()
    bar_format = "{l_bar}{bar}| {n:.0f} of {total:.0f} s"
    with tqdm(total=args.seconds, bar_format=bar_format, leave=False, disable=None) as bar:  # None: not in a pipe
        turn = 0
        while turn < len(kinds) or time.monotonic() - start < args.seconds:
            kind = kinds[turn % len(kinds)]
            trial = draw(rng, kind[1])
            tallies[kind].add(trial, trial.run(kind[0]))
            turn += 1
            bar.update(min(time.monotonic() - start, args.seconds) - bar.n)

    table = Table(title=f"Random calls against float64, seed {seed}")
    for heading in ("backend", "dtype", "calls", "worst error / its bound", "of"):
        table.add_column(heading)
    for (backend, dtype), tally in tallies.items():
        table.add_row(backend, dtype, str(tally.trials), f"{tally.worst:.3f}", tally.result)
    console = Console()
    console.print(table)
    console.print(
        "Judged: out, lse, dq, dk, dv and the selection. Tried: lengths 1 to 2,000, head dims 1 to 96, 1 level and "
        "more, block sizes 2 to 64, K 1 to 16, grouped heads, both layouts, ties, scales 2**-8 to 2**4."
    )
    if "numpy" in backends:
        console.print("float64 on numpy is the reference itself, and is not compared with itself.")
    (backend, _), worst = max(tallies.items(), key=lambda item: item[1].worst)
    console.print("The worst of all again:", style="bold")
    # Printed plainly, so that a copied line is the line.
    print(f'python -c "from llsa_np.cli.check import Trial; print({worst.trial!r}.run({backend!r}))"')
    failed = worst.worst > 1
    console.print("[red]FAILED: an error is over its bound" if failed else "[green]Every error is within its bound")
    return int(failed)
