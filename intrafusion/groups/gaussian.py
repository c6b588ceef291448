"""Means and covariances of a group's channels at one place of the network, and what simple layers make of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from intrafusion.ot.moments import activation_moments


@dataclass(frozen=True, eq=False)
class Gaussian:
    """mean [n] and covariance [n, n] of a group's channels, float64."""

    mean: Tensor
    cov: Tensor

    @property
    def std(self) -> Tensor:
        return self.cov.diagonal().clamp(min=0).sqrt()

    @property
    def correlation(self) -> Tensor:
        """1 on the diagonal; channels that do not vary are correlated with no other."""
        std = self.std
        inverse = torch.where(std > 0, 1.0 / torch.where(std > 0, std, 1.0), 0.0)
        rho = (inverse[:, None] * self.cov * inverse).clamp(-1, 1)
        return rho.fill_diagonal_(1.0)

    def through(self, f: Callable[[Tensor], Tensor]) -> Gaussian:
        return Gaussian(*activation_moments(self.mean, self.std, self.correlation, f))

    def __add__(self, other: Gaussian) -> Gaussian:
        """The sum of independent terms."""
        return Gaussian(self.mean + other.mean, self.cov + other.cov)

    def __mul__(self, other: Gaussian) -> Gaussian:
        """The product of independent factors."""
        a, b = torch.outer(self.mean, self.mean), torch.outer(other.mean, other.mean)
        return Gaussian(self.mean * other.mean, self.cov * other.cov + a * other.cov + b * self.cov)


def average(values: Sequence[Gaussian]) -> Gaussian | None:
    """The average of means and of covariances; None of none."""
    if len(values) < 2:
        return values[0] if values else None
    count = len(values)
    return Gaussian(sum(v.mean for v in values) / count, sum(v.cov for v in values) / count)  # pyright: ignore
