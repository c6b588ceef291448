"""Means and covariances of h = f(z) for Gaussian z, in closed form: data-free statistics of a layer of activations.

With z_i = mean_i + std_i·u_i and the normalised Hermite polynomials h_m = He_m / sqrt(m!), which are orthonormal under
the standard normal law (Mehler's formula; Daniely, Frostig & Singer 2016, section 4):

    f(z_i) = sum_m a_im h_m(u_i),        cov(f(z_i), f(z_j)) = sum_{m >= 1} a_im a_jm corr(u_i, u_j)^m.

What the first `_TERMS` terms leave of a channel's variance (below 0.3 % for a ReLU with |mean| <= std) is known
exactly, and is spent on one more power of the correlation. So variances are exact, two equal channels have equal rows,
and the result is positive semi-definite whenever the correlation is (Schur product theorem).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_TERMS = 32
_REACH, _STEP = 15.0, 1 / 64
_STEEPEST = 30.0
"""Beyond this many standard deviations from its kink a ReLU is linear or dead in float64."""


@dataclass(frozen=True)
class Expansion:
    """f(z) of n channels: mean [n], var [n], coefficients a_1, a_2, ... [n, terms], rest [n] = var - sum of squares."""

    mean: Tensor
    var: Tensor
    coefficients: Tensor
    rest: Tensor


def activation_moments(
    mean: Tensor, std: Tensor, correlation: Tensor, f: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Mean [n] and covariance [n, n] of f(z) for Gaussian z, in float64.

    mean, std: [n] of z, correlation: [n, n]. f: any pointwise function; it is called on [n, points], so that it may
    hold one parameter per channel. `torch.relu` and `F.relu` are exact, others are integrated numerically.
    """
    expansion = expand(mean, std, f)
    covariance = cross_covariance(expansion, expansion, correlation)
    covariance.diagonal().copy_(expansion.var)
    return expansion.mean, covariance


def cross_covariance(x: Expansion, y: Expansion, correlation: Tensor) -> Tensor:
    """[n, k] covariance of f(x_i) and g(y_j) for jointly Gaussian x [n] and y [k]; correlation: [n, k] of x and y."""
    rho = correlation.double().clamp(-1, 1)
    power, total = rho, torch.zeros_like(rho)
    for a, b in zip(x.coefficients.unbind(1), y.coefficients.unbind(1), strict=True):
        total = torch.addcmul(total, a[:, None] * b, power)
        power = power * rho
    return torch.addcmul(total, x.rest.sqrt()[:, None] * y.rest.sqrt(), power)


def expand(mean: Tensor, std: Tensor, f: Callable[[Tensor], Tensor]) -> Expansion:
    """The Hermite expansion of f(mean + std·u), u standard normal. mean, std: [n]; std 0 is a constant channel."""
    mean, std = mean.double(), std.double()
    average, var, coefficients = _relu(mean, std) if f in (torch.relu, F.relu) else _integrate(mean, std, f)
    constant = std == 0
    var = torch.where(constant, 0.0, var.clamp(min=0))
    coefficients = torch.where(constant[:, None], 0.0, coefficients)
    return Expansion(average, var, coefficients, (var - coefficients.square().sum(dim=1)).clamp(min=0))


def _relu(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a_0 = E relu(z), a_1 = std Φ(t), a_m = std He_{m-2}(-t) φ(t) / sqrt(m!), with t = mean / std."""
    t = (mean / torch.where(std == 0, 1e-300, std)).clamp(-_STEEPEST, _STEEPEST)
    below, density = torch.special.ndtr(t), torch.exp(-t.square() / 2) / math.sqrt(2 * math.pi)
    average = torch.where(std == 0, mean.clamp(min=0), mean * below + std * density)
    second = (mean.square() + std.square()) * below + mean * std * density
    orders = torch.arange(2, _TERMS + 1, dtype=t.dtype, device=t.device)
    higher = (std * density)[:, None] * _hermite(-t, _TERMS - 1) / (orders * (orders - 1)).sqrt()
    return average, second - average.square(), torch.cat([(std * below)[:, None], higher], dim=1)


def _integrate(mean: Tensor, std: Tensor, f: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """By the trapezoidal rule on a fine grid.

    For a smooth f and a Gaussian weight its error is beyond float64, as that of Gauss-Hermite quadrature; at a kink it
    is step²/12 times the change of slope, where Gauss-Hermite is far worse.
    """
    points = torch.arange(-_REACH, _REACH + _STEP, _STEP, dtype=torch.float64, device=mean.device)
    weights = _STEP * torch.exp(-points.square() / 2) / math.sqrt(2 * math.pi)
    values = f(mean[:, None] + std[:, None] * points)
    average = values @ weights
    centred = values - average[:, None]
    polynomials = _hermite(points, _TERMS + 1)[:, 1:]
    return average, centred.square() @ weights, centred @ (weights[:, None] * polynomials)


def _hermite(x: Tensor, count: int) -> Tensor:
    """[n, count] normalised Hermite polynomials of order 0, 1, ..., count - 1 at x [n]."""
    columns = [torch.ones_like(x), x]
    for m in range(1, count - 1):
        columns.append((x * columns[m] - math.sqrt(m) * columns[m - 1]) / math.sqrt(m + 1))
    return torch.stack(columns[:count], dim=1)
