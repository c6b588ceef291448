"""Random images with the second-order and edge statistics of natural ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LEAVES = 60


def dead_leaves(count: int, channels: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """[count, channels, height, width] images of occluding shapes, with mean 0 and spread 1 over the batch."""
    side = max(height, width)
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    smallest = max(1.0, side / 16)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator)

    images = _colours(count, channels, generator).expand(count, channels, height, width)
    for _ in range(_LEAVES):
        radius = (1 / side**2 + uniform(1, 1) * (1 / smallest**2 - 1 / side**2)).rsqrt()
        down = rows - (uniform(1, 1) * (height + 2 * radius) - radius)
        right = columns - (uniform(1, 1) * (width + 2 * radius) - radius)
        angle, stretch = math.pi * uniform(1, 1), torch.exp(0.4 * torch.randn(count, 1, 1, generator=generator))
        along = (down * angle.sin() + right * angle.cos()) * stretch
        across = (down * angle.cos() - right * angle.sin()) / stretch
        square = uniform(1, 1) < 0.5
        distance = torch.where(square, torch.maximum(along.abs(), across.abs()), along.hypot(across))
        cover = (radius - distance + 0.5).clamp(0, 1)[:, None]
        slope = 0.3 * torch.randn(count, 2, 1, 1, 1, generator=generator) / side
        shade = slope[:, 0] * along[:, None] + slope[:, 1] * across[:, None]
        images = images * (1 - cover) + (_colours(count, channels, generator) + shade) * cover
    images = images + 0.1 * torch.randn(images.shape, generator=generator)
    return (images - images.mean()) / images.std().clamp(min=1e-6)


def _colours(count: int, channels: int, generator: torch.Generator) -> Tensor:
    """Correlated colours: natural ones are mostly a matter of brightness."""
    grey = torch.randn(count, 1, 1, 1, generator=generator)
    return math.sqrt(0.9) * grey + math.sqrt(0.1) * torch.randn(count, channels, 1, 1, generator=generator)
