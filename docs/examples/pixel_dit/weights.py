"""Weights and their average in bfloat16, in files of at most 16 MiB: small enough to move from machine to machine.

What is lost by it: the optimiser's moments, which build up again in some hundred steps, and the weights' last 16 bits.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

MOST_BYTES = 16 * 2**20
HEAD_BYTES, TENSOR_HEAD_BYTES = 1000, 200
"""More than a file's head takes, and what it says of a tensor."""

KINDS = ("model.", "average.")

Weights = dict[str, Tensor]


def write(folder: Path, model: Weights, average: Weights, of: dict[str, Any], step: int) -> None:
    """weights-00.safetensors, weights-01.safetensors, ... in the place of those that are there.

    of: the settings of the model that they are for. Each file tells them, the step, and how many files belong together.
    """
    tensors = {f"model.{name}": x for name, x in model.items()} | {f"average.{name}": x for name, x in average.items()}
    kept = {name: x.to("cpu", torch.bfloat16 if x.is_floating_point() else x.dtype) for name, x in tensors.items()}
    files, written = list(parts(kept)), []
    told = {"settings": json.dumps(of), "step": str(step), "files": str(len(files))}
    for i, part in enumerate(files):
        written.append(folder / f"weights-{i:02}.part")
        written[-1].write_bytes(save(part, told))  # save_file's are for their owner alone
    new = [path.replace(path.with_suffix(".safetensors")) for path in written]
    for old in set(folder.glob("weights-*.safetensors")).difference(new):
        old.unlink()  # last, so that there always are files; of two steps, `files` refuses them


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
    found: dict[str, Any] = json.loads(told_by(files(folder)[0])["settings"])
    return found


def told_by(path: Path) -> dict[str, str]:
    """What a file says beside its tensors."""
    try:
        with safe_open(path, "pt") as file:
            told: dict[str, str] = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"pixel_dit: {path} is not whole ({error}); copy it again") from error
    if not {"settings", "step", "files"} <= told.keys():
        raise ValueError(f"pixel_dit: {path} does not say what model it is of; train.py's do, at any step")
    return told


def files(folder: Path) -> list[Path]:
    """Those of a run, all of one step."""
    found = sorted(folder.glob("weights-*.safetensors"))
    if not found:
        raise FileNotFoundError(
            f"pixel_dit: {folder} has no weights-*.safetensors; give the --out of a run that has saved"
        )
    told = [told_by(path) for path in found]
    steps, number = ", ".join(x["step"] for x in told), told[0]["files"]
    if any(x != told[0] for x in told) or number != str(len(found)):
        raise ValueError(
            f"pixel_dit: {folder} has {len(found)} weights-*.safetensors, of steps {steps}; {number} of one step "
            "belong together: copy them all, or let their run go on"
        )
    return found
