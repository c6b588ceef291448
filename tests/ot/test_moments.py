"""Closed-form moments of activations against samples, and the properties that do not depend on samples."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from intrafusion.ot.moments import activation_moments, cross_covariance, expand

ACTIVATIONS = [torch.relu, F.leaky_relu, F.relu6, F.gelu, F.silu, torch.tanh, torch.sigmoid, F.hardswish, F.elu]
SAMPLES = 400_000


def correlated(n: int, factors: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """mean [n], std [n], correlation [n, n] and mixing [n, factors] of strongly correlated Gaussians."""
    mixing = torch.randn(n, factors, dtype=torch.float64)
    mean, std = 0.7 * torch.randn(n, dtype=torch.float64), mixing.norm(dim=1)
    unit = mixing / std[:, None]
    return mean, std, unit @ unit.T, mixing


def paired(count: int, size: int) -> torch.Tensor:
    """Standard normal samples whose mean is 0 and whose covariance is 1 exactly: less noise for the same count."""
    x = torch.randn(count // 2, size, dtype=torch.float64)
    x = torch.cat([x, -x])
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / len(x))).T


@pytest.mark.parametrize("f", ACTIVATIONS, ids=lambda f: f.__name__)
def test_moments_agree_with_samples(f):
    mean, std, rho, mixing = correlated(8, 3)
    h = f(mean + paired(SAMPLES, 3) @ mixing.T)
    expected_mean, expected_cov = activation_moments(mean, std, rho, f)
    scale = h.std(dim=0)
    assert ((h.mean(dim=0) - expected_mean).abs() < 0.01 * scale).all()
    assert ((torch.cov(h.T) - expected_cov).abs() < 0.01 * torch.outer(scale, scale)).all()


def propagated(inputs: int, depth: int, f) -> tuple[float, float]:
    """Relative error of the mean and of the covariance behind `depth` random layers of 128 channels."""
    x = paired(20_000, inputs).float()
    mean, cov = torch.zeros(inputs, dtype=torch.float64), torch.eye(inputs, dtype=torch.float64)
    for _ in range(depth):
        weight = torch.randn(128, x.shape[1]) * (2 / x.shape[1]) ** 0.5
        bias = 0.2 * torch.randn(128)
        x = f(x @ weight.T + bias)
        w = weight.double()
        mean, cov = w @ mean + bias.double(), w @ cov @ w.T
        std = cov.diagonal().sqrt()
        mean, cov = activation_moments(mean, std, cov / torch.outer(std, std), f)
    sampled_mean, sampled_cov = x.double().mean(dim=0), torch.cov(x.double().T)
    return float((sampled_mean - mean).norm() / mean.norm()), float((sampled_cov - cov).norm() / cov.norm())


@pytest.mark.parametrize("f", [torch.relu, F.gelu], ids=["relu", "gelu"])
def test_moments_carry_through_a_random_network(f):
    """From the second layer on, inputs are only nearly Gaussian: the mean is right to 2 %, the covariance to 30 %.

    That this is the assumption and not the formula shows in one layer, and in the error that falls with more inputs.
    """
    mean, cov = propagated(256, 1, f)
    assert mean < 0.005
    assert cov < 0.05  # the noise of 20,000 samples
    mean, cov = propagated(256, 4, f)
    assert mean < 0.02
    assert cov < 0.3
    assert propagated(8, 2, f)[1] > 2 * propagated(128, 2, f)[1]


def test_a_linear_function_is_exact():
    mean, std, rho, mixing = correlated(7, 4)
    got_mean, got_cov = activation_moments(mean, std, rho, lambda z: 3 * z - 1)
    torch.testing.assert_close(got_mean, 3 * mean - 1)
    torch.testing.assert_close(got_cov, 9 * mixing @ mixing.T)


@pytest.mark.parametrize("f", ACTIVATIONS, ids=lambda f: f.__name__)
def test_the_result_is_a_covariance_and_equal_channels_have_equal_rows(f):
    mean, std, rho, _ = correlated(6, 2)
    twice = torch.arange(6).repeat(2)
    got_mean, got = activation_moments(mean[twice], std[twice], rho[twice][:, twice], f)
    assert torch.linalg.eigvalsh(got).min() > -1e-10 * got.diagonal().max()
    torch.testing.assert_close(got[:6], got[6:])
    torch.testing.assert_close(got_mean[:6], got_mean[6:])
    _, alone = activation_moments(mean, std, torch.eye(6), f)
    torch.testing.assert_close(got.diagonal()[:6], alone.diagonal())


def test_the_exact_relu_is_the_integrated_one():
    mean = torch.linspace(-5, 5, 21).double()
    exact = expand(mean, torch.full_like(mean, 1.3), torch.relu)
    integrated = expand(mean, torch.full_like(mean, 1.3), lambda z: z.clamp(min=0))
    torch.testing.assert_close(exact.mean, integrated.mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(exact.var, integrated.var, atol=1e-4, rtol=0)
    torch.testing.assert_close(exact.coefficients, integrated.coefficients, atol=1e-4, rtol=0)


@pytest.mark.parametrize("f", [torch.relu, F.gelu, torch.tanh], ids=lambda f: f.__name__)
def test_constant_and_dead_channels_and_perfect_correlation_give_numbers(f):
    mean = torch.tensor([0.0, 2.0, -2.0, -500.0, 500.0, 1.0])
    std = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    for sign in (-1.0, 1.0):
        got_mean, got = activation_moments(mean, std, torch.full((6, 6), sign), f)
        assert torch.isfinite(got_mean).all()
        assert torch.isfinite(got).all()
        assert (got[:3] == 0).all()
        torch.testing.assert_close(got_mean[:3], f(mean[:3].double()))
        assert (got.diagonal() >= 0).all()


def test_moments_between_two_sets():
    mean, std, rho, mixing = correlated(8, 3)
    z = mean + paired(SAMPLES, 3) @ mixing.T
    x, y = torch.relu(z[:, :5]), torch.tanh(z[:, 5:])
    sampled = (x - x.mean(0)).T @ (y - y.mean(0)) / len(z)
    got = cross_covariance(expand(mean[:5], std[:5], torch.relu), expand(mean[5:], std[5:], torch.tanh), rho[:5, 5:])
    assert ((sampled - got).abs() < 0.01 * torch.outer(x.std(0), y.std(0))).all()
