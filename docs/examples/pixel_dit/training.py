"""A run: the model, its average and optimiser, a step, what it is judged by, samples, checkpoints."""

import argparse
import copy
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import weights
from flow import loss_of, noise_scale, sampled
from images import Pictures, folder, photographs, save_grid
from model import CHANNELS, Config, Grid, PixelDiT, velocity_by
from options import settings_of
from ranks import Ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""At which held-out pictures are denoised."""
HELD_OUT_BATCHES = 4
JUDGED_BY = 2**31
"""The seed of draws of what is held out: runs of every --seed are judged by the same pictures and noise."""
DIVERGED = 5.0
"""Times the loss of a model that predicts 0, which is 1 + s squared at most, for pixels are of -1 .. 1."""
MAY_CHANGE = ("compile", "ema", "rate", "sequence_ranks", "start", "steps")
"""Options with which a run may go on otherwise than it began."""
UNREADABLE = (OSError, EOFError, UnpicklingError, RuntimeError, ValueError, LookupError, TypeError, AttributeError)
"""What PyTorch raises at files that are cut or no checkpoint at all."""
IN_CHECKPOINT = {"step", "recent_loss", "settings", "model", "average", "optimiser"}


class Batch(NamedTuple):
    """Pictures or their tokens, noise, and times."""

    x: Tensor
    noise: Tensor
    t: Tensor


class Draws(Dataset[Batch]):
    """A picture, noise and a time of each seed: the same in whichever process they are drawn."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures

    def __getitem__(self, seed: Sequence[int]) -> Batch:
        rng = np.random.default_rng(seed)
        x = self.pictures.draw(rng)
        noise = torch.from_numpy(rng.standard_normal(x.shape, np.float32))
        return Batch(x, noise, torch.tensor(rng.uniform(), dtype=torch.float32))


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
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), args.rate, fused=True)
        self.step, self.recent_loss = 0, math.nan
        self.most = DIVERGED * (1 + self.scale**2)
        self.not_read: list[Tensor] = []
        self.resume()
        self.trained: nn.Module = self.model
        if args.compile:
            for block in self.model.blocks:  # which are alike, so that one of them is compiled
                block.compile()
        if dist.is_initialized():
            self.trained = DistributedDataParallel(self.model)
        on_gpu = ranks.device.type == "cuda"
        self.drawn = self.draws(self.pictures, args.seed, count(self.step), args.workers if on_gpu else 0)

    def draws(self, pictures: Pictures, seed: int, steps: Iterable[int], workers: int = 0) -> Iterator[Batch]:
        """This process's part of the batch of each step, drawn by so many other processes ahead of time."""
        own = range(self.ranks.data, self.args.batch, self.ranks.of_data)
        seeds = ([(seed, step, i) for i in own] for step in steps)
        pinned = self.ranks.device.type == "cuda"
        return iter(DataLoader(Draws(pictures), batch_sampler=seeds, num_workers=workers, pin_memory=pinned))

    def tokens(self, batch: Batch) -> Batch:
        """A batch of pictures as tokens, on the device."""
        x, noise, t = (part.to(self.ranks.device, non_blocking=True) for part in batch)
        return Batch(self.grid.tokens(x), self.grid.tokens(noise), t)

    def train_step(self) -> None:
        """One step of AdamW, which nobody waits for."""
        batch = self.tokens(next(self.drawn))
        loss = loss_of(velocity_by(self.trained, self.grid), *batch, self.scale)
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.follow()
        self.step += 1
        self.not_read.append(loss.detach())

    def follow(self) -> None:
        """The moving average of the weights, at first over fewer steps: what a run begins with is soon forgotten.

        AveragedModel would wait for a GPU at every step.
        """
        decay = min(self.args.ema, (1 + self.step) / (10 + self.step))
        average = get_ema_multi_avg_fn(decay)
        average(list(self.average.parameters()), list(self.model.parameters()), self.step)

    def losses(self) -> Iterator[tuple[int, float]]:
        """Each step and its loss, over all processes, since they were read last, unless training has come to nothing.

        Numbers are there when the device has come so far. While it is waited for, nothing is enqueued, so losses of
        several steps are read together.
        """
        values = self.over_ranks(torch.stack(self.not_read)).tolist()
        self.not_read.clear()
        for step, value in enumerate(values, self.step - len(values) + 1):
            self.recent_loss = value if math.isnan(self.recent_loss) else 0.95 * self.recent_loss + 0.05 * value
            if not self.recent_loss <= self.most:  # NaN neither
                raise self.diverges(f"the loss is {value:.3g} at step {step}")
            yield step, value

    def diverges(self, found: str) -> FloatingPointError:
        """The error of training that has come to nothing."""
        saved = f"{self.file} is of an earlier step" if self.file.exists() else "nothing is saved yet"
        return FloatingPointError(
            f"train: {found}, and of a model that predicts 0 it is {1 + self.scale**2:.3g} at most: training diverges. "
            f"Use a lower --rate than {self.args.rate:g}; {saved}"
        )

    def over_ranks(self, values: Tensor) -> Tensor:
        """Their mean over all processes."""
        if dist.is_initialized():
            dist.all_reduce(values)
            values /= dist.get_world_size()
        return values

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Of held-out pictures, the average's loss, and the PSNR in dB of denoising in one step, at fixed times."""
        velocity = velocity_by(self.average, self.grid)
        losses = torch.zeros(len(TIMES) + 1, device=self.ranks.device)
        for drawn in self.draws(self.held_out, JUDGED_BY, range(HELD_OUT_BATCHES)):
            batch = self.tokens(drawn)
            for i, time in enumerate(TIMES):
                at_time = batch._replace(t=torch.full_like(batch.t, time))
                losses[i] += loss_of(velocity, *at_time, self.scale) / HELD_OUT_BATCHES
            with torch.enable_grad():  # by what is compiled already
                now = loss_of(velocity_by(self.model, self.grid), *batch, self.scale)
            losses[-1] += now.detach() / HELD_OUT_BATCHES
        *of_average, of_model = self.over_ranks(losses).tolist()
        # A step's loss is of the weights before it, and an average hides much: ruined weights are first seen here
        for loss in (of_model, *of_average):
            if not loss <= self.most:
                raise self.diverges(f"the held-out loss is {loss:.3g} after step {self.step}")
        found = dict(zip(TIMES, of_average))
        of_losses = {f"held_out_loss_{time}": loss for time, loss in found.items()}
        # Pixels are of -1 .. 1. What x_t - t v is off by is t times what v is off by.
        return of_losses | {f"psnr_{time}": 10 * math.log10(4 / (time**2 * loss)) for time, loss in found.items()}

    def sample(self) -> None:
        """New pictures, by the average of the weights, into samples-<step>.png."""
        if self.args.samples == 0:
            return
        shape = (self.args.samples, CHANNELS, self.args.side, self.args.side)
        generator = torch.Generator(self.ranks.device).manual_seed(self.args.seed)
        noise = self.grid.tokens(torch.randn(shape, generator=generator, device=self.ranks.device))
        parts = noise.split(self.args.batch // self.ranks.of_data)  # as many at once as in a step
        tokens = torch.cat([sampled(velocity_by(self.average, self.grid), part, self.scale) for part in parts])
        if self.ranks.mesh is not None:
            of_ranks = [torch.empty_like(tokens) for _ in range(self.ranks.mesh.size())]
            dist.all_gather(of_ranks, tokens, group=self.ranks.mesh.get_group())
            tokens = torch.cat(of_ranks, dim=1)
        if self.ranks.rank == 0:
            save_grid(self.grid.images(tokens), self.args.out / f"samples-{self.step:06}.png")

    @property
    def file(self) -> Path:
        """The checkpoint."""
        path: Path = self.args.out / "checkpoint.pt"
        return path

    @property
    def of_model(self) -> dict[str, Any]:
        """What its weights are of."""
        return dataclasses.asdict(self.config) | {"side": self.args.side}

    def save(self) -> None:
        """All that the next step depends on; the file is whole, whenever the process is killed."""
        if self.ranks.rank != 0:
            return
        state = {
            "step": self.step,
            "recent_loss": self.recent_loss,
            "settings": settings_of(self.args),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        part = self.file.with_suffix(".part")
        torch.save(state, part)
        weights.write(self.args.out, state["model"], state["average"], self.of_model, self.step)
        part.replace(self.file)  # last: a kill before it makes the same command write all of this again

    def resume(self) -> None:
        """From this run's checkpoint, or with --start from another run's weights."""
        if self.file.exists():
            state, own = loaded(self.file), settings_of(self.args)
            others = [k for k, x in state["settings"].items() if k not in MAY_CHANGE and own.get(k) != x]
            if others:
                differ = ", ".join(f"{k} is {state['settings'][k]} (here {own.get(k)})" for k in others)
                raise ValueError(
                    f"train: {self.file} is of another run, whose {differ}; give the same to go on with it, or another "
                    "--out, and --start to grow from it"
                )
            self.optimiser.load_state_dict(state["optimiser"])
            for group in self.optimiser.param_groups:
                group["lr"] = self.args.rate  # which may be another than before
            self.step, self.recent_loss = state["step"], state["recent_loss"]
        elif self.args.start is not None and (other := self.args.start / self.file.name).exists():
            state = loaded(other)
        elif self.args.start is not None:
            state = dict(zip(("model", "average"), weights.read(self.args.start)))
        else:
            return
        try:
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
        except RuntimeError as error:
            raise ValueError(
                f"train: --start {self.args.start} is of a model of other sizes than --preset {self.args.preset}; give "
                "the preset that it was trained with"
            ) from error


def loaded(file: Path) -> dict[str, Any]:
    """A checkpoint."""
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        is_one = state.keys() >= IN_CHECKPOINT
    except UNREADABLE as error:
        raise ValueError(
            f"train: {file} cannot be read ({type(error).__name__}); copy it again, or remove it"
        ) from error
    if not is_one:
        raise ValueError(f"train: {file} is no checkpoint of train.py; copy it again, or remove it")
    return state
