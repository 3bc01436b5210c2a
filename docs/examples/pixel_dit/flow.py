"""Flow matching with rescaled noise: x_t = (1 - t) x_0 + t s eps, whose velocity s eps - x_0 the model learns.

s = side / 64 above 64 pixels: neighbours of a larger image say more about each other, so it takes more noise to hide as
much of it. Source: arXiv 2512.16615, section 4.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""Of tokens (batch, tokens, 3) at times (batch,)."""


def noise_scale(side: int) -> float:
    """s of a square image."""
    return max(1.0, side / 64)


def noised(x: Tensor, noise: Tensor, t: Tensor, scale: float) -> Tensor:
    """x_t of each batch entry's time."""
    t = t[:, None, None]
    return (1 - t) * x + t * scale * noise


def loss_of(velocity: Velocity, x: Tensor, noise: Tensor, t: Tensor, scale: float) -> Tensor:
    """The mean squared error of the velocity over tokens and channels."""
    return (velocity(noised(x, noise, t, scale), t) - (scale * noise - x)).square().mean()


@torch.no_grad()
def sampled(velocity: Velocity, noise: Tensor, scale: float, steps: int = 20) -> Tensor:
    """New tokens, by Euler's method from t = 1, where there is noise alone, to t = 0."""
    x = scale * noise
    for step in range(steps, 0, -1):
        t = torch.full((len(x),), step / steps, device=x.device)
        x = x - velocity(x, t) / steps
    return x
