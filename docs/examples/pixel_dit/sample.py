"""Makes new pictures with a model that `train.py` has trained, from the weights in its folder.

python docs/examples/pixel_dit/sample.py runs/tiny --pictures 36 --out new.png
"""

import argparse
from pathlib import Path

import torch
import weights
from flow import noise_scale, sampled
from images import save_grid
from model import CHANNELS, Config, Grid, PixelDiT, velocity_by
from options import natural, positive
from ranks import device_of


def main(arguments: list[str] | None = None) -> None:
    """Write a grid of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="the --out of train.py")
    parser.add_argument("--pictures", type=positive, default=16, help="how many (default: %(default)s)")
    parser.add_argument("--batch", type=positive, default=16, help="how many at a time (default: %(default)s)")
    parser.add_argument("--side", type=positive, help="pixels a side (default: as it was trained last)")
    parser.add_argument("--steps", type=positive, default=20, help="of Euler's method (default: %(default)s)")
    parser.add_argument("--seed", type=natural, default=0, help="of the noise (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda where there is one)")
    parser.add_argument("--out", type=Path, required=True, help="a PNG")
    args = parser.parse_args(arguments)
    if args.out.suffix.lower() != ".png":
        parser.error(f"--out {args.out} is to end in .png")
    settings = weights.settings_of(args.run)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    side = args.side or settings["side"]
    config = Config(**{name: value for name, value in settings.items() if name != "side"})
    device = device_of(args.device)
    model = PixelDiT(config).to(device)
    model.load_state_dict(weights.read(args.run)[1])
    grid = Grid(side, config, device)
    velocity = velocity_by(model, grid)
    generator = torch.Generator(device).manual_seed(args.seed)
    noise = torch.randn((args.pictures, CHANNELS, side, side), generator=generator, device=device)
    pictures = [
        grid.images(sampled(velocity, grid.tokens(part), noise_scale(side), args.steps))
        for part in noise.split(args.batch)
    ]
    save_grid(torch.cat(pictures), args.out)


if __name__ == "__main__":
    main()
