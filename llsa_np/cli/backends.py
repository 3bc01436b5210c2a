"""`llsa backends`: which backends can run here, and what the others need. Needs nothing but the package itself: a bare
install is where the question comes up."""

from __future__ import annotations

import argparse

import llsa_np as llsa


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None: it looks at this machine."""


def run(args: argparse.Namespace) -> int:
    """Print `llsa_np.backends()`. Lines are not wrapped, so that a copied command is the command."""
    for name, reasons in llsa.backends().items():
        print(f"{name}: {'cannot run here' if reasons else 'runs here'}")
        for reason in reasons:
            print(f"  - {reason}")
    return 0
