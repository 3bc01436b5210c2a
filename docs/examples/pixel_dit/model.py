"""A diffusion transformer on raw pixels: a token is a pixel, without an autoencoder and without patches.

It works on tokens; a `Grid` says which token is which pixel, and which of them this process holds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

import llsa_np as llsa

CHANNELS = 3
"""Of a pixel."""
PLACES = 64
"""A picture's side in units of rotary positions. Where pixels were the unit, a model (hidden 96, 4 layers, emoji) that
grew from 16 pixels a side to 32 took 300 steps to the held-out losses that it has here after 150 to 200."""


@dataclass(frozen=True)
class Config:
    """Sizes of the model, and its attention: `full`, or `llsa` with its options and ablations."""

    hidden: int = 384
    heads: int = 6
    layers: int = 12
    attention: Literal["llsa", "full"] = "llsa"
    block_size: int = 16
    levels: int | None = None
    topk: int = 8
    enrich: bool = True  # coarse tokens take part beside the pixels that were selected
    reweight: bool = True  # a coarse token weighs as many pixels as it stands for
    reorder: bool = True  # tokens in Z-order, in which a block is a patch


def attention_of(config: Config, mesh: DeviceMesh | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention of q, k and v (batch, tokens, heads, dim), of one image's tokens over the ranks of a mesh if given."""
    if config.attention == "full":
        if mesh is not None:
            raise ValueError("attention is 'full'; an image's tokens lie over several ranks with 'llsa' alone")
        return lambda *qkv: scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2)
    options: dict[str, Any] = {name: getattr(config, name) for name in ("block_size", "levels", "topk", "reweight")}
    options |= {"enrich": None if config.enrich else (), "layout": "bnhd"}
    if mesh is None:
        return lambda *qkv: llsa.attention(*qkv, **options)
    from llsa_np.adapters.pytorch_distributed import sequence_parallel_attention

    return lambda *qkv: sequence_parallel_attention(*qkv, mesh, **options)


class Grid:
    """The pixels of a square image as tokens, and where each lies: what the model needs to know of positions."""

    def __init__(self, side: int, config: Config, device: torch.device, mesh: DeviceMesh | None = None) -> None:
        order, inverse = (torch.from_numpy(x).to(device) for x in llsa.zorder(side, side))
        self.order = order if config.reorder else torch.arange(side * side, device=device)
        self.inverse = inverse if config.reorder else self.order
        self.own = self.order if mesh is None else self.order.chunk(mesh.size())[mesh.get_local_rank()]
        self.side = side
        pairs = config.hidden // config.heads // 4  # of dims, for each of the two axes
        frequencies = 1e4 ** -(torch.arange(pairs, device=device) / pairs)
        places = torch.stack([self.own // side, self.own % side], dim=-1)  # row and column (tokens, 2)
        places = (places + 0.5) * (PLACES / side)  # of the picture, not of the pixel: so it looks alike at every side
        angles = places[:, None, :, None] * frequencies  # (tokens, 1, 2, pairs)
        self.rotation = angles.cos(), angles.sin()

    def tokens(self, images: Tensor) -> Tensor:
        """(batch, channels, side, side) -> this process's tokens (batch, tokens, channels)."""
        return images.flatten(2).mT[:, self.own]

    def images(self, tokens: Tensor) -> Tensor:
        """All tokens (batch, side * side, channels) -> (batch, channels, side, side)."""
        return tokens[:, self.inverse].mT.unflatten(2, (self.side, self.side))


def rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions: of a head's dims (batch, tokens, heads, dim) half turn with the row, half with the column."""
    cos, sin = rotation
    a, b = x.unflatten(-1, (2, 2, -1)).unbind(-2)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-2).flatten(-3)


class Block(nn.Module):
    """Attention and an MLP, each shifted, scaled and gated by the time; gates are zero at first (adaLN-zero)."""

    def __init__(self, config: Config, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        hidden, self.heads, self.attend = config.hidden, config.heads, attend
        self.norm = nn.LayerNorm(hidden, elementwise_affine=False)
        self.modulation = zero(nn.Linear(hidden, 6 * hidden))
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.q_norm, self.k_norm = nn.RMSNorm(hidden // self.heads), nn.RMSNorm(hidden // self.heads)
        self.wide, self.narrow = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor, time: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        of_attention, of_mlp = self.modulation(time)[:, None].chunk(2, dim=-1)
        shift, scale, gate = of_attention.chunk(3, dim=-1)
        q, k, v = self.qkv(self.norm(x) * (1 + scale) + shift).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = (rotated(y, rotation).to(v.dtype) for y in (self.q_norm(q.float()), self.k_norm(k.float())))
        x = x + gate * self.out(self.attend(q, k, v).flatten(2))
        shift, scale, gate = of_mlp.chunk(3, dim=-1)
        return x + gate * self.narrow(gelu(self.wide(self.norm(x) * (1 + scale) + shift)))


class PixelDiT(nn.Module):
    """The velocity of pixels at times in 0..1: (batch, tokens, channels), (batch,) -> (batch, tokens, channels)."""

    def __init__(self, config: Config, mesh: DeviceMesh | None = None) -> None:
        super().__init__()
        hidden, attend = config.hidden, attention_of(config, mesh)
        self.enter, self.leave = nn.Linear(CHANNELS, hidden), zero(nn.Linear(hidden, CHANNELS))
        self.time = nn.Sequential(nn.Linear(256, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.blocks = nn.ModuleList(Block(config, attend) for _ in range(config.layers))
        self.norm, self.modulation = nn.LayerNorm(hidden, elementwise_affine=False), zero(nn.Linear(hidden, 2 * hidden))

    def forward(self, tokens: Tensor, t: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        frequencies = 1e4 ** -(torch.arange(128, device=t.device) / 128)
        angles = 1000 * t[:, None] * frequencies
        time = silu(self.time(torch.cat([angles.cos(), angles.sin()], dim=-1)))
        x = self.enter(tokens)
        for block in self.blocks:
            x = block(x, time, rotation)
        shift, scale = self.modulation(time)[:, None].chunk(2, dim=-1)
        return self.leave(self.norm(x) * (1 + scale) + shift).float()


def velocity_by(model: nn.Module, grid: Grid) -> Callable[[Tensor, Tensor], Tensor]:
    """The model as a function of tokens and times; in bfloat16 on a GPU."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
            found: Tensor = model(x, t, grid.rotation)
        return found

    return velocity


def zero(layer: nn.Linear) -> nn.Linear:
    """A layer whose results are 0 at first."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
