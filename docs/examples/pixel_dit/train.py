"""Trains a pixel diffusion transformer, on the CPU, on one GPU, or under torchrun on several, and samples from it.

    python docs/examples/pixel_dit/train.py --preset tiny --attention llsa --out runs/tiny

A run that was stopped goes on from its last checkpoint by the same command.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import weights
from flow import denoised, loss_of, noise_scale, sampled
from images import Pictures, folder, photographs, save_grid
from model import Config, Grid, PixelDiT
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""At which held-out pictures are denoised."""


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
    "paper": Preset(hidden=384, heads=6, layers=12, side=128, batch=64, steps=200_000, rate=1e-4, ema=0.9999),
}


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, the preset's values in the place of those that are not given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="sizes (default: %(default)s)")
    parser.add_argument("--attention", choices=("llsa", "full"), default="llsa", help="(default: %(default)s)")
    parser.add_argument("--levels", type=int, help="coarse levels L (default: by the number of pixels)")
    parser.add_argument("--topk", type=int, default=8, help="tokens kept of each level (default: %(default)s)")
    parser.add_argument("--block-size", type=int, default=16, help="tokens of a block (default: %(default)s)")
    for name in ("enrich", "reweight", "reorder"):
        switch = argparse.BooleanOptionalAction
        parser.add_argument(f"--{name}", action=switch, default=True, help="an ablation of the paper")
    parser.add_argument("--images", type=Path, help="a folder of pictures (default: scikit-image's photographs)")
    parser.add_argument("--side", type=int, help="pixels a side")
    parser.add_argument("--batch", type=int, help="pictures a step, of all processes together")
    parser.add_argument("--steps", type=int, help="how many to train")
    parser.add_argument("--rate", type=float, help="learning rate of AdamW")
    parser.add_argument("--ema", type=float, help="decay of the weights' moving average, which samples")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    parser.add_argument("--start", type=Path, help="another run's folder, to grow from its weights")
    parser.add_argument("--every", type=int, default=1000, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=16, help="pictures made at each (default: %(default)s)")
    parser.add_argument("--sequence-ranks", type=int, default=1, help="processes that share one picture's tokens")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--out", type=Path, required=True, help="a folder for checkpoints, metrics and samples")
    args = parser.parse_args(arguments)
    for name, value in PRESETS[args.preset]._asdict().items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    return args


class Ranks(NamedTuple):
    """Which process this is of all, and the mesh of those that share a picture's tokens, if they do."""

    rank: int
    data: int
    of_data: int
    mesh: DeviceMesh | None
    device: torch.device


@contextlib.contextmanager
def ranks_of(args: argparse.Namespace) -> Iterator[Ranks]:
    """One process, or torchrun's."""
    kind = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if "RANK" not in os.environ:
        if args.sequence_ranks != 1:
            raise ValueError(f"train: --sequence-ranks is {args.sequence_ranks}, and this is one process; use torchrun")
        yield Ranks(0, 0, 1, None, torch.device(kind))
        return
    device = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        size, shared = dist.get_world_size(), args.sequence_ranks
        if size % shared or args.batch % (size // shared):
            raise ValueError(
                f"train: {size} processes, --sequence-ranks {shared} and --batch {args.batch}: the processes are to be "
                "a multiple of the first, and the batch one of their quotient"
            )
        mesh = init_device_mesh(kind, (size // shared, shared), mesh_dim_names=("data", "sequence"))
        own = mesh["sequence"] if shared > 1 else None
        yield Ranks(dist.get_rank(), mesh["data"].get_local_rank(), size // shared, own, device)
    finally:
        dist.destroy_process_group()


class Batch(NamedTuple):
    """Tokens of pictures, noise, and times."""

    x: Tensor
    noise: Tensor
    t: Tensor


def batch_of(pictures: Pictures, grid: Grid, seeds: list[list[int]], device: torch.device) -> Batch:
    """Of each seed a picture, its noise and its time, the same in whichever process it is drawn."""
    images, noises, times = [], [], []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        images.append(pictures.draw(rng))
        generator = torch.Generator(device).manual_seed(int(rng.integers(2**62)))
        noises.append(torch.randn(images[-1].shape, generator=generator, device=device))
        times.append(rng.uniform())
    x = torch.stack(images).to(device)
    return Batch(grid.tokens(x), grid.tokens(torch.stack(noises)), torch.tensor(times, device=device).float())


class Training:
    """A run: a model, its average, its optimiser, and what it is trained on."""

    def __init__(self, args: argparse.Namespace, ranks: Ranks) -> None:
        self.args, self.ranks = args, ranks
        self.config = Config(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Config)})
        self.grid = Grid(args.side, self.config, ranks.device, ranks.mesh)
        self.scale = noise_scale(args.side)
        self.pictures, self.held_out = folder(args.images, args.side) if args.images else photographs(args.side)
        torch.manual_seed(args.seed)
        self.model = PixelDiT(self.config, ranks.mesh).to(ranks.device)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(args.ema))
        self.optimiser = torch.optim.AdamW(self.model.parameters(), args.rate)
        self.trained: nn.Module = self.model
        if dist.is_initialized():
            self.trained = DistributedDataParallel(self.model)
        if args.compile:
            self.trained = torch.compile(self.trained)  # type: ignore[assignment]
        self.step, self.first, self.recent = 0, math.nan, math.nan
        self.resume()

    def velocity(self, model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        """In bfloat16 on a GPU."""
        device = self.ranks.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            velocity: Tensor = model(x, t, self.grid.rotation)
        return velocity

    def train_step(self) -> float:
        """One step of AdamW; the loss, over all processes."""
        own = range(self.ranks.data, self.args.batch, self.ranks.of_data)
        seeds = [[self.args.seed, self.step, i] for i in own]
        batch = batch_of(self.pictures, self.grid, seeds, self.ranks.device)
        loss = loss_of(lambda x, t: self.velocity(self.trained, x, t), *batch, self.scale)
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.average.update_parameters(self.model)
        self.step += 1
        return self.judged(loss.detach())

    def judged(self, loss: Tensor) -> float:
        """The loss as a number, unless training has come to nothing."""
        if dist.is_initialized():
            dist.all_reduce(loss, dist.ReduceOp.SUM)
            loss /= dist.get_world_size()
        value = loss.item()
        self.recent = value if math.isnan(self.recent) else 0.95 * self.recent + 0.05 * value
        self.first = value if math.isnan(self.first) else self.first
        if not math.isfinite(value) or self.recent > 5 * self.first:
            raise FloatingPointError(
                f"train: the loss is {value:.3g} at step {self.step}, and was {self.first:.3g} at first: training "
                f"diverges. Use a lower --rate than {self.args.rate:g}; {self.file} is of an earlier step"
            )
        return value

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Of held-out pictures, the average's loss, and the PSNR in dB of denoising in one step, at fixed times."""
        self.average.eval()
        found = {}
        count = min(16, self.args.batch)
        seeds = [[self.args.seed, 2**31, i] for i in range(self.ranks.data, count, self.ranks.of_data)]
        batch = batch_of(self.held_out, self.grid, seeds, self.ranks.device)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return self.velocity(self.average, x, t)

        for time in TIMES:
            of_time = batch._replace(t=torch.full_like(batch.t, time))
            error = (denoised(velocity, *of_time, self.scale) - of_time.x).square().mean()
            both = torch.stack([loss_of(velocity, *of_time, self.scale), error])
            if dist.is_initialized():
                dist.all_reduce(both)
                both /= dist.get_world_size()
            found[f"held_out_loss_{time}"], mean = both.tolist()
            found[f"psnr_{time}"] = 10 * math.log10(4 / mean)  # pixels are of -1 .. 1
        return found

    def sample(self) -> None:
        """New pictures, by the average of the weights, into samples-<step>.png."""
        shape = (self.args.samples, 3, self.args.side, self.args.side)
        generator = torch.Generator(self.ranks.device).manual_seed(self.args.seed)
        noise = self.grid.tokens(torch.randn(shape, generator=generator, device=self.ranks.device))
        tokens = sampled(lambda x, t: self.velocity(self.average, x, t), noise, self.scale)
        if self.ranks.mesh is not None:
            parts = [torch.empty_like(tokens) for _ in range(self.ranks.mesh.size())]
            dist.all_gather(parts, tokens, group=self.ranks.mesh.get_group())
            tokens = torch.cat(parts, dim=1)
        if self.ranks.rank == 0:
            save_grid(self.grid.images(tokens), self.args.out / f"samples-{self.step:06}.png")

    @property
    def file(self) -> Path:
        """The checkpoint."""
        path: Path = self.args.out / "checkpoint.pt"
        return path

    def save(self) -> None:
        """All that the next step depends on; the file is whole, whenever the process is killed."""
        if self.ranks.rank != 0:
            return
        state = {
            "step": self.step,
            "losses": (self.first, self.recent),
            "config": dataclasses.asdict(self.config),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        part = self.file.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.file)
        if self.step == self.args.steps:
            weights.write(self.args.out, state["model"], state["average"])

    def resume(self) -> None:
        """From this run's checkpoint, or with --start from another run's weights."""
        if self.file.exists():
            state = torch.load(self.file, map_location=self.ranks.device, weights_only=True)
            if state["config"] != dataclasses.asdict(self.config):
                raise ValueError(f"train: {self.file} is of another model, {state['config']}; use another --out")
            self.optimiser.load_state_dict(state["optimiser"])
            self.step, (self.first, self.recent) = state["step"], state["losses"]
        elif self.args.start is not None and (other := self.args.start / self.file.name).exists():
            state = torch.load(other, map_location=self.ranks.device, weights_only=True)
        elif self.args.start is not None:
            state = dict(zip(("model", "average"), weights.read(self.args.start)))
        else:
            return
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])


class Log:
    """Metrics, a line of JSON a step, and TensorBoard's; of a run that goes on, those past its checkpoint go."""

    def __init__(self, out: Path, step: int) -> None:
        self.path = out / "metrics.jsonl"
        before = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        kept = [line for line in before if line.endswith("\n") and json.loads(line)["step"] <= step]
        self.path.write_text("".join(kept))
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
            values: dict[str, Any] = {"loss": training.train_step()}
            done = training.step == args.steps
            if done or training.step % args.every == 0:
                values |= training.evaluate()
                training.sample()
                training.save()
            if log is not None:
                log.add(training.step, **values)
            bar.set_postfix(loss=f"{training.recent:.3f}")
            bar.update()


if __name__ == "__main__":
    main()
