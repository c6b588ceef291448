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

    All four broadcast against a batch; None for standard numbers. dtype: of the inputs; integers are rounded.
    """

    dtype: torch.dtype
    known: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    @classmethod
    def of(cls, example: Tensor) -> Units:
        """Those of an example input [batch, ...]; of images, channel by channel.

        One that is constant, or looks like standard normal noise, says nothing: then standard ones, and those of
        photographs for bytes.
        """
        values = example.detach().double()
        bounds = (0.0, 255.0) if example.dtype == torch.uint8 else None
        if _says_nothing(values, noise=bounds is None):
            known = None if bounds is None else tuple(torch.tensor(value) for value in (*_NATURAL, *bounds))
            return cls(example.dtype, known)  # type: ignore[arg-type]
        axes = _shared_axes(values)
        mean, spread = values.mean(dim=axes, keepdim=True), values.std(dim=axes, keepdim=True)
        if bounds is not None:
            return cls(example.dtype, (mean, spread, *map(torch.tensor, bounds)))  # type: ignore[arg-type]
        return cls(
            example.dtype, (mean, spread, values.amin(dim=axes, keepdim=True), values.amax(dim=axes, keepdim=True))
        )

    @property
    def are_standard(self) -> bool:
        return self.known is None

    def apply(self, values: Tensor) -> Tensor:
        """In these units, still in the dtype of `values`, so that a gradient goes through."""
        if self.known is None:
            return values
        mean, spread, low, high = (part.to(values) for part in self.known)
        return (mean + spread * values).clamp(low, high)

    def finished(self, values: Tensor) -> Tensor:
        """In these units and in the dtype of the inputs."""
        values = self.apply(values)
        return (values if self.dtype.is_floating_point else values.round()).to(self.dtype)


def _says_nothing(values: Tensor, *, noise: bool) -> bool:
    """Is it constant, too little, not finite, or (if that is asked) what torch.randn gives?"""
    n = values.numel()
    if n < _FEWEST or not torch.isfinite(values).all():
        return True
    mean, spread = values.mean().item(), values.std().item()
    if spread <= 1e-6 * values.abs().max().item():
        return True
    return noise and abs(mean) < 0.1 + 3 / math.sqrt(n) and abs(spread - 1) < 0.1 + 3 / math.sqrt(2 * n)


def _shared_axes(values: Tensor) -> list[int]:
    """The axes over which inputs have one unit: all but the channels of images or volumes that show enough of each."""
    axes = list(range(values.dim()))
    if values.dim() >= 4 and values.numel() >= 4 * _FEWEST * values.shape[1]:
        axes.remove(1)
    return axes
