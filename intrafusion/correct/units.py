"""In which units inputs are drawn: those of the example, where it shows any."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_FEWEST = 16
"""So few numbers say nothing about a mean and a spread."""
_NATURAL = (118.0, 62.0)
"""Mean and spread of the bytes of photographs."""


@dataclass(frozen=True)
class Units:
    """What a standard normal number stands for: mean + spread * number, within [low, high].

    mean, spread: broadcast against a batch. dtype: of the inputs; integers are rounded.
    """

    mean: Tensor | float
    spread: Tensor | float
    low: float
    high: float
    dtype: torch.dtype

    @classmethod
    def standard(cls, dtype: torch.dtype) -> Units:
        return cls(0.0, 1.0, -math.inf, math.inf, dtype)

    @classmethod
    def of(cls, example: Tensor) -> Units:
        """Those of an example input [batch, ...]; of images, channel by channel.

        One that is constant, or looks like standard normal noise, says nothing: then standard ones, and the range of a
        byte for bytes.
        """
        if example.dtype == torch.uint8:
            return cls._of_bytes(example)
        values = example.detach().double()
        n = values.numel()
        if n < _FEWEST or not torch.isfinite(values).all():
            return cls.standard(example.dtype)
        mean, spread = values.mean().item(), values.std().item()
        noise = abs(mean) < 0.1 + 3 / math.sqrt(n) and abs(spread - 1) < 0.1 + 3 / math.sqrt(2 * n)
        if noise or spread <= 1e-6 * max(1e-30, values.abs().max().item()):
            return cls.standard(example.dtype)
        low, high = values.min().item(), values.max().item()
        return cls(*_by_channel(values), low, high, example.dtype)

    @classmethod
    def _of_bytes(cls, example: Tensor) -> Units:
        values = example.detach().double()
        if values.numel() < _FEWEST or values.std() == 0:
            return cls(*_NATURAL, 0.0, 255.0, example.dtype)
        return cls(*_by_channel(values), 0.0, 255.0, example.dtype)

    @property
    def are_standard(self) -> bool:
        return self.low == -math.inf

    def apply(self, values: Tensor) -> Tensor:
        """In these units, still in the dtype of `values`, so that a gradient goes through."""
        if self.are_standard:
            return values
        mean, spread = (
            part.to(values) if isinstance(part, Tensor) else torch.tensor(part).to(values)
            for part in (self.mean, self.spread)
        )
        return (mean + spread * values).clamp(self.low, self.high)

    def finished(self, values: Tensor) -> Tensor:
        """In these units and in the dtype of the inputs."""
        values = self.apply(values)
        return (values if self.dtype.is_floating_point else values.round()).to(self.dtype)


def _by_channel(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and spread of the channels of images [N, C, H, W] or volumes that show enough of each, else of all."""
    axes = [axis for axis in range(values.dim()) if axis != 1]
    if values.dim() < 4 or values.numel() < _FEWEST * 4 * values.shape[1]:
        return values.mean(), values.std()
    whole = values.std()
    mean, spread = values.mean(dim=axes, keepdim=True), values.std(dim=axes, keepdim=True)
    flat = spread <= 1e-3 * whole  # one value everywhere: the others say how far it may be from it
    return mean, torch.where(flat, whole, spread)
