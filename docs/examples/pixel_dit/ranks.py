"""The processes of a run: one, or torchrun's, and the device that each works on."""

import argparse
import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


class Ranks(NamedTuple):
    """Which process this is of all, and the mesh of those that share a picture's tokens, if they do."""

    rank: int
    data: int
    of_data: int
    mesh: DeviceMesh | None
    device: torch.device


def device_of(kind: str | None) -> torch.device:
    """`cpu` or `cuda`; None for cuda where there is one."""
    there = torch.cuda.is_available()
    if kind == "cuda" and not there:
        raise ValueError("pixel_dit: --device is cuda, and PyTorch finds no CUDA device; leave it out for the CPU")
    return torch.device(kind or ("cuda" if there else "cpu"))


@contextlib.contextmanager
def ranks_of(args: argparse.Namespace) -> Iterator[Ranks]:
    """One process, or torchrun's."""
    device = device_of(args.device)
    kind = device.type
    if "RANK" not in os.environ:
        if args.sequence_ranks != 1:
            raise ValueError(f"train: --sequence-ranks is {args.sequence_ranks}, and this is one process; use torchrun")
        yield Ranks(0, 0, 1, None, device)
        return
    if kind == "cuda":
        device = torch.device(kind, int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        size, shared = dist.get_world_size(), args.sequence_ranks
        if args.side**2 % shared:
            raise ValueError(
                f"train: --side {args.side} makes {args.side**2} pixels, which --sequence-ranks {shared} is to divide"
            )
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
