"""Measures training of the paper's model on a GPU: tokens a second, memory, and the share that attention takes.

    python docs/examples/pixel_dit/report.py --out docs/measurements

writes pixel-dit-training-<card>.json, each row from a run of this process on that card.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flow import loss_of, noise_scale
from model import Config, Grid, PixelDiT, attention_of, velocity_by
from records import Record
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

DENSE = {"FlashAttention-2": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
LLSA: list[dict[str, Any]] = [
    {"topk": 8},
    {"levels": 1, "topk": 8},
    {"levels": 2, "topk": 8},
    {"topk": 16},
    {"levels": 2, "topk": 16},
    {"levels": 2, "topk": 8, "enrich": False},
]
EAGER = 1
"""How many of these are measured without torch.compile too."""
TOKENS = 2**18
"""Pixels of a training step, so that batches are of 16 pictures of 128 x 128 and of 4 of 256 x 256."""


def main() -> None:
    """Measure, and write after each row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[128, 256], help="pixels (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="to time each model for (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("measures a GPU, and PyTorch finds none")
    record = Record(args.out, "training", torch.device("cuda"))
    for side in args.sides:
        for compiled in (True, False):
            for dense in DENSE:
                record.add(*measured(side, Config(attention="full"), args.seconds, compiled, dense))
            for options in LLSA if compiled else LLSA[:EAGER]:
                record.add(*measured(side, Config(**options), args.seconds, compiled))


def attention_by(dense: str | None, config: Config) -> Attend:
    """Of q, k and v. Dense attention by one of PyTorch's kernels, which a compiler sees and keeps."""
    attend = attention_of(config, None)
    if dense is None:
        return attend

    def by_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(DENSE[dense]):
            return attend(q, k, v)

    return by_kernel


def measured(
    side: int, config: Config, budget: float, compiled: bool, dense: str | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is measured, and medians of whole training steps, and of attention alone, forward and backward.

    budget: seconds to time steps for. compiled: whether the model's blocks are."""
    device = torch.device("cuda")
    batch = max(1, TOKENS // side**2)
    torch.manual_seed(0)
    model, grid = PixelDiT(config).to(device), Grid(side, config, device)
    for layer in (model.leave, *(block.modulation for block in model.blocks)):
        torch.nn.init.normal_(layer.weight, std=0.02)  # as a model that has learnt something: gates are not 0
    attend = attention_by(dense, config)
    for block in model.blocks:
        block.attend = attend
    optimiser = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    if compiled:
        torch.compiler.reset()  # or after some models nothing is compiled any more
        for block in model.blocks:
            block.compile()
    x, noise = (torch.randn(batch, side**2, 3, device=device) for _ in range(2))
    t = torch.rand(batch, device=device)

    def step() -> None:
        loss = loss_of(velocity_by(model, grid), x, noise, t, noise_scale(side))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()

    shape = (batch, side**2, config.heads, config.hidden // config.heads)
    q, k, v, dout = (torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(4))

    def inference() -> None:
        with torch.no_grad():
            attend(q, k, v)

    def attention() -> None:
        torch.autograd.grad(attend(q, k, v), (q, k, v), dout)

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    whole = seconds(step, budget)
    memory = torch.cuda.max_memory_allocated() - before
    both, forward = seconds(attention, budget / 4), seconds(inference, budget / 4)
    settings = {
        "side": side,
        "attention": dense or "LLSA",
        "levels": None if dense else config.levels,
        "topk": None if dense else config.topk,
        "enrich": config.enrich,
        "batch": batch,
        "compiled": compiled,
    }
    return settings, {
        "step_ms": round(1e3 * whole, 2),
        "tokens_per_second": round(batch * side**2 / whole),
        "attention_ms": round(1e3 * both, 3),
        "attention_forward_ms": round(1e3 * forward, 3),
        "attention_share": round(config.layers * both / whole, 3),
        "step_mib": round(memory / 2**20),
    }


def seconds(call: Callable[[], None], budget: float) -> float:
    """The median of as many calls as the budget has room for, three or more, each waited for."""
    for _ in range(2):
        call()
    times: list[float] = []
    while len(times) < 3 or sum(times) < budget:
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
