"""The command `llsa`: its subcommands by name, and how it speaks of a mistake."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "explain": "attend over the pixels of a photograph, or your own activations, and show what happens",
    "check": "compare the backends that can run here with the definition",
    "bench": "time this machine's backends against dense attention",
    "backends": "which backends can run here, and what the others need",
}
"""Each is a module of this package with `add_arguments(parser)` and `run(args) -> int`, imported when it is chosen."""

MISTAKE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run `llsa` with these arguments, the process's own by default, and return its exit status.

    0: done. 2: something the user can put right, said in one sentence on stderr. Other statuses are the subcommand's.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="llsa", description="Log-linear Sparse Attention, for any array framework.")
    parser.add_argument("--version", action="version", version=_version())
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    subparser = {
        name: subparsers.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        for name, text in COMMANDS.items()
    }
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    try:
        if chosen not in COMMANDS:
            parser.parse_args(arguments)  # prints help or the version, or says what is wrong, and leaves
            return MISTAKE
        command = importlib.import_module(f"llsa_np.cli.{chosen}")
        command.add_arguments(subparser[chosen])
        status: int = command.run(parser.parse_args(arguments))
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.startswith("llsa_np"):
            raise
        return _mistake(f"llsa: {chosen} needs the package {missing.name}: pip install 'llsa-np[explain]'")
    except OSError as mistake:
        told = f"{mistake.filename}: {mistake.strerror}" if mistake.filename and mistake.strerror else str(mistake)
        return _mistake(f"llsa: {told}")
    except (ValueError, TypeError, RuntimeError) as mistake:  # NotImplementedError is a RuntimeError
        return _mistake(f"llsa: {mistake}")
    return status


def _mistake(sentence: str) -> int:
    print(" ".join(sentence.split()), file=sys.stderr)
    return MISTAKE


def _version() -> str:
    from llsa_np import __version__

    return f"llsa-np {__version__}"
