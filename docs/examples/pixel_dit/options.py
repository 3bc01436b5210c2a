"""The options of `train.py`, some of which other commands take too, and what they are checked for."""

import argparse
from pathlib import Path
from typing import Any, NamedTuple


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

OTHERS = "Other options are train.py's."
"""What the help of commands says that take them."""
MOST_EVERY = 1000
"""So many steps lie between checkpoints, or a fifth of a run if that is less."""
WITHOUT_EFFECT = ("device", "every", "out", "samples", "workers")
"""Options that make no other run."""


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
    about = "Trains a pixel diffusion transformer, and samples from it."
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


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a run is told apart by: all options that its numbers depend on, but for the device."""
    return {name: str(x) if isinstance(x, Path) else x for name, x in vars(args).items() if name not in WITHOUT_EFFECT}
