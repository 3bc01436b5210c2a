"""Trains one model with full attention, with LLSA and without each of its parts, and compares what they have learnt.

    python docs/examples/pixel_dit/quality.py --preset small --images emoji --steps 2000 --seeds 3 --out runs/quality

writes pixel-dit-quality-<card>.json, a row a run, and beside it each run's samples. Options that are not its own are
`train.py`'s. Runs that the file has already, with the same options, are not run again.
"""

import argparse
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import train
from options import OTHERS, parsed, positive, settings_of
from ranks import device_of
from records import Record

KINDS: dict[str, list[str]] = {
    "full attention": ["--attention", "full"],
    "LLSA": [],
    "LLSA without enrichment": ["--no-enrich"],
    "LLSA without reweighting": ["--no-reweight"],
    "LLSA without reordering": ["--no-reorder"],
}
SWITCHES = [f"--{no}{name}" for name in ("enrich", "reweight", "reorder") for no in ("", "no-")]
OWN = ("--seed", "--attention", *SWITCHES)
"""Options that tell the runs apart."""


def main(arguments: list[str] | None = None) -> None:
    """Train what is missing, a seed of every kind after the other, and write after each."""
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False, epilog=OTHERS)
    parser.add_argument("--seeds", type=positive, default=3, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="(default: all)")
    parser.add_argument("--out", type=Path, required=True, help="a folder, of one such command at a time")
    args, of_training = parser.parse_known_args(arguments)
    for option in of_training:
        if option.partition("=")[0] in OWN:
            parser.error(f"{option} is each run's own; give --seeds, how many, and --kinds, which")
    if "RANK" in os.environ:
        parser.error("trains in one process; start it without torchrun")
    device = device_of(parsed([*of_training, "--out", str(args.out)]).device)
    record = Record(args.out, "quality", device)
    for seed in range(args.seeds):
        for kind in args.kinds:
            own = [*of_training, *KINDS[kind], "--seed", str(seed)]
            out = args.out / re.sub("[^a-z0-9]+", "-", f"{len(record.rows):03}-{kind.lower()}-{seed}")
            settings = {"kind": kind} | settings_of(parsed([*own, "--out", str(out)]))
            if not record.holds(settings):
                record.add(settings, trained(own, out))
                shutil.rmtree(out)


def trained(arguments: list[str], out: Path) -> dict[str, Any]:
    """One run: minutes, and the last row of its metrics. Its samples are kept beside `out`."""
    shutil.rmtree(out, ignore_errors=True)
    torch.compiler.reset()  # or after some runs nothing is compiled any more
    start = time.perf_counter()
    train.main([*arguments, "--out", str(out)])
    minutes = (time.perf_counter() - start) / 60
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    for samples in out.glob(f"samples-{last['step']:06}.png"):  # of --samples 0 there are none
        shutil.copy(samples, out.with_suffix(".png"))
    return {"samples": out.with_suffix(".png").name, "minutes": round(minutes, 2)} | last


if __name__ == "__main__":
    main()
