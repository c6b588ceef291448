"""The training loop: what its settings mean, and that an interruption changes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from intrafusion.training.loop import DivergedError, fit_
from intrafusion.training.settings import Training, lr_factor

QUICK = Training(epochs=3, lr=0.05)


class Net(nn.Module):
    """A convolution, a batch-norm, a dropout and a linear layer."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)
        self.drop, self.fc = nn.Dropout(dropout), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(F.relu(self.bn(self.conv(x))).mean((2, 3))))


def images(count: int = 24) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 2, 5, 5, generator=generator)
    return TensorDataset(x, (x.mean((1, 2, 3)) * 20).round().long() % 3)


def loader(batch_size: int = 8, shuffle: bool = True) -> DataLoader:
    return DataLoader(images(), batch_size, shuffle=shuffle)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def close(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.allclose(left[name], right[name], atol=1e-6) for name in left)


def trained(training: Training = QUICK, model: nn.Module | None = None, **arguments: Any) -> dict[str, Tensor]:
    model = model or Net()
    fit_(model, arguments.pop("batches", None) or loader(), training, progress=False, **arguments)
    return state(model)


class Interrupted(Exception):
    """A power cut."""


def scores(model: nn.Module, epoch: int) -> dict[str, float]:
    return {"validation": -float(model.fc.weight.detach().square().sum()) * (-1) ** epoch}


@pytest.mark.parametrize(
    "training",
    [
        QUICK,
        replace(QUICK, optimizer="adam", schedule="step"),
        replace(QUICK, optimizer="adamw", ema=0.8, accumulate=2),
        replace(QUICK, amp="bf16", channels_last=True, warmup_epochs=0.5, clip_norm=1.0),
    ],
    ids=lambda training: training.optimizer + training.amp,
)
@pytest.mark.parametrize("at", [1, 2])
def test_an_interrupted_training_ends_bit_for_bit_where_a_whole_one_does(
    training: Training, at: int, tmp_path: Path
) -> None:
    whole = Net()
    expected = fit_(whole, loader(), training, evaluation=scores, progress=False)

    def interrupted(model: nn.Module, epoch: int) -> dict[str, float]:
        if epoch == at + 1:
            raise Interrupted
        return scores(model, epoch)

    path = tmp_path / "c.pt"
    with pytest.raises(Interrupted):
        fit_(Net(), loader(), training, evaluation=interrupted, checkpoint=path, progress=False)
    torch.rand(7)  # another process has another random state
    seen: list[int] = []

    def watched(model: nn.Module, epoch: int) -> dict[str, float]:
        seen.append(epoch)
        return scores(model, epoch)

    model = Net()
    history = fit_(model, loader(), training, evaluation=watched, checkpoint=path, progress=False)
    assert seen == list(range(at + 1, 4))
    assert history == expected
    assert same(state(model), state(whole))
    seen.clear()
    again = Net()
    assert fit_(again, loader(), training, evaluation=watched, checkpoint=path, progress=False) == expected
    assert seen == []
    assert same(state(again), state(whole))


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda _: b"", lambda _: b"no file"])
def test_a_damaged_checkpoint_is_a_warning_and_a_new_start(damage: Any, tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    expected = trained(checkpoint=path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=r"c\.pt is damaged .*: training starts over"):
        assert same(trained(checkpoint=path), expected)


@pytest.mark.parametrize("change", ["settings", "weights", "key", "batches"])
def test_a_checkpoint_of_another_training_is_not_used(change: str, tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    trained(checkpoint=path)
    model = Net()
    if change == "weights":
        model.fc.weight.data += 1
    arguments = {
        "training": replace(QUICK, lr=0.01) if change == "settings" else QUICK,
        "batches": loader(6) if change == "batches" else None,
        "key": "other" if change == "key" else "",
    }
    before = state(model)
    found = trained(model=model, checkpoint=path, **arguments)
    fresh = Net()
    fresh.load_state_dict(before)
    assert same(found, trained(model=fresh, **arguments))


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (exec, ("raise SystemExit('code ran')",))

    torch.save({"key": "x", "state": Evil()}, tmp_path / "c.pt")
    with pytest.warns(UserWarning, match="damaged"):
        trained(checkpoint=tmp_path / "c.pt")


def test_the_seed_decides_order_and_dropout_and_the_global_state_is_left_alone() -> None:
    model, first = Net(), trained()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert same(trained(model=model), first)
    assert torch.equal(torch.rand(3), expected)
    assert not same(trained(replace(QUICK, seed=1)), first)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_accumulated_gradients_make_the_update_of_the_big_batch(optimizer: Any, clip_norm: float | None) -> None:
    def without_norm() -> nn.Module:
        model = Net(dropout=0.0)
        model.bn = nn.Identity()
        return model

    settings = replace(QUICK, optimizer=optimizer, clip_norm=clip_norm, lr=0.01)
    big = trained(settings, without_norm(), batches=loader(20, shuffle=False))
    # 20 and 4 images: the last group is a smaller one, and its images count as much as all others
    small = trained(replace(settings, accumulate=5), without_norm(), batches=loader(4, shuffle=False))
    assert close(big, small)
    assert not close(big, state(without_norm()))


def test_training_is_torchs_own_optimizer_and_schedule() -> None:
    model, batches = Net(dropout=0.0), list(loader(shuffle=False))
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=0.0005, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
    for _ in range(3):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model.train()(x), y).backward()
            optimizer.step()
            schedule.step()
    assert close(trained(QUICK, Net(dropout=0.0), batches=batches), state(model))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "step", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 1.5])
def test_the_learning_rate_rises_then_never_rises_again(schedule: Any, warmup: float) -> None:
    training = Training(epochs=4, schedule=schedule, warmup_epochs=warmup)
    factors = [lr_factor(training, step, 10) for step in range(40)]
    warm = int(warmup * 10)
    assert factors[:warm] == sorted(factors[:warm])
    assert factors[warm:] == sorted(factors[warm:], reverse=True)
    assert factors[warm] == 1
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[-1] == pytest.approx({"cosine": 0.0, "linear": 0.0, "step": 0.01, "constant": 1}[schedule], abs=0.05)


class Watched(list):
    """Batches that note the network's state before each is used."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(loader(shuffle=False))
        self.model, self.seen = model, []

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            self.seen.append(state(self.model))
            yield batch


def test_the_moving_average_is_the_recursion_of_its_definition() -> None:
    model, decay = Net(dropout=0.0), 0.7
    batches = Watched(model)
    trained(QUICK, model, batches=batches)
    mean, *rest = [*batches.seen, state(model)]
    assert len(rest) == 9
    for current in rest:
        for name, tensor in current.items():
            mean[name] = decay * mean[name] + (1 - decay) * tensor if tensor.is_floating_point() else tensor
    found = trained(replace(QUICK, ema=decay), Net(dropout=0.0), batches=loader(shuffle=False))
    assert close(found, mean)
    assert not close(found, state(model))


def test_mixed_precision_and_memory_format_change_little_and_leave_no_trace() -> None:
    plain = trained(QUICK, Net(dropout=0.0))
    for changed in (replace(QUICK, channels_last=True), replace(QUICK, amp="bf16")):
        model = Net(dropout=0.0)
        found = trained(changed, model)
        assert all(torch.allclose(found[name].float(), plain[name].float(), atol=0.05) for name in plain)
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        assert model.conv.weight.is_contiguous()


def test_the_best_validation_epoch_is_kept_and_of_equals_the_last() -> None:
    values, states = [1.0, 3.0, 2.0, 3.0, 0.0], []

    def evaluation(model: nn.Module, epoch: int) -> dict[str, float]:
        assert not model.training
        states.append(state(model))
        return {"validation": values[epoch], "test": 10.0 * epoch}

    model = Net()
    history = fit_(model, loader(), replace(QUICK, epochs=4), evaluation=evaluation, progress=False)
    assert history.best == 3
    assert same(state(model), states[3])
    assert not model.training
    assert history.validation == tuple(values)
    assert len(history.losses) == 4
    assert [score["test"] for score in history.scores] == [0.0, 10.0, 20.0, 30.0, 40.0]


def test_frozen_parameters_stay() -> None:
    model = Net()
    model.conv.weight.requires_grad_(False)
    before = model.conv.weight.clone()
    trained(model=model)
    assert torch.equal(model.conv.weight, before)
    assert not model.conv.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_errors_name_the_setting() -> None:
    for change, message in (
        ({"epochs": 0}, r"epochs is 0: it must be at least 1"),
        ({"lr": math.nan}, r"lr is nan: it must be above 0"),
        ({"optimizer": "lamb"}, r"optimizer is 'lamb': it must be sgd, adam or adamw"),
        ({"warmup_epochs": 3.0}, r"warmup_epochs is 3\.0: it must be at least 0 and below epochs"),
        ({"amp": "off"}, r"amp is 'off': it must be none, bf16 or fp16"),
        ({"ema": 1.0}, r"ema is 1\.0"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(QUICK, **change)
    with pytest.raises(ValueError, match="needs a GPU"):
        trained(replace(QUICK, amp="fp16"))
    with pytest.raises(ValueError, match="no training batches"):
        fit_(Net(), [], QUICK, progress=False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        fit_(Net().requires_grad_(False), loader(), QUICK, progress=False)
    with pytest.raises(DivergedError, match=r"diverged in epoch \d \(loss .*\); lower lr \(1e\+30\)"):
        trained(replace(QUICK, lr=1e30, momentum=0.0))
