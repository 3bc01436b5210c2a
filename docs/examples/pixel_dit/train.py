"""Trains a pixel diffusion transformer, on the CPU, on one GPU, or under torchrun on several, and samples from it.

    python docs/examples/pixel_dit/train.py --preset tiny --attention llsa --out runs/tiny

A run that was stopped goes on from its last checkpoint by the same command.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from training import Training, ranks_of


class Preset(NamedTuple):
    """Sizes of a model and of its training."""

    hidden: int
    heads: int
    layers: int
    side: int
    batch: int
    steps: int
    rate: float
    ema: float


PRESETS = {
    "tiny": Preset(hidden=64, heads=2, layers=2, side=16, batch=8, steps=300, rate=1e-3, ema=0.98),
    "small": Preset(hidden=192, heads=3, layers=6, side=64, batch=32, steps=20_000, rate=3e-4, ema=0.999),
    "paper": Preset(hidden=384, heads=6, layers=12, side=128, batch=16, steps=200_000, rate=1e-4, ema=0.9999),
}


TOGETHER = 10
"""Steps whose losses are read at once."""
OTHERS = "Other options are train.py's."
"""What the help of commands says that take them."""
MOST_EVERY = 1000
"""Steps lie between checkpoints, and at most a fifth of a run."""


def positive(value: str) -> int:
    """A number of things of which there is at least one."""
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"is {value}, and is to be 1 or more")
    return number


def natural(value: str) -> int:
    """One that may be 0, or a seed."""
    number = int(value)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"is {value}, and is to be 0 or more, and less than 2**63")
    return number


def rate(value: str) -> float:
    """Of learning."""
    number = float(value)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"is {value}, and is to be more than 0 and finite")
    return number


def decay(value: str) -> float:
    """The share of a moving average that is kept."""
    number = float(value)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"is {value}, and is to be 0 or more and less than 1")
    return number


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, the preset's values in the place of those that are not given."""
    presets = "; ".join(f"{x}: {', '.join(f'{k} {v}' for k, v in of._asdict().items())}" for x, of in PRESETS.items())
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False, epilog=f"Presets: {presets}.")
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="sizes (default: %(default)s)")
    parser.add_argument("--attention", choices=("llsa", "full"), default="llsa", help="(default: %(default)s)")
    parser.add_argument("--levels", type=positive, help="coarse levels L (default: by the number of pixels)")
    parser.add_argument("--topk", type=positive, default=8, help="tokens kept of each level (default: %(default)s)")
    parser.add_argument("--block-size", type=positive, default=16, help="tokens of a block (default: %(default)s)")
    for name in ("enrich", "reweight", "reorder"):
        switch = argparse.BooleanOptionalAction
        parser.add_argument(f"--{name}", action=switch, default=True, help="an ablation of the paper")
    parser.add_argument("--images", type=Path, help="a folder of pictures (default: scikit-image's photographs)")
    parser.add_argument("--side", type=positive, help="pixels a side")
    parser.add_argument("--batch", type=positive, help="pictures a step, of all processes together")
    parser.add_argument("--steps", type=positive, help="how many to train")
    parser.add_argument("--rate", type=rate, help="learning rate of AdamW")
    parser.add_argument("--ema", type=decay, help="decay of the weights' moving average, which samples")
    parser.add_argument("--seed", type=natural, default=0, help="of everything random (default: %(default)s)")
    parser.add_argument("--start", type=Path, help="another run's folder, to grow from its weights")
    parser.add_argument("--every", type=positive, help="steps between checkpoints (default: a fifth, and at most 1000)")
    parser.add_argument("--samples", type=natural, default=16, help="pictures made at each (default: %(default)s)")
    parser.add_argument("--sequence-ranks", type=positive, default=1, help="processes that share one picture's tokens")
    parser.add_argument("--workers", type=natural, default=8, help="processes that draw for a GPU (default: 8)")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda where there is one)")
    parser.add_argument("--out", type=Path, required=True, help="a folder for checkpoints, metrics and samples")
    args = parser.parse_args(arguments)
    for name, value in PRESETS[args.preset]._asdict().items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if args.every is None:
        args.every = max(1, min(MOST_EVERY, args.steps // 5))
    if args.attention == "full" and args.sequence_ranks > 1:
        parser.error("--attention full does not share a picture's pixels: use --attention llsa or --sequence-ranks 1")
    return args


class Log:
    """Metrics, a line of JSON a step, and TensorBoard's; of a run that goes on, those past its checkpoint go."""

    def __init__(self, out: Path, step: int) -> None:
        self.path = out / "metrics.jsonl"
        before = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        kept = [line for line in before if line.endswith("\n") and json.loads(line)["step"] <= step]
        part = self.path.with_suffix(".part")
        part.write_text("".join(kept))
        part.replace(self.path)
        self.board = SummaryWriter(str(out), purge_step=step + 1)

    def add(self, step: int, **values: float) -> None:
        """One step's."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)


def main(arguments: list[str] | None = None) -> None:
    """Train, and write checkpoints, metrics and samples."""
    args = parsed(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    with ranks_of(args) as ranks:
        training = Training(args, ranks)
        log = Log(args.out, training.step) if ranks.rank == 0 else None
        bar = tqdm(total=args.steps, initial=training.step, disable=None if ranks.rank == 0 else True)
        while training.step < args.steps:
            training.train_step()
            bar.update()
            is_kept = training.step == args.steps or training.step % args.every == 0
            if not is_kept and training.step % TOGETHER:
                continue
            for step, loss in training.losses():
                values = {"loss": loss}
                if is_kept and step == training.step:
                    values |= training.evaluate()
                    training.sample()
                if log is not None:
                    log.add(step, **values)
            if is_kept:
                training.save()  # last: what was logged of steps after a checkpoint is logged again
            bar.set_postfix(loss=f"{training.recent_loss:.3f}")
        bar.close()
        if log is not None:
            print(f"{args.out}: {training.step:,} steps, loss {training.recent_loss:.3f} of late", file=sys.stderr)


if __name__ == "__main__":
    main()
