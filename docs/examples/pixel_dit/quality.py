"""Trains one model with full attention, with LLSA and without each of its parts, and compares what they have learnt.

    python docs/examples/pixel_dit/quality.py --preset small --images emoji --steps 2000 --seeds 3 --out runs/quality

writes quality.json, a row a run, and beside it each run's samples. Options that are not its own are `train.py`'s. Runs
that quality.json has already, with the same options, are not run again.
"""

import argparse
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import train

KINDS: dict[str, list[str]] = {
    "full attention": ["--attention", "full"],
    "LLSA": [],
    "LLSA without enrichment": ["--no-enrich"],
    "LLSA without reweighting": ["--no-reweight"],
    "LLSA without reordering": ["--no-reorder"],
}


WITHOUT_EFFECT = ("device", "every", "out", "samples", "workers")


def main(arguments: list[str] | None = None) -> None:
    """Train what is missing, a seed of every kind after the other, and write after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="(default: all)")
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    args, of_training = parser.parse_known_args(arguments)
    if any(option.partition("=")[0] == "--seed" for option in of_training):
        parser.error("--seed is each run's own: 0, 1, ... Give --seeds, how many")
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "quality.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    for seed in range(args.seeds):
        for kind in args.kinds:
            own = [*of_training, *KINDS[kind], "--seed", str(seed)]
            out = args.out / re.sub("[^a-z0-9]+", "-", f"{len(rows):03}-{kind.lower()}-{seed}")
            settings = {"kind": kind} | settings_of(own, out)
            if any(settings.items() <= row.items() for row in rows):
                continue
            rows.append(settings | trained(own, out))
            part = file.with_suffix(".part")
            part.write_text(json.dumps(rows, indent=1) + "\n")
            part.replace(file)
            print(json.dumps(rows[-1]), flush=True)
            shutil.rmtree(out)


def settings_of(arguments: list[str], out: Path) -> dict[str, Any]:
    """What a run is told apart by: all options that its numbers depend on."""
    options = vars(train.parsed([*arguments, "--out", str(out)]))
    return {name: str(x) if isinstance(x, Path) else x for name, x in options.items() if name not in WITHOUT_EFFECT}


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
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"samples": out.with_suffix(".png").name, "device": device, "minutes": round(minutes, 2)} | last


if __name__ == "__main__":
    main()
