"""The page that `llsa explain` prints: the levels, the times, how faithful the selection is, and the sweep."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import llsa_np as llsa
from llsa_np.cli.dense import DenseTime, caution
from llsa_np.cli.faithfulness import Choice, Faithfulness
from llsa_np.cli.tokens import Tokens
from llsa_np.cli.words import count, digits
from llsa_np.options import AttendOptions

DENSE_NAMES = {"torch": "PyTorch on the CPU", "numpy": "NumPy"}
STEPS = {
    "pool": "means of every level of k",
    "select": "hierarchical Top-K, pooling of q and k included",
    "attend": "softmax over what was selected, pooling included",
    "backward": "gradients of q, k and v",
    "forward": "select and attend in one call, which pools k once",
}


@dataclass(frozen=True)
class Findings:
    """All that there is to print."""

    tokens: Tokens
    selection: llsa.Selection
    options: AttendOptions
    backend: str
    seconds: dict[str, float]
    """Of every step in STEPS."""
    dense: DenseTime
    queries: int
    """How many of each head were compared with dense attention, in both tables the same."""
    queries_wanted: int
    result: Faithfulness
    choices: list[Choice]
    paths: list[Path]

    @property
    def every_query(self) -> bool:
        """Whether nothing had to be sampled."""
        return self.queries == self.selection.query_tokens


def show(found: Findings) -> None:
    """Print the page."""
    console = Console(highlight=False)
    _show_tokens(console, found)
    _show_times(console, found)
    _show_faithfulness(console, found)
    if found.choices:
        _show_sweep(console, found)
    console.print("\n[bold]Pictures[/bold]: " + ", ".join(escape(str(path)) for path in found.paths), soft_wrap=True)
    if found.tokens.q.shape[0] > 1:
        console.print("The tables give means over the batch; the pictures show its first entry.")
    if found.tokens.grid is None:
        console.print("With --grid H W, where queries look is drawn too.")


def _show_tokens(console: Console, found: Findings) -> None:
    tokens, options = found.tokens, found.options
    batch, heads, query_tokens, dim = tokens.q.shape
    keys = found.selection.key_hierarchy
    lie = "" if tokens.grid is None else f" ({tokens.grid[0]} x {tokens.grid[1]} in Z-order)"
    sizes = count(keys.tokens, "token")
    if query_tokens != keys.tokens:
        sizes = f"{count(query_tokens, 'query', 'queries')}, {count(keys.tokens, 'key')}"
    grouped = "" if tokens.k.shape[1] == heads else f" ({tokens.k.shape[1]} of keys and values)"
    console.print(f"\n[bold]{escape(tokens.source)}[/bold]", soft_wrap=True)
    if tokens.note:
        console.print(tokens.note)
    console.print(
        f"{sizes}{lie}, batch {batch}, {count(heads, 'head')}{grouped}, head dim {dim}, {tokens.q.dtype}, "
        f"backend {found.backend}",
        soft_wrap=True,
    )
    coarse = [level for level in options.levels if level > 0]
    weight = "as many tokens as it stands for" if options.reweight else "one token (--no-reweight)"
    weighs = f" A coarse token weighs {weight}." if coarse else ""
    console.print(f"Logits are scaled by {options.scale:.4g}.{weighs}")
    table = _table(console, f"Levels: blocks of b = {keys.block_size}, L = {count(keys.levels, 'coarse level')}")
    for column in ("level", "tokens", "each stands for", "attended, at most", "kept (K)"):
        table.add_column(column, justify="right")
    for level in range(keys.levels, -1, -1):
        above = keys.lengths[level]
        if level < keys.levels:
            above = min(above, found.selection.topk[level] * keys.block_size)
        table.add_row(
            str(level),
            f"{keys.lengths[level]:,}",
            f"{min(keys.block_size**level, keys.tokens):,}",
            f"{above:,}" if level in options.levels else f"none of {above:,}",
            "" if level == 0 else f"{min(found.selection.topk[level - 1], keys.lengths[level]):,}",
        )
    console.print(table)
    if len(coarse) < keys.levels:
        console.print("A level of which none are attended only serves to select (--enrich).")
    console.print(
        f"A query attends to [bold]{count(round(found.result.attended), 'token')}[/bold] of all levels, "
        f"not to {keys.tokens:,}: {found.result.attended / keys.tokens:.1%}."
    )


def _show_times(console: Console, found: Findings) -> None:
    table = _table(console, "Time")
    table.add_column("step")
    table.add_column("seconds", justify="right")
    table.add_column("which is")
    for name, what in STEPS.items():
        table.add_row(name, digits(found.seconds[name]), what, style="bold" if name == "forward" else None)
    dense, of = found.dense, found.tokens.q.shape[2]
    timed = "" if dense.queries == of else f": {dense.queries:,} of {count(of, 'query', 'queries')}, scaled up"
    table.add_row("dense forward", digits(dense.seconds), f"{DENSE_NAMES[dense.by]}, float32{timed}")
    console.print(table)
    if warning := caution(dense.queries, of):
        console.print(warning)
    ratio = dense.seconds / found.seconds["forward"]
    console.print(f"Dense attention takes {digits(ratio)} times as long as LLSA, forward.")


def _show_faithfulness(console: Console, found: Findings) -> None:
    selection, result = found.selection, found.result
    coarse = sorted(level for level in found.options.levels if level > 0)
    unseen = selection.levels not in coarse
    table = _table(
        console,
        "How faithful the selection is, on "
        + ("every query" if found.every_query else f"{found.queries} sampled queries")
        + " of each head",
    )
    table.add_column("head")
    table.add_column("seen\nin full", justify="right")
    for level in coarse:
        table.add_column(f"level-{level}\nblocks", justify="right")
    if unseen:
        table.add_column("not\nseen", justify="right")
    for column in ("output\nerror", "busiest\nblock", "never\nselected"):
        table.add_column(column, justify="right")
    for head, name in enumerate(found.tokens.heads):
        mass = result.mass[head]
        shares = [mass[0], *(mass[level] for level in coarse), *([1 - mass.sum()] if unseen else [])]
        table.add_row(
            name,
            *(f"{abs(share):.1%}" for share in shares),
            _error(result.error[head], result.uncertainty[head], found),
            f"{result.busiest[head]:.1%}",
            f"{result.never[head]:.1%}",
        )
    console.print(table)
    if found.queries < min(found.queries_wanted, found.tokens.q.shape[2]):
        console.print(f"More queries, {found.queries_wanted:,} as asked for, would take minutes at this size.")
    rest = "falls on what is seen as blocks" + (" or not at all" if unseen else "") if coarse else "is not seen"
    chance = min(1.0, selection.topk[0] * selection.block_size / selection.key_tokens)
    fair = min(1.0, selection.topk[0] / selection.key_hierarchy.lengths[1])
    console.print(
        "Seen in full: the share of dense attention's probability that falls on tokens attended at full resolution "
        f"({chance:.2%} by chance); the rest {rest}. "
        "Output error: |LLSA - dense| / |dense|, in float64"
        + (". " if found.every_query else f", ± its standard error, from {len(result.error_of_parts)} samples. ")
        + f"Busiest block: the share of query blocks that selected it ({fair:.2%} if all were selected equally). "
        "Never selected: the share of key blocks."
    )


def _show_sweep(console: Console, found: Findings) -> None:
    table = _table(console, "Which K and L? Means over heads, worst head in brackets")
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
    for choice in found.choices:
        numbers = [str(choice.levels), str(choice.topk)]
        result = choice.result
        if result is not None:
            error = _error(result.error.mean(), result.uncertainty_of_mean, found)
            numbers += [
                f"{result.attended:,.0f}",
                f"{result.mass[:, 0].mean():.1%} ({result.mass[:, 0].min():.1%})",
                f"{error} ({result.error.max():.3f})",
                f"{result.busiest.mean():.1%}",
                f"{result.never.mean():.1%}",
            ]
        else:
            numbers += ["-"] * 5
        table.add_row(*numbers, style="bold" if found.selection.topk == (choice.topk,) * choice.levels else None)
    console.print(table)
    for why in dict.fromkeys(choice.skipped for choice in found.choices if choice.skipped):
        rows = ", ".join(f"L = {c.levels} K = {c.topk}" for c in found.choices if c.skipped == why)
        console.print(f"{rows}: {why}.")
    if len(found.options.levels) <= found.selection.levels:
        console.print("Every row attends to those levels of --enrich that it has.")
    console.print(
        "Every row is measured on the queries of the table above. LLSA is a layer to train with. A model that was "
        "trained with dense attention loses what is not seen in full: raise K, or lower L, until the output error is "
        "one that it can bear."
    )


def _error(error: float, uncertainty: float, found: Findings) -> str:
    return f"{error:.3f}" if found.every_query else f"{error:.3f} ± {uncertainty:.3f}"


def _table(console: Console, title: str) -> Table:
    """A table to fill and print. Its title is printed here: as the table's own it would wrap at the table's width."""
    console.print(f"\n[bold]{title}[/bold]")
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
