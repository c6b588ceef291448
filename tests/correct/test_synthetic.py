"""Synthetic inputs: what `data-free` looks at instead of images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from intrafusion.correct.synthetic import _Gap, _match_statistics_, _was_too_fast, dead_leaves, synthetic_inputs
from tests.nets import Plain, randomise_


def test_synthetic_inputs_are_images_of_the_right_shape_and_reproducible():
    model = randomise_(Plain())

    def make(seed):
        return synthetic_inputs(model, (torch.zeros(2, 3, 8, 8),), lambda m, b: m(*b), seed=seed, progress=False)

    first, again, other = make(0), make(0), make(1)
    assert all(batch[0].shape[1:] == (3, 8, 8) for batch in first)
    assert sum(len(batch[0]) for batch in first) >= 64
    assert torch.equal(first[0][0], again[0][0])
    assert not torch.equal(first[0][0], other[0][0])


def test_synthetic_inputs_agree_better_with_the_batchnorms_than_the_images_they_start_from():
    model = randomise_(Plain())
    model.bn1.running_var *= 9
    start = dead_leaves(125, 3, 8, 8, torch.Generator().manual_seed(0))
    (batch,), *_ = synthetic_inputs(model, (torch.zeros(1, 3, 8, 8),), lambda m, b: m(*b), progress=False)

    def gap(images):
        value = model.conv1(images)
        return ((value.var(dim=(0, 2, 3)) / model.bn1.running_var).sqrt() - 1).square().mean().item()

    assert gap(batch) < 0.8 * gap(start)
    assert all(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_networks_that_do_not_read_images_get_noise_of_their_shape():
    model = nn.Linear(6, 4)
    batches = synthetic_inputs(model, {"input": torch.ones(2, 5, 6)}, lambda m, b: m(**b), progress=False)
    assert batches[0]["input"].shape[1:] == (5, 6)
    assert batches[0]["input"].std().item() == pytest.approx(1.0, abs=0.1)


def test_neighbouring_pixels_of_dead_leaves_are_alike_as_in_natural_images():
    images = dead_leaves(64, 3, 32, 32, torch.Generator().manual_seed(0))
    near = (images[..., 1:] * images[..., :-1]).mean().item()
    far = (images[..., 8:] * images[..., :-8]).mean().item()
    assert near > 0.7
    assert 0.1 < far < near


def test_the_gap_to_a_batchnorm_and_its_gradient_are_those_of_the_plain_formula():
    x = torch.randn(5, 3, 4, 4, dtype=torch.float32, requires_grad=True)
    norm = randomise_(nn.BatchNorm2d(3))
    gap = _Gap.apply(x, norm.running_mean, norm.running_var, norm.eps)
    (found,) = torch.autograd.grad(gap, x)
    spread = (norm.running_var + norm.eps).sqrt()
    std = (x.var(dim=(0, 2, 3), correction=0) + norm.eps).sqrt()
    plain = ((x.mean(dim=(0, 2, 3)) - norm.running_mean) / spread).square().mean() + (std / spread - 1).square().mean()
    torch.testing.assert_close(gap, plain)
    torch.testing.assert_close(found, torch.autograd.grad(plain, x)[0])


@pytest.mark.parametrize("rates", [(20.0, 0.15), (0.15, 20.0)])
def test_a_rate_that_is_too_fast_for_a_network_gives_way_to_the_other_one(rates, monkeypatch):
    model = randomise_(Plain())
    monkeypatch.setattr("intrafusion.correct.synthetic._MATCHED", 0.0)

    def made():
        return synthetic_inputs(model, (torch.zeros(1, 3, 8, 8),), lambda m, b: m(*b), count=150, progress=False)

    monkeypatch.setattr("intrafusion.correct.synthetic._RATES", (0.15, 0.15))
    wanted = made()
    monkeypatch.setattr("intrafusion.correct.synthetic._RATES", rates)
    assert [len(batch) for (batch,) in wanted] == [125, 25]
    assert all(torch.equal(first, second) for (first,), (second,) in zip(wanted, made(), strict=True))


def test_a_slower_rate_is_not_tried_where_the_first_is_slow_already(monkeypatch):
    model = randomise_(Plain())
    monkeypatch.setattr("intrafusion.correct.synthetic._MATCHED", 0.0)
    monkeypatch.setattr("intrafusion.correct.synthetic._RATES", (0.01, 0.003))
    used = []

    def counted(*arguments, given=_match_statistics_):
        used.append(arguments[-1])
        return given(*arguments)

    monkeypatch.setattr("intrafusion.correct.synthetic._match_statistics_", counted)
    synthetic_inputs(model, (torch.zeros(1, 3, 8, 8),), lambda m, b: m(*b), count=150, progress=False)
    assert used == [0.01, 0.01]


@pytest.mark.parametrize(
    ("gaps", "expected"),
    [
        ([19.2, 14.3, 13.0, 13.0, 13.03, 12.8, 12.5], True),  # EfficientNet-Lite0
        ([4.86, 4.75, 4.65, 4.56, 4.49, 4.43], False),  # a network with random weights
        ([4.0], False),
    ],
)
def test_a_rate_was_too_fast_where_less_of_it_closed_more_of_the_gap(gaps, expected):
    assert _was_too_fast(gaps) is expected
