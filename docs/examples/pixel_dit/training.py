"""A run: its processes, the model, its average and optimiser, a step, what it is judged by, samples, checkpoints."""

import argparse
import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

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

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""At which held-out pictures are denoised."""
HELD_OUT_BATCHES = 4


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


class Drawn(NamedTuple):
    """A picture, the seed of its noise, and its time: the same in whichever process and thread it is drawn."""

    picture: Tensor
    noise: int
    t: float


def drawn(pictures: Pictures, seed: list[int]) -> Drawn:
    """What a seed says."""
    rng = np.random.default_rng(seed)
    return Drawn(pictures.draw(rng), int(rng.integers(2**62)), rng.uniform())


class Batch(NamedTuple):
    """Tokens of pictures, noise, and times."""

    x: Tensor
    noise: Tensor
    t: Tensor


class Training:
    """A run."""

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
        self.step, self.first, self.recent = 0, math.nan, math.nan
        self.resume()
        self.trained: nn.Module = self.model
        if args.compile:
            for block in self.model.blocks:  # which are alike, so that one of them is compiled
                block.compile()
        if dist.is_initialized():
            self.trained = DistributedDataParallel(self.model)
        self.threads = ThreadPoolExecutor(8)
        self.next = self.drawing(self.pictures, self.step)

    def drawing(self, pictures: Pictures, step: int, batch: int = 0) -> list[Future[Drawn]]:
        """This process's pictures of a step, on their way."""
        own = range(self.ranks.data, self.args.batch, self.ranks.of_data)
        return [self.threads.submit(drawn, pictures, [self.args.seed, step, batch, i]) for i in own]

    def batch(self, drawing: list[Future[Drawn]]) -> Batch:
        """Of what was drawn."""
        device, found = self.ranks.device, [future.result() for future in drawing]
        x = torch.stack([of.picture for of in found]).to(device)
        generators = (torch.Generator(device).manual_seed(of.noise) for of in found)
        noise = torch.stack([torch.randn(x.shape[1:], generator=of, device=device) for of in generators])
        t = torch.tensor([of.t for of in found], device=device)
        return Batch(self.grid.tokens(x), self.grid.tokens(noise), t)

    def velocity(self, model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        """In bfloat16 on a GPU."""
        device = self.ranks.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            velocity: Tensor = model(x, t, self.grid.rotation)
        return velocity

    def train_step(self) -> float:
        """One step of AdamW; the loss, over all processes."""
        batch = self.batch(self.next)
        self.next = self.drawing(self.pictures, self.step + 1)
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
        value = self.over_ranks(loss).item()
        self.recent = value if math.isnan(self.recent) else 0.95 * self.recent + 0.05 * value
        self.first = value if math.isnan(self.first) else self.first
        if not math.isfinite(value) or self.recent > 5 * self.first:
            raise FloatingPointError(
                f"train: the loss is {value:.3g} at step {self.step}, and was {self.first:.3g} at first: training "
                f"diverges. Use a lower --rate than {self.args.rate:g}; {self.file} is of an earlier step"
            )
        return value

    def over_ranks(self, values: Tensor) -> Tensor:
        """Their mean over all processes."""
        if dist.is_initialized():
            dist.all_reduce(values)
            values /= dist.get_world_size()
        return values

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Of held-out pictures, the average's loss, and the PSNR in dB of denoising in one step, at fixed times."""
        self.average.eval()

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return self.velocity(self.average, x, t)

        found = torch.zeros(len(TIMES), 2, device=self.ranks.device)
        for i in range(HELD_OUT_BATCHES):
            batch = self.batch(self.drawing(self.held_out, 2**31, i))
            for of_time, time in zip(found, TIMES):
                seen = batch._replace(t=torch.full_like(batch.t, time))
                error = (denoised(velocity, *seen, self.scale) - seen.x).square().mean()
                of_time += torch.stack([loss_of(velocity, *seen, self.scale), error]) / HELD_OUT_BATCHES
        losses, errors = self.over_ranks(found).T.tolist()
        of_losses = {f"held_out_loss_{time}": x for time, x in zip(TIMES, losses)}
        # of pixels from -1 to 1
        return of_losses | {f"psnr_{time}": 10 * math.log10(4 / x) for time, x in zip(TIMES, errors)}

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
