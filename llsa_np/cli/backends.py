"""`llsa backends`: which backends can run here, and what the others need."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table
from rich.text import Text

import llsa_np as llsa


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None: it looks at this machine."""


def run(args: argparse.Namespace) -> int:
    """Print the table of `llsa_np.backends()`."""
    table = Table(title="Backends on this machine", show_lines=True)
    for column in ("backend", "runs here", "what is missing"):
        table.add_column(column, overflow="fold")
    for name, reasons in llsa.backends().items():
        table.add_row(name, "no" if reasons else "yes", Text("\n".join(f"- {reason}" for reason in reasons)))
    Console().print(table)
    return 0
