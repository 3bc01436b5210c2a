"""`llsa explain`: attention over a photograph's pixels or a user's own activations: what it does, costs and keeps."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

import llsa_np as llsa
from llsa_np.backends import NAMES
from llsa_np.cli.dense import DenseTime, time_dense
from llsa_np.cli.faithfulness import Choice, Faithfulness, measure, products, sweep
from llsa_np.cli.pictures import draw
from llsa_np.cli.tokens import WHO, Tokens, file_tokens, photograph_tokens

Result = TypeVar("Result")

SWEEP = (4, 8, 16, 32)
DENSE_SCORES = 2**28
"""At most this many scores, over all heads, are computed to time dense attention, 32 queries at least."""
DENSE_NAMES = {"torch": "PyTorch on the CPU", "numpy": "NumPy"}
SAMPLED_SCORES = 2**25
"""At most this many scores, over all heads, are compared with dense attention, 16 queries at least."""
SUIT, HAIR, HELMET = (0.59, 0.27), (0.13, 0.48), (0.85, 0.86)
"""Where the queries that are drawn stand in the photograph."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `llsa explain`."""
    parser.add_argument(
        "image", nargs="?", metavar="IMAGE", help="a picture; default: one that ships with scikit-image"
    )
    parser.add_argument("--size", type=int, default=256, help="pixels on each side: size * size tokens (%(default)s)")
    parser.add_argument("--heads", type=int, default=4, help="attention heads over the picture (%(default)s)")
    parser.add_argument("--dim", type=int, default=64, help="head dim over the picture (%(default)s)")
    parser.add_argument("--qkv", metavar="FILE", help="your activations: a .npz or .safetensors file with q, k and v")
    parser.add_argument(
        "--layout", choices=("bhnd", "bnhd"), default="bhnd", help="order of the file's axes (%(default)s)"
    )
    parser.add_argument(
        "--grid", nargs=2, type=int, metavar=("H", "W"), help="the file's keys are the cells of a picture of this size"
    )
    parser.add_argument(
        "--tokens-in",
        choices=("rows", "zorder"),
        default="rows",
        help="order of the file's tokens on the grid; rows are brought into Z-order first (%(default)s)",
    )
    parser.add_argument(
        "--topk", type=int, nargs="+", default=[8], metavar="K", help="tokens kept: one, or one for each level 1.. (8)"
    )
    parser.add_argument("--levels", type=int, metavar="L", help="coarse levels; default: by the number of tokens")
    parser.add_argument("--block-size", type=int, default=16, metavar="B", help="tokens of a block (%(default)s)")
    parser.add_argument("--backend", choices=("auto", *NAMES), default="auto", help="who computes (%(default)s)")
    parser.add_argument("--queries", type=int, default=64, help="queries to compare with dense attention (%(default)s)")
    parser.add_argument(
        "--sweep", type=int, nargs="*", default=list(SWEEP), metavar="K", help="the K to try with every L (4 8 16 32)"
    )
    parser.add_argument(
        "--at",
        type=int,
        nargs=2,
        action="append",
        metavar=("ROW", "COL"),
        help="draw this pixel's attention; repeatable",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the projections and of the output's gradient (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("explain"), metavar="DIR", help="for pictures (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Make or read the tokens, attend forward and backward, compare with dense attention, draw the pictures, print."""
    tokens = _tokens(args)
    queries = _sampled(tokens, args.queries)
    at = _cells(tokens, args)
    args.out.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    topks = sorted({*args.sweep, *args.topk[: len(args.topk) == 1]}) if args.sweep else []
    most_levels = max(args.levels or 1, llsa.default_levels(tokens.k.shape[2], args.block_size))

    # No bar where nobody watches (disable=None), and none left behind: the page is what stays.
    with tqdm(desc="start", total=8 + most_levels * len(topks), disable=None, leave=False) as bar:

        def begin(name: str) -> None:
            bar.update()  # what came before is done
            bar.set_description(name)

        def timed(name: str, work: Callable[[], Result]) -> Result:
            begin(name)
            began = time.perf_counter()
            result = work()
            seconds[name] = time.perf_counter() - began
            return result

        selection, seconds_per_product = _forward_and_backward(tokens, args, timed, seconds)
        begin("dense attention")
        scores_of_a_query = tokens.q.shape[0] * tokens.q.shape[1] * tokens.k.shape[2]
        some = max(32, min(1024, DENSE_SCORES // max(1, scores_of_a_query)))
        dense = time_dense(tokens.q, tokens.k, tokens.v, some, repeats=1)
        begin("faithfulness")
        result = measure(tokens.q, tokens.k, tokens.v, selection, queries)
        choices = sweep(
            tokens.q,
            tokens.k,
            tokens.v,
            block_size=args.block_size,
            topks=topks,
            most_levels=most_levels,
            queries=max(1, queries // 2),
            backend=args.backend,
            seconds_per_product=seconds_per_product,
            step=begin,
        )
        begin("pictures")
        paths = draw(tokens, selection, at, args.out)

    console = Console(highlight=False)
    _print_tokens(console, tokens, selection, result, args)
    _print_times(console, tokens, seconds, dense)
    _print_faithfulness(console, tokens, selection, result, queries)
    if choices:
        _print_sweep(console, choices, selection, max(1, queries // 2))
    console.print("\n[bold]Pictures[/bold]: " + ", ".join(escape(str(path)) for path in paths), soft_wrap=True)
    if tokens.grid is None:
        console.print("With --grid H W, where queries look is drawn too.")
    return 0


def _tokens(args: argparse.Namespace) -> Tokens:
    """The tokens that the options ask for."""
    for name, least in (("size", 8), ("heads", 1), ("dim", 8), ("queries", 1), ("seed", 0)):
        value = getattr(args, name)
        if value < least:
            raise ValueError(f"{WHO}: --{name} is {value}; allowed is {least} or more")
    if args.dim % 2:
        raise ValueError(f"{WHO}: --dim is {args.dim}; allowed is an even number of 8 or more")
    if args.qkv is None:
        if args.grid is not None:
            raise ValueError(f"{WHO}: --grid says how --qkv's keys lie in a picture; for an image, give --size instead")
        return photograph_tokens(args.image, args.size, args.heads, args.dim, args.seed)
    if args.grid is not None and min(args.grid) < 1:
        raise ValueError(f"{WHO}: --grid is {args.grid[0]} {args.grid[1]}; allowed are two numbers of 1 or more")
    return file_tokens(
        args.qkv,
        layout=args.layout,
        grid=None if args.grid is None else (args.grid[0], args.grid[1]),
        tokens_in=args.tokens_in,
        picture=args.image,
    )


def _sampled(tokens: Tokens, wanted: int) -> int:
    """How many queries to compare with dense attention: as many as wanted, fewer where that takes minutes."""
    batch, heads, query_tokens, _ = tokens.q.shape
    affordable = SAMPLED_SCORES // (batch * heads * tokens.k.shape[2])
    return int(min(wanted, query_tokens, max(16, affordable)))


def _cells(tokens: Tokens, args: argparse.Namespace) -> list[tuple[int, int]]:
    """Which cells' queries to draw."""
    if tokens.grid is None:
        return []
    height, width = tokens.grid
    for row, column in args.at or []:
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(f"{WHO}: --at is {row} {column}; allowed are 0..{height - 1} and 0..{width - 1}")
    if args.at:
        return [(row, column) for row, column in args.at]
    places = (SUIT, HAIR, HELMET) if args.image is None and args.qkv is None else ((0.35, 0.35), (0.5, 0.6), (0.7, 0.4))
    return [(int(row * height), int(column * width)) for row, column in places]


def _forward_and_backward(
    tokens: Tokens, args: argparse.Namespace, timed: Callable[[str, Callable[[], Any]], Any], seconds: dict[str, float]
) -> tuple[llsa.Selection, float]:
    """Every step, timed; the selection, and what one scalar product of it took."""
    q, k, v = tokens.q, tokens.k, tokens.v
    topk = args.topk[0] if len(args.topk) == 1 else args.topk
    # Selecting first: it checks the options, and what it takes to start a backend is not the time of a step.
    selection: llsa.Selection = llsa.select(
        q, k, block_size=args.block_size, levels=args.levels, topk=topk, backend=args.backend
    )
    b, levels, backend = selection.block_size, selection.levels, args.backend
    timed("pool", lambda: llsa.pool(k, block_size=b, levels=levels, backend=backend))
    timed("select", lambda: llsa.select(q, k, block_size=b, levels=levels, topk=topk, backend=backend))
    out, lse = timed("attend", lambda: llsa.attend(q, k, v, selection, backend=backend))
    dout = np.random.default_rng(args.seed).standard_normal(out.shape).astype(out.dtype)
    timed("backward", lambda: llsa.attend_backward(dout, q, k, v, out, lse, selection, backend=backend))
    scores = products(selection.query_hierarchy, selection.key_hierarchy, selection.topk)
    return selection, seconds["select"] / (q.shape[0] * q.shape[1] * scores)


def _print_tokens(
    console: Console, tokens: Tokens, selection: llsa.Selection, result: Faithfulness, args: argparse.Namespace
) -> None:
    batch, heads, query_tokens, dim = tokens.q.shape
    keys = selection.key_hierarchy
    lie = "" if tokens.grid is None else f" ({tokens.grid[0]} x {tokens.grid[1]} in Z-order)"
    sizes = (
        f"{keys.tokens:,} tokens{lie}"
        if query_tokens == keys.tokens
        else f"{query_tokens:,} queries, {keys.tokens:,} keys{lie}"
    )
    grouped = "" if tokens.k.shape[1] == heads else f" ({tokens.k.shape[1]} of keys and values)"
    backend = "numpy" if args.backend == "auto" else args.backend  # auto: host arrays go to numpy
    console.print(f"\n[bold]{escape(tokens.source)}[/bold]", soft_wrap=True)
    if tokens.note:
        console.print(tokens.note)
    console.print(
        f"{sizes}, batch {batch}, {heads} heads{grouped}, head dim {dim}, {tokens.q.dtype}, backend {backend}",
        soft_wrap=True,
    )
    table = _table(f"Levels: blocks of b = {keys.block_size}, L = {keys.levels} coarse levels")
    for column in ("level", "tokens", "each stands for", "attended, at most", "kept (K)"):
        table.add_column(column, justify="right")
    for level in range(keys.levels, -1, -1):
        above = keys.lengths[level] if level == keys.levels else selection.topk[level] * keys.block_size
        table.add_row(
            str(level),
            f"{keys.lengths[level]:,}",
            f"{min(keys.block_size**level, keys.tokens):,}",
            f"{min(above, keys.lengths[level]):,}",
            "" if level == 0 else f"{min(selection.topk[level - 1], keys.lengths[level]):,}",
        )
    console.print(table)
    console.print(
        f"A query attends to [bold]{result.attended:,.0f}[/bold] tokens of all levels, not to {keys.tokens:,}: "
        f"{result.attended / keys.tokens:.1%}."
    )


def _print_times(console: Console, tokens: Tokens, seconds: dict[str, float], dense: DenseTime) -> None:
    table = _table("Time")
    table.add_column("step")
    table.add_column("seconds", justify="right")
    table.add_column("which is")
    meaning = {
        "pool": "means of every level of k",
        "select": "hierarchical Top-K, pooling of q and k included",
        "attend": "softmax over what was selected, pooling included",
        "backward": "gradients of q, k and v",
    }
    for name, what in meaning.items():
        table.add_row(name, _number(seconds[name]), what)
    forward = seconds["select"] + seconds["attend"]
    table.add_row("[bold]forward[/bold]", f"[bold]{_number(forward)}[/bold]", "select and attend")
    table.add_row(
        "dense forward",
        _number(dense.seconds),
        f"{DENSE_NAMES[dense.by]}, float32: {dense.queries:,} of {tokens.q.shape[2]:,} queries, scaled up",
    )
    console.print(table)
    console.print(f"Dense attention takes {_number(dense.seconds / forward)} times as long as LLSA, forward.")


def _print_faithfulness(
    console: Console, tokens: Tokens, selection: llsa.Selection, result: Faithfulness, queries: int
) -> None:
    levels = selection.levels
    table = _table(f"How faithful the selection is, on {queries} sampled queries of each head")
    table.add_column("head")
    table.add_column("seen\nin full", justify="right")
    for level in range(1, levels + 1):
        table.add_column(f"level-{level}\nblocks", justify="right")
    for column in ("output\nerror", "busiest\nblock", "never\nselected"):
        table.add_column(column, justify="right")
    for head, name in enumerate(tokens.heads):
        table.add_row(
            name,
            *(f"{share:.1%}" for share in result.mass[head]),
            f"{result.error[head]:.3f}",
            f"{result.busiest[head]:.1%}",
            f"{result.never[head]:.1%}",
        )
    console.print(table)
    chance = min(1.0, selection.topk[0] * selection.block_size / selection.key_tokens)
    fair = min(1.0, selection.topk[0] / selection.key_hierarchy.lengths[1])
    console.print(
        "Seen in full: the share of dense attention's probability that falls on tokens attended at full resolution "
        f"({chance:.2%} by chance); the rest falls on what is seen as blocks. "
        "Output error: |LLSA - dense| / |dense|, in float64. "
        f"Busiest block: the share of query blocks that selected it ({fair:.2%} if all blocks were selected equally). "
        "Never selected: the share of key blocks."
    )


def _print_sweep(console: Console, choices: list[Choice], selection: llsa.Selection, queries: int) -> None:
    table = _table(f"Which K and L? Means over heads, worst head in brackets, {queries} sampled queries")
    for column in (
        "L",
        "K",
        "tokens\nper query",
        "seen\nin full",
        "output\nerror",
        "busiest\nblock",
        "never\nselected",
    ):
        table.add_column(column, justify="right")
    for choice in choices:
        this = choice.levels == selection.levels and set(selection.topk) == {choice.topk}
        numbers = [str(choice.levels), str(choice.topk)]
        result = choice.result
        if result is not None:
            numbers += [
                f"{result.attended:,.0f}",
                f"{result.mass[:, 0].mean():.1%} ({result.mass[:, 0].min():.1%})",
                f"{result.error.mean():.3f} ({result.error.max():.3f})",
                f"{result.busiest.mean():.1%}",
                f"{result.never.mean():.1%}",
            ]
        else:
            numbers += ["-"] * 5
        table.add_row(*numbers, style="bold" if this else None)
    console.print(table)
    for why in dict.fromkeys(choice.skipped for choice in choices if choice.skipped):
        rows = ", ".join(f"L = {c.levels} K = {c.topk}" for c in choices if c.skipped == why)
        console.print(f"{rows}: {why}.")
    console.print(
        "LLSA is a layer to train with. A model that was trained with dense attention loses what is not seen in full: "
        "raise K, or lower L, until the output error is one that it can bear."
    )


def _number(value: float) -> str:
    """Three digits that count, and no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.{max(0, 2 - int(np.floor(np.log10(value))))}f}"


def _table(title: str) -> Table:
    return Table(title=f"\n{title}", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
