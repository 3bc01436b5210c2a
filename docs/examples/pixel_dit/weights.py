"""Weights and their average in bfloat16, in files of at most 16 MiB: small enough to move from machine to machine.

What is lost by it: the optimiser's moments, which build up again in some hundred steps, and the weights' last 16 bits.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

MOST_BYTES = 16 * 2**20
HEAD_BYTES, TENSOR_HEAD_BYTES = 1000, 200
"""More than a file's head takes, and what it says of a tensor."""

KINDS = ("model.", "average.")

Weights = dict[str, Tensor]


def write(folder: Path, model: Weights, average: Weights, of: dict[str, Any]) -> None:
    """weights-00.safetensors, weights-01.safetensors, ... in the place of those that are there.

    of: the settings of the model that they are for, which each file tells.
    """
    tensors = {f"model.{name}": x for name, x in model.items()} | {f"average.{name}": x for name, x in average.items()}
    kept = {name: x.to("cpu", torch.bfloat16 if x.is_floating_point() else x.dtype) for name, x in tensors.items()}
    written = []
    for i, part in enumerate(parts(kept)):
        written.append(folder / f"weights-{i:02}.part")
        save_file(part, written[-1], {"settings": json.dumps(of)})
    new = [path.replace(path.with_suffix(".safetensors")) for path in written]
    for old in set(folder.glob("weights-*.safetensors")).difference(new):
        old.unlink()  # last, so that there always are weights


def parts(tensors: Weights) -> Iterator[Weights]:
    """Tensors in order, as many at a time as a file holds beside its head."""
    part: Weights = {}
    for name, x in tensors.items():
        of_tensors = sum(y.nbytes + TENSOR_HEAD_BYTES for y in (*part.values(), x))
        if part and HEAD_BYTES + of_tensors > MOST_BYTES:
            yield part
            part = {}
        part[name] = x.contiguous()
    yield part


def read(folder: Path) -> tuple[Weights, Weights]:
    """The model's and the average's, as `load_state_dict` takes them."""
    tensors = {name: x for file in files(folder) for name, x in load_file(file).items()}
    of = {kind: {name.removeprefix(kind): x for name, x in tensors.items() if name.startswith(kind)} for kind in KINDS}
    return of["model."], of["average."]


def settings_of(folder: Path) -> dict[str, Any]:
    """Of the model whose weights lie there."""
    path = files(folder)[0]
    with safe_open(path, "pt") as file:
        told = file.metadata() or {}
    if "settings" not in told:
        raise ValueError(f"sample: {path} does not say what model it is of; train.py writes such that do, at any step")
    found: dict[str, Any] = json.loads(told["settings"])
    return found


def files(folder: Path) -> list[Path]:
    """Those of a run."""
    found = sorted(folder.glob("weights-*.safetensors"))
    if not found:
        raise FileNotFoundError(
            f"pixel_dit: {folder} has no weights-*.safetensors; give the --out of a run that has saved"
        )
    return found
