"""Ridge regression from sums, and the search for rows."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import Ridge

from intrafusion.ot.regression import Moments, Prior, ridge
from intrafusion.ot.rows import Samples, match_spread, optimise_rows


def data(n=400, d=6, m=3, noise=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) + 2
    weight = torch.randn(m, d, generator=generator, dtype=torch.float64)
    y = x @ weight.T + 5 + noise * torch.randn(n, m, generator=generator, dtype=torch.float64)
    return x, y, weight


def folds(x, y):
    return [Moments.of(x[::2], y[::2]), Moments.of(x[1::2], y[1::2])]


def test_an_affine_map_is_recovered_with_its_bias():
    x, y, weight = data()
    fit = ridge(folds(x, y), Prior(torch.zeros_like(weight)))
    assert torch.allclose(fit.weight, weight, atol=1e-3)
    assert torch.allclose(fit.bias, torch.full((3,), 5.0).double(), atol=1e-2)
    assert fit.unexplained < 1e-6
    assert torch.allclose(fit.mean, y.mean(dim=0))
    assert torch.allclose(fit.std, y.std(dim=0, correction=0), rtol=1e-3)


def test_the_solution_is_scikit_learns_at_the_ridge_that_was_chosen():
    x, y, weight = data(noise=1.0)
    fit = ridge(folds(x, y), Prior(torch.zeros_like(weight)))
    strength = fit.ridge * (x - x.mean(dim=0)).square().sum(dim=0).mean().item()
    oracle = Ridge(alpha=strength).fit(x.numpy(), y.numpy())
    assert torch.allclose(fit.weight, torch.from_numpy(oracle.coef_), atol=1e-8)
    assert torch.allclose(fit.bias, torch.from_numpy(oracle.intercept_), atol=1e-8)


def test_few_noisy_samples_stay_near_the_prior_and_many_do_not():
    x, y, weight = data(n=8, noise=30.0)
    strong = ridge(folds(x, y), Prior(weight + 0.1))
    x, y, truth = data(n=4000, noise=0.1)
    weak = ridge(folds(x, y), Prior(truth + 0.1))
    assert strong.ridge > weak.ridge
    assert (strong.weight - weight - 0.1).abs().mean() < 2.0
    assert torch.allclose(weak.weight, truth, atol=0.01)


def test_problems_side_by_side_share_the_ridge_and_nothing_else():
    xs, ys, _ = zip(*(data(noise=0.5, seed=seed) for seed in range(3)), strict=True)
    x, y = torch.stack(xs), torch.stack(ys)
    sums = [Moments.of(x[:, ::2], y[:, ::2]), Moments.of(x[:, 1::2], y[:, 1::2])]
    together = ridge(sums, Prior(torch.zeros(3, 3, 6, dtype=torch.float64)))
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        strength = together.ridge * (x - x.mean(dim=0)).square().sum(dim=0).mean().item()
        oracle = Ridge(alpha=strength).fit(x.numpy(), y.numpy())
        assert torch.allclose(together.weight[i], torch.from_numpy(oracle.coef_), atol=1e-8)
        assert torch.allclose(together.bias[i], torch.from_numpy(oracle.intercept_), atol=1e-8)


@pytest.mark.parametrize("affine", [True, False])
def test_a_sample_that_counts_three_times_is_three_samples(affine):
    x, y, times = torch.randn(40, 5), torch.randn(40, 2), torch.randint(1, 4, (40,))
    weighted = Moments.of(x, y, times, affine=affine)
    plain = Moments.of(x.repeat_interleave(times, 0), y.repeat_interleave(times, 0), affine=affine)
    assert weighted.n == pytest.approx(plain.n)
    for one, other in zip(weighted.centred(), plain.centred(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_sums_add_up_however_the_samples_are_batched():
    x, y, _ = data()
    whole, parts = Moments.of(x, y), Moments.of(x[:150], y[:150]) + Moments.of(x[150:], y[150:])
    assert all(torch.allclose(a, b) for a, b in zip(whole.centred(), parts.centred(), strict=True))
    rest = whole - Moments.of(x[:150], y[:150])
    assert rest.n == 250


@pytest.mark.parametrize("kind", ["constant", "duplicate", "dead"])
def test_inputs_that_say_nothing_give_no_nan(kind):
    x, y, weight = data()
    x[:, 1] = {"constant": 3.0, "duplicate": x[:, 0], "dead": 0.0}[kind]
    fit = ridge(folds(x, y), Prior(torch.zeros_like(weight)))
    assert torch.isfinite(fit.weight).all()
    assert torch.isfinite(fit.bias).all()
    nothing = ridge(folds(torch.zeros_like(x), y), Prior(torch.zeros_like(weight)))
    assert torch.isfinite(nothing.weight).all()
    assert torch.allclose(nothing.bias, y.mean(dim=0))


def group(n=12, k=6, samples=2000, seed=0):
    """Pre-activations of n channels of which the second half repeats the first."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(samples, n // 2, generator=generator)
    z = torch.cat([half, half], dim=1)
    held_out = torch.arange(samples) % 4 == 3
    return z, Samples(z, torch.relu(z), torch.relu, torch.eye(n), held_out)


def error(rows, shift, z, h):
    merged = torch.relu(z.double() @ rows.T + shift)
    design = torch.cat([merged, torch.ones(len(z), 1)], dim=1)
    return (h.double() - design @ torch.linalg.lstsq(design, h.double()).solution).square().mean().item()


def test_rows_find_the_channels_from_which_the_rest_is_rebuilt():
    """Only half of the kept rows carry information at the start; the search finds the missing ones."""
    z, reader = group()
    rows = torch.zeros(6, 12, dtype=torch.float64)
    rows[torch.arange(6), torch.tensor([0, 6, 1, 7, 2, 8])] = 1.0
    rows += 0.05 * torch.randn(6, 12, generator=torch.Generator().manual_seed(1))
    shift = torch.zeros(6, dtype=torch.float64)
    better, moved = optimise_rows(rows, shift, [reader])
    assert error(better, moved, z, reader.h) < 0.35 * error(rows, shift, z, reader.h)


def test_rows_that_are_right_already_stay_right():
    z, reader = group()
    rows = torch.eye(6, 12, dtype=torch.float64)
    better, moved = optimise_rows(rows, torch.zeros(6, dtype=torch.float64), [reader])
    assert error(better, moved, z, reader.h) < 1e-4


def test_without_samples_the_start_is_returned():
    rows, shift = torch.eye(2, 4).double(), torch.zeros(2).double()
    better, moved = optimise_rows(rows, shift, [])
    assert better is rows
    assert moved is shift


def test_constant_channels_do_not_break_the_search():
    z, reader = group()
    z = z.clone()
    z[:, 3] = 0.0
    reader = Samples(z, torch.relu(z), torch.relu, torch.eye(12), reader.held_out)
    better, moved = optimise_rows(torch.eye(6, 12).double(), torch.zeros(6).double(), [reader])
    assert torch.isfinite(better).all()
    assert torch.isfinite(moved).all()


def test_averaged_rows_get_the_spread_and_the_mean_of_their_members():
    z = torch.randn(5000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + torch.arange(4)
    rows = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]).double()
    scaled, shift = match_spread(rows, z.mean(dim=0), torch.cov(z.T))
    new = z @ scaled.T + shift
    assert torch.allclose(new.mean(dim=0), z.mean(dim=0) @ rows.T, atol=1e-9)
    assert torch.allclose(new.std(dim=0), rows @ z.std(dim=0), rtol=1e-6)
