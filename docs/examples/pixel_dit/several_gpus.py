"""Measures steps of `train.py` on pictures too large for one GPU: on one, or under torchrun over all of a machine.

    python docs/examples/pixel_dit/several_gpus.py --preset paper --side 512 --batch 1 --out docs/measurements
    torchrun --nproc-per-node 2 docs/examples/pixel_dit/several_gpus.py (the same)

Each adds its row to pixel-dit-several-<card>.json. Options that are not its own are `train.py`'s.
"""

import argparse
import json
import os
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import train
from training import Training, ranks_of

WARM_UP = 3
"""Steps that compile, and that fill what is reused."""


def main(arguments: list[str] | None = None) -> None:
    """Train some steps, every picture's pixels over all processes, and write how long they took and their losses."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--steps", type=train.positive, default=20, help="to train (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    own, of_training = parser.parse_known_args(arguments)
    own.out.mkdir(parents=True, exist_ok=True)
    gpus = int(os.environ.get("WORLD_SIZE", "1"))
    with tempfile.TemporaryDirectory() as folder:
        shared = ["--sequence-ranks", str(gpus), "--samples", "0", "--out", folder]
        args = train.parsed([*of_training, *shared])
        with ranks_of(args) as ranks:
            row: dict[str, Any] = {
                "preset": args.preset,
                "side": args.side,
                "batch": args.batch,
                "compiled": args.compile,
            }
            row |= {"gpus": gpus} | measured(Training(args, ranks), own.steps)
            if ranks.rank == 0:
                add(own.out, row)


def measured(training: Training, steps: int) -> dict[str, Any]:
    """The median step in milliseconds, the most memory of a GPU in MiB, and all losses; None if memory ended."""
    device = training.ranks.device
    times: list[float] = []
    try:
        for _ in range(WARM_UP + steps):
            start = time.perf_counter()
            training.train_step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    except (MemoryError, torch.OutOfMemoryError):
        if dist.is_initialized():
            raise  # for the others wait for this one
        return {"step_ms": None, "mib": None, "losses": None}
    most = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    everywhere = [most]
    if dist.is_initialized():
        everywhere *= dist.get_world_size()
        dist.all_gather_object(everywhere, most)
    return {
        "step_ms": round(1e3 * statistics.median(times[WARM_UP:]), 1),
        "mib": round(max(everywhere) / 2**20),
        "losses": [loss for _, loss in training.losses()],
    }


def add(folder: Path, row: dict[str, Any]) -> None:
    """Into the card's file, in the place of an earlier row of the same."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    path = folder / f"pixel-dit-several-{re.sub('[^a-z0-9]+', '-', card.lower())}.json"
    rows = json.loads(path.read_text())["steps"] if path.exists() else []
    what = ("preset", "side", "batch", "compiled", "gpus")
    rows = [old for old in rows if any(old[name] != row[name] for name in what)] + [row]
    path.write_text(json.dumps({"card": card, "torch": torch.__version__, "steps": rows}, indent=1) + "\n")
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
