"""Weights and their average in bfloat16, in files of at most 16 MiB: small enough to move from machine to machine.

What is lost by it: the optimiser's moments, which build up again in some hundred steps, and the weights' last 16 bits.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

MOST_BYTES = 16 * 2**20

KINDS = ("model.", "average.")

Weights = dict[str, Tensor]


def write(folder: Path, model: Weights, average: Weights) -> None:
    """weights-00.safetensors, weights-01.safetensors, ... in the place of those that are there."""
    tensors = {f"model.{name}": x for name, x in model.items()} | {f"average.{name}": x for name, x in average.items()}
    kept = {name: x.to("cpu", torch.bfloat16 if x.is_floating_point() else x.dtype) for name, x in tensors.items()}
    for old in folder.glob("weights-*.safetensors"):
        old.unlink()
    for i, part in enumerate(parts(kept)):
        save_file(part, folder / f"weights-{i:02}.safetensors")


def parts(tensors: Weights) -> Iterator[Weights]:
    """Tensors in order, as many at a time as a file holds beside its head."""
    part: Weights = {}
    for name, x in tensors.items():
        if part and sum(y.nbytes + 200 for y in (*part.values(), x)) > MOST_BYTES:
            yield part
            part = {}
        part[name] = x.contiguous()
    yield part


def read(folder: Path) -> tuple[Weights, Weights]:
    """The model's and the average's, as `load_state_dict` takes them."""
    files = sorted(folder.glob("weights-*.safetensors"))
    if not files:
        raise FileNotFoundError(f"train: --start {folder} has neither checkpoint.pt nor weights-*.safetensors")
    tensors = {name: x for file in files for name, x in load_file(file).items()}
    of = {kind: {name.removeprefix(kind): x for name, x in tensors.items() if name.startswith(kind)} for kind in KINDS}
    return of["model."], of["average."]
