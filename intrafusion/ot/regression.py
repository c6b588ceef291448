"""Ridge regression from running sums: what a layer must become so that its output is the one that was asked for.

    min over W, c of   sum |y - W x - c|^2  +  lambda · N · |W - W0|^2

The sums are kept in two folds (images alternate), so that lambda is chosen by cross-validation and not by hand: with
few images it grows and W stays near the prior W0; with many it vanishes.

Shapes may begin with further axes `...`: separate problems (the groups of a convolution) that share lambda.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_RIDGES = tuple(10.0**exponent for exponent in (1, 0, -1, -2, -3, -4))
"""Tried from the strongest down, in units of the inputs' mean variance; the search stops when it gets worse."""


@dataclass
class Moments:
    """Running sums over samples: count N, sum of x [..., d], of y [..., m], x x^T [..., d, d], x y^T [..., d, m], y^2.

    Accumulated in float64 whatever the samples are in.
    """

    n: float
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Moments:
        """Sums of one batch. x: [..., N, d], y: [..., N, m]."""
        return cls(
            float(x.shape[-2]),
            x.sum(dim=-2).double(),
            y.sum(dim=-2).double(),
            (x.mT @ x).double(),
            (x.mT @ y).double(),
            y.double().square().sum(dim=-2),
        )

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(getattr(self, name) + getattr(other, name) for name in _FIELDS))

    def __sub__(self, other: Moments) -> Moments:
        return Moments(*(getattr(self, name) - getattr(other, name) for name in _FIELDS))

    def centred(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean-free sums: x x^T [..., d, d], x y^T [..., d, m], y^2 [..., m]."""
        mean = (self.x / self.n)[..., :, None]
        return (
            self.xx - mean * self.x[..., None, :],
            self.xy - mean * self.y[..., None, :],
            (self.yy - self.y.square() / self.n).clamp(min=0),
        )


_FIELDS = ("n", "x", "y", "xx", "xy", "yy")


@dataclass(frozen=True)
class Fit:
    """y ~ weight x + bias: weight [..., m, d], bias [..., m], the ridge that was chosen, moments of the fit.

    mean, std: [..., m] of the fitted output; unexplained: the share of the targets' variance that is left (0: exact).
    """

    weight: Tensor
    bias: Tensor
    ridge: float
    mean: Tensor
    std: Tensor
    unexplained: float


def ridge(folds: list[Moments], prior: Tensor) -> Fit:
    """Fit with the ridge towards `prior` [..., m, d] that predicts the held-out fold best, in float64.

    folds: at least one; with one fold only the strongest ridge is used. Inputs that never vary get their prior weight.
    """
    total = folds[0]
    for fold in folds[1:]:
        total = total + fold
    strength = _best_ridge(folds, total, prior) if len(folds) > 1 and min(f.n for f in folds) > 1 else _RIDGES[0]
    weight = _solve(total, prior, strength)
    xx, xy, yy = total.centred()
    bias = (total.y - _times(weight, total.x)) / total.n
    variance = ((weight @ xx) * weight).sum(dim=-1).clamp(min=0)
    left = yy - 2 * (weight * xy.mT).sum(dim=-1) + variance
    unexplained = float(left.sum().clamp(min=0) / yy.sum().clamp(min=1e-300))
    return Fit(weight, bias, strength, total.y / total.n, (variance / total.n).sqrt(), unexplained)


def _solve(moments: Moments, prior: Tensor, strength: float) -> Tensor:
    """prior + (y - prior x) x^T (x x^T + lambda)^-1, as [..., m, d]. Raises ValueError for sums that are not finite."""
    xx, xy, _ = moments.centred()
    scale = xx.diagonal(dim1=-2, dim2=-1).mean(dim=-1, keepdim=True).clamp(min=1e-12 * moments.n)
    system = xx.clone()
    system.diagonal(dim1=-2, dim2=-1).add_(strength * scale)
    factor, info = torch.linalg.cholesky_ex(system)
    if bool(info.any()):
        if not torch.isfinite(system).all() or strength > 1e6:
            raise ValueError("the second moments of the inputs are not finite")
        return _solve(moments, prior, 10 * strength)  # numerically rank-deficient at this ridge
    return prior + torch.cholesky_solve(xy - xx @ prior.mT, factor).mT


def _best_ridge(folds: list[Moments], total: Moments, prior: Tensor) -> float:
    best, best_error = _RIDGES[0], float("inf")
    for strength in _RIDGES:
        error = sum(_error(fold, total - fold, prior, strength) for fold in folds)
        if error > best_error:
            break
        best, best_error = strength, error
    return best


def _error(held_out: Moments, rest: Moments, prior: Tensor, strength: float) -> float:
    """Squared error on the held-out fold of the fit on the rest."""
    weight = _solve(rest, prior, strength)
    xx, xy, yy = held_out.centred()
    inside = yy - 2 * (weight * xy.mT).sum(dim=-1) + ((weight @ xx) * weight).sum(dim=-1)
    gap = (held_out.y - _times(weight, held_out.x)) / held_out.n - (rest.y - _times(weight, rest.x)) / rest.n
    return float((inside + held_out.n * gap.square()).sum())


def _times(weight: Tensor, x: Tensor) -> Tensor:
    return (weight @ x[..., None])[..., 0]
