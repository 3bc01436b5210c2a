"""Measures steps of `train.py` on pictures too large for one GPU: on one, or under torchrun over all of a machine.

    python docs/examples/pixel_dit/several_gpus.py --preset paper --side 512 --batch 1 --out docs/measurements
    torchrun --nproc-per-node 2 docs/examples/pixel_dit/several_gpus.py (the same)

Each adds its row to pixel-dit-several-<card>.json. Options that are not its own are `train.py`'s.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from options import OTHERS, parsed, positive, settings_of
from ranks import ranks_of
from records import Record
from training import Training

WARM_UP = 3
"""Steps that compile, and that fill what is reused."""


def main(arguments: list[str] | None = None) -> None:
    """Train some steps, every picture's pixels over all processes, and write how long they took and their losses."""
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False, epilog=OTHERS)
    parser.add_argument("--steps", type=positive, default=20, help="to train (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    own, of_training = parser.parse_known_args(arguments)
    if any(option.partition("=")[0] == "--sequence-ranks" for option in of_training):
        parser.error("--sequence-ranks is the number of processes, which torchrun is told")
    shared = ["--sequence-ranks", os.environ.get("WORLD_SIZE", "1"), "--steps", str(WARM_UP + own.steps)]
    with tempfile.TemporaryDirectory() as folder:
        args = parsed([*of_training, *shared, "--samples", "0", "--out", folder])
        with ranks_of(args) as ranks:
            found = measured(Training(args, ranks))
        if ranks.rank == 0:
            Record(own.out, "several", ranks.device).add(settings_of(args), found)


def measured(training: Training) -> dict[str, Any]:
    """The median step in milliseconds, the most memory of a GPU in MiB, and all losses; None if memory ended."""
    device = training.ranks.device
    several = dist.is_initialized() and dist.get_world_size() > 1
    times: list[float] = []
    try:
        while training.step < training.args.steps:
            start = time.perf_counter()
            training.train_step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    except (MemoryError, torch.OutOfMemoryError):
        if several:
            raise  # for the others wait for this one
        return {"step_ms": None, "mib": None, "losses": None}
    most = torch.tensor(torch.cuda.max_memory_allocated(), device=device)
    if several:
        dist.all_reduce(most, dist.ReduceOp.MAX)
    return {
        "step_ms": round(1e3 * statistics.median(times[WARM_UP:]), 1),
        "mib": round(most.item() / 2**20) if device.type == "cuda" else None,
        "losses": [loss for _, loss in training.losses()],
    }


if __name__ == "__main__":
    main()
