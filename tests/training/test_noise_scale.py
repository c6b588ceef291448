"""The noise of the gradient: against covariances that are known, the theory of SGD, and a training without it."""

from __future__ import annotations

import json
import logging
import random
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from intrafusion.training.finetuning import finetune
from intrafusion.training.loop import fit_
from intrafusion.training.noise_scale import NoiseHistory, NoisyEpoch, gradient_trace, held_out_batches, noise_scale
from intrafusion.training.settings import Training
from tests.training.test_loop import QUICK, Interrupted, Net, images, loader, same, scores, state


def half_square(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    return (model(inputs).squeeze(1) - labels).square().mean() / 2


def regression(count: int) -> tuple[nn.Module, Tensor, Tensor, float]:
    """A linear model, its images and the trace of the covariance of their gradients, (w x - y) [x, 1], with n - 1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(count, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    residual = (model(x).squeeze(1) - y).detach()
    gradients = residual[:, None] * torch.cat([x, torch.ones(count, 1)], dim=1)
    return model, x, y, float(torch.cov(gradients.T).trace())


def test_with_batches_of_one_image_the_trace_is_that_of_the_sample_covariance() -> None:
    model, x, y, exact = regression(12)
    found = gradient_trace(model, list(zip(x.split(1), y.split(1), strict=True)), half_square)
    assert found == pytest.approx(exact, rel=1e-12)


def test_over_all_partitions_into_batches_the_mean_estimate_is_exact() -> None:
    """Unbiased: six images in three batches of two, in every way there is."""
    model, x, y, exact = regression(6)
    ways = {frozenset(frozenset(order[i : i + 2]) for i in (0, 2, 4)) for order in permutations(range(6))}
    assert len(ways) == 15
    found = [gradient_trace(model, [(x[list(pair)], y[list(pair)]) for pair in way], half_square) for way in ways]
    assert sum(found) / len(found) == pytest.approx(exact, rel=1e-12)
    assert max(found) > 1.1 * exact  # each alone is not


def classes(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs), labels)


def three_batches(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    x, y = images().tensors
    kind = next(model.parameters()).dtype
    return list(zip(x[:12].to(kind).split(4), y[:12].split(4), strict=True))


def test_it_is_what_small_and_large_batches_give() -> None:
    """McCandlish et al. (2018), equation A.2: (|G_small|² - |G_big|²) / (1/B_small - 1/B_big)."""
    model = Net().double()
    batches = three_batches(model)
    model.eval()

    def square(inputs: Tensor, labels: Tensor) -> float:
        model.zero_grad()
        classes(model, inputs, labels).backward()
        return sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)

    small = sum(square(*batch) for batch in batches) / 3
    large = square(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    assert gradient_trace(model, batches, classes) == pytest.approx((small - large) / (1 / 4 - 1 / 12), rel=1e-9)


def test_equal_images_have_no_noise_and_a_loss_twice_as_large_four_times_as_much() -> None:
    model = Net().double()
    batches = three_batches(model)
    assert gradient_trace(model, [batches[0]] * 3, classes) == pytest.approx(0, abs=1e-9)
    once = gradient_trace(model, batches, classes)
    twice = gradient_trace(model, batches, lambda *given: 2 * classes(*given))
    assert twice == pytest.approx(4 * once)


def test_measuring_leaves_gradients_buffers_modes_and_random_states_alone() -> None:
    model = Net()
    model.train()
    model.bn.eval()
    model.conv.bias = None  # of those that are trained
    model.fc.bias.requires_grad_(False)
    unused = nn.Parameter(torch.ones(2))
    model.register_parameter("unused", unused)
    classes(model, *three_batches(model)[0]).backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    before, modes, chance = state(model), [m.training for m in model.modules()], torch.get_rng_state()
    assert gradient_trace(model, three_batches(model), classes) > 0
    assert same(state(model), before)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), chance)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is None) if gradient is None else torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize("sizes", [(4,), (4, 3)])
def test_batches_must_be_several_of_one_size(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least 2 batches of one size"):
        gradient_trace(Net(), [images()[:size] for size in sizes], classes)


@pytest.mark.parametrize(("given", "found"), [([100], [16] * 4), ([5, 5, 3], [3] * 4), ([2, 1], [])])
def test_held_out_batches_are_equal_and_small(given: list[int], found: list[int]) -> None:
    x = torch.arange(sum(given))
    batches = held_out_batches(zip(x.split(given), x.split(given), strict=True))
    assert [len(labels) for _, labels in batches] == found
    if found:
        assert torch.equal(torch.cat([labels for _, labels in batches]), x[: sum(found)])


class Restless(Dataset):
    """Images whose reading draws from every random state there is."""

    def __init__(self) -> None:
        self.images = images()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.images[index]
        return x + random.random() + float(np.random.rand()) + torch.rand(1), y


@pytest.mark.parametrize(
    "training",
    [QUICK, replace(QUICK, optimizer="adamw", ema=0.8, accumulate=2), replace(QUICK, amp="bf16", channels_last=True)],
    ids=["sgd", "adamw", "bf16"],
)
@pytest.mark.parametrize("own", [False, True])
def test_training_is_bit_for_bit_the_same_with_and_without_the_measurement(training: Training, own: bool) -> None:
    ends, histories, states = [], [], []
    for measured in (False, True):
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)
        generator = torch.Generator().manual_seed(5) if own else None
        batches = DataLoader(Restless(), 5, shuffle=True, generator=generator)
        model = Net()
        held_out = batches if measured else None
        histories.append(fit_(model, batches, training, evaluation=scores, held_out=held_out, progress=False))
        ends.append(state(model))
        states.append((torch.rand(3).tolist(), random.random(), np.random.rand()))
    assert same(*ends)
    assert states[0] == states[1]
    assert (histories[0].losses, histories[0].scores) == (histories[1].losses, histories[1].scores)
    traces = [[epoch.trace for epoch in history.noise.epochs] for history in histories if history.noise]
    assert traces[0] == [None] * 3
    assert all(trace > 0 for trace in traces[1])


def test_an_interrupted_training_has_the_record_of_a_whole_one(tmp_path: Path) -> None:
    def interrupted(model: nn.Module, epoch: int) -> dict[str, float]:
        if epoch == 2:
            raise Interrupted
        return scores(model, epoch)

    expected = fit_(Net(), loader(), QUICK, evaluation=scores, held_out=loader(), progress=False)
    arguments: dict[str, Any] = {"held_out": loader(), "checkpoint": tmp_path / "c.pt", "progress": False}
    with pytest.raises(Interrupted):
        fit_(Net(), loader(), QUICK, evaluation=interrupted, **arguments)
    torch.rand(7)
    assert fit_(Net(), loader(), QUICK, evaluation=scores, **arguments) == expected


def test_a_file_of_an_older_version_is_gone_on_from(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    fit_(Net(), loader(), QUICK, checkpoint=path, progress=False)
    content = torch.load(path, weights_only=True)
    del content["state"]["noise"]
    torch.save(content, path)
    assert fit_(Net(), loader(), QUICK, checkpoint=path, progress=False).noise is None


def test_what_is_recorded_is_the_learning_rate_over_batch_and_momentum() -> None:
    constant = Training(epochs=2, lr=0.05, schedule="constant", momentum=0.9)

    def recorded(training: Training, size: int) -> NoiseHistory:
        noise = fit_(Net(), loader(size), training, progress=False).noise
        assert noise is not None
        return noise

    noise = recorded(constant, 8)
    assert (noise.definition, noise.weight_decay) == ("lr / (batch (1 - momentum))", 0.0005)
    for epoch, number in zip(noise.epochs, (1, 2), strict=True):
        assert epoch.epoch == number
        assert epoch.lr == pytest.approx(0.05)
        assert epoch.scale == pytest.approx(0.05 / (8 * 0.1))
    # 24 images in batches of 20 and 4; then two batches of 8 to an update, and the last one alone
    for training, size, batches in ((constant, 20, (20, 4)), (replace(constant, accumulate=2), 8, (16, 8))):
        expected = sum(0.05 / (images * 0.1) for images in batches) / 2
        assert recorded(training, size).epochs[0].scale == pytest.approx(expected)
    adam = recorded(replace(constant, optimizer="adamw"), 8)
    assert adam.definition == "lr / batch"
    assert adam.epochs[0].scale == pytest.approx(0.05 / 8)
    assert [epoch.lr for epoch in recorded(replace(constant, schedule="linear"), 24).epochs] == [0.05, 0.025]


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_the_stationary_variance_of_sgd_follows_the_first_power_of_one_minus_momentum(momentum: float) -> None:
    """On a quadratic a w² / 2 it is noise scale x variance / (2 a), in the limit of small steps; see docs."""
    training = Training(lr=0.02 * (1 - momentum), momentum=momentum, epochs=1)
    slope, variance, batch = 0.5, 4.0, 8
    w = nn.Parameter(torch.zeros(20_000, dtype=torch.float64))
    optimizer = torch.optim.SGD([w], training.lr, momentum, nesterov=momentum > 0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        noise = torch.randn(len(w), generator=generator, dtype=torch.float64) * (variance / batch) ** 0.5
        w.grad = slope * w.detach() + noise
        optimizer.step()
    expected = noise_scale(training, training.lr, batch) * variance / (2 * slope)
    assert float(w.detach().var()) == pytest.approx(expected, rel=0.05)


def test_a_measurement_that_fails_ends_no_training(caplog: pytest.LogCaptureFixture) -> None:
    def only_in_training(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        if not model.training:
            raise RuntimeError("cudnn RNN backward can only be called in training mode")
        return classes(model, inputs, labels)

    with caplog.at_level(logging.WARNING, logger="intrafusion"):
        history = fit_(Net(), loader(), QUICK, objective=only_in_training, held_out=loader(), progress=False)
    assert [record.message for record in caplog.records] == [
        "the gradient's noise is not measured: cudnn RNN backward can only be called in training mode"
    ]
    assert history.noise is not None
    assert [epoch.trace for epoch in history.noise.epochs] == [None] * 3


def test_fine_tuning_measures_on_the_validation_images() -> None:
    plain = finetune(Net(), loader(), epochs=1, progress=False).noise
    measured = finetune(Net(), loader(), epochs=1, validation=loader(), progress=False).noise
    assert plain is not None
    assert measured is not None
    assert plain.epochs[0].trace is None
    assert measured.epochs[0].trace is not None


def test_a_record_survives_json() -> None:
    noise = NoiseHistory("lr / batch", 0.1, "flip", (NoisyEpoch(1, 0.1, 0.01, 3.5), NoisyEpoch(2, 0.05, 0.005)))
    assert NoiseHistory.from_plain(json.loads(json.dumps(noise.plain()))) == noise
