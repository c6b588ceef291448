"""Ridge regression from running sums: what a layer must become so that its output is the one that was asked for.

    min over W, c of   sum |y - W x - c|^2  +  lambda · N · |W - W0|^2

The sums are kept in two folds (images alternate), so that lambda is chosen by cross-validation and not by hand: with
few images it grows and W stays near the prior W0; with many it vanishes. Where there are several priors, so is W0.

Shapes may begin with further axes `...`: separate problems (the groups of a convolution) that share lambda.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_RIDGES = tuple(10.0**exponent for exponent in (1, 0, -1, -2, -3, -4))
"""Tried from the strongest down, in units of the inputs' mean variance; the search stops when it gets worse."""
_EXACT = 1e-10
"""A prior that leaves no more than this share of the targets' power predicts exactly: what is left is rounding."""


@dataclass
class Moments:
    """Running sums over samples: count N, sum of x [..., d], of y [..., m], x x^T [..., d, d], x y^T [..., d, m], y^2.

    Accumulated in float64 whatever the samples are in. affine: whether the map that is sought has a shift; without one,
    nothing is taken about its mean.
    """

    n: float
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor
    affine: bool = True

    @classmethod
    def of(cls, x: Tensor, y: Tensor, weights: Tensor | None = None, *, affine: bool = True) -> Moments:
        """Sums of one batch. x: [..., N, d], y: [..., N, m], weights: [N] how much each sample counts (1 each)."""
        roots = x.new_ones(x.shape[-2]) if weights is None else weights.to(x).sqrt()
        if weights is not None:
            x, y = x * roots[:, None], y * roots[:, None]
        return cls(
            float(roots.double().square().sum()),
            (roots @ x).double(),
            (roots @ y).double(),
            (x.mT @ x).double(),
            (x.mT @ y).double(),
            y.double().square().sum(dim=-2),
            affine,
        )

    def __add__(self, other: Moments) -> Moments:
        return Moments(*(getattr(self, name) + getattr(other, name) for name in _FIELDS), affine=self.affine)

    def __sub__(self, other: Moments) -> Moments:
        return Moments(*(getattr(self, name) - getattr(other, name) for name in _FIELDS), affine=self.affine)

    def centred(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean-free sums: x x^T [..., d, d], x y^T [..., d, m], y^2 [..., m]; as they are for a map without a shift."""
        if not self.affine:
            return self.xx, self.xy, self.yy
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
    without: the weight [..., m, d] that is fitted on all folds but one, for every fold; () if there is one fold only.
    affine: whether there is a bias; it is 0 otherwise.
    """

    weight: Tensor
    bias: Tensor
    ridge: float
    mean: Tensor
    std: Tensor
    unexplained: float
    without: tuple[Tensor, ...] = ()
    affine: bool = True


@dataclass(frozen=True)
class Prior:
    """A weight [..., m, d] to pull towards; without: for every fold, what it is without that fold (if it is learnt)."""

    weight: Tensor
    without: tuple[Tensor, ...] = ()

    def apart_from(self, fold: int) -> Tensor:
        return self.without[fold] if self.without else self.weight


def ridge(folds: list[Moments], *priors: Prior) -> Fit:
    """Fit with the ridge, and towards the prior, that predict the held-out fold best, in float64.

    folds: at least one; with one fold only the strongest ridge and the first prior are used. Of priors that predict
    equally well, the first one is taken. Inputs that never vary get their prior weight.
    """
    total = folds[0]
    for fold in folds[1:]:
        total = total + fold
    trial = _Trial(float("inf"), priors[0], _RIDGES[0], ())
    if len(folds) > 1 and min(fold.n for fold in folds) > 1:
        trial = _best_trial(folds, total, priors)
    weight = _solve(total, (trial.prior.weight,), trial.strength)[0]
    xx, xy, yy = total.centred()
    bias = (total.y - _times(weight, total.x)) / total.n if total.affine else torch.zeros_like(total.y)
    variance = ((weight @ xx) * weight).sum(dim=-1).clamp(min=0)
    left = yy - 2 * (weight * xy.mT).sum(dim=-1) + variance
    unexplained = float(left.sum().clamp(min=0) / yy.sum().clamp(min=1e-300))
    mean, std = total.y / total.n, (variance / total.n).sqrt()
    return Fit(weight, bias, trial.strength, mean, std, unexplained, trial.without, total.affine)


def _solve(moments: Moments, priors: Sequence[Tensor], strength: float) -> list[Tensor]:
    """prior + (y - prior x) x^T (x x^T + lambda)^-1 = (y x^T + lambda prior) (x x^T + lambda)^-1, for each prior.

    Raises ValueError for sums that are not finite.
    """
    xx, xy, _ = moments.centred()
    scale = xx.diagonal(dim1=-2, dim2=-1).mean(dim=-1, keepdim=True).clamp(min=1e-12 * moments.n)
    system = xx.clone()
    added = strength * scale
    system.diagonal(dim1=-2, dim2=-1).add_(added)
    factor, info = torch.linalg.cholesky_ex(system)
    if bool(info.any()):
        if not torch.isfinite(system).all() or strength > 1e6:
            raise ValueError("the second moments of the inputs are not finite")
        return _solve(moments, priors, 10 * strength)  # numerically rank-deficient at this ridge
    return [torch.cholesky_solve(xy + added[..., None] * prior.mT, factor).mT for prior in priors]


@dataclass(frozen=True)
class _Trial:
    """A prior and a ridge: the squared error on what is held out, and the weights [..., m, d] without each fold."""

    error: float
    prior: Prior
    strength: float
    without: tuple[Tensor, ...]


def _best_trial(folds: list[Moments], total: Moments, priors: Sequence[Prior]) -> _Trial:
    best: _Trial | None = None
    rounding = _EXACT * float(total.yy.sum())
    for strength in _RIDGES:
        solved = [
            _solve(total - fold, [prior.apart_from(number) for prior in priors], strength)
            for number, fold in enumerate(folds)
        ]
        trials = []
        for number, prior in enumerate(priors):
            without = tuple(weights[number] for weights in solved)
            error = sum(_error(fold, total - fold, weight) for fold, weight in zip(folds, without, strict=True))
            trials.append(_Trial(max(error, rounding), prior, strength, without))
        found = min(trials, key=lambda trial: trial.error)
        if best is not None and (found.error > best.error or best.error <= rounding):
            break
        best = found
    assert best is not None
    return best


def _error(held_out: Moments, rest: Moments, weight: Tensor) -> float:
    """Squared error on the held-out fold of a weight that was fitted on the rest."""
    xx, xy, yy = held_out.centred()
    inside = yy - 2 * (weight * xy.mT).sum(dim=-1) + ((weight @ xx) * weight).sum(dim=-1)
    if not held_out.affine:
        return float(inside.sum())
    gap = (held_out.y - _times(weight, held_out.x)) / held_out.n - (rest.y - _times(weight, rest.x)) / rest.n
    return float((inside + held_out.n * gap.square()).sum())


def _times(weight: Tensor, x: Tensor) -> Tensor:
    return (weight @ x[..., None])[..., 0]
