"""A training that prunes its network at some of its steps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from intrafusion import FusionSchedule, IntraFusionPruner, Training
from intrafusion.training import loop
from intrafusion.training.loop import History, fit_

INPUTS = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
BATCHES = [(x, (x.sum(1) > 0).long()) for x in INPUTS.split(10)]


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def train(model: nn.Sequential, *, ema: float | None = None, checkpoint: Path | None = None, **options: Any) -> History:
    """Four epochs of four steps, pruned after steps 3 and 6: in the first and in the second epoch."""
    pruner = IntraFusionPruner(
        model, INPUTS[:2], lambda group: torch.arange(float(len(group[0].idxs))), pruning_ratio=0.5, iterative_steps=2,
        ignored_layers=[model[3]], fusion="paper",
    )  # fmt: skip
    training = Training(epochs=4, lr=0.05, ema=ema, clip_norm=1.0)
    return fit_(
        model, BATCHES, training, checkpoint=checkpoint, progress=False,
        scheduling=lambda optimizer, average: FusionSchedule(pruner, optimizer, at=[3, 6], ema=average), **options,
    )  # fmt: skip


def score(falling: bool):
    return lambda model, epoch: {"validation": float(-epoch if falling else epoch)}


def test_the_network_is_pruned_and_all_of_it_is_trained() -> None:
    model = network()
    history = train(model)
    assert [layer.out_features for layer in (model[0], model[3])] == [4, 2]
    assert history.losses[-1] < history.losses[0]


def test_an_epoch_before_the_last_pruning_is_never_the_best() -> None:
    model = network()
    assert train(model, evaluation=score(falling=True)).best == 2
    assert model[0].out_features == 4
    assert train(network(), evaluation=score(falling=False)).best == 4


@pytest.mark.parametrize("ema", [None, 0.5])
@pytest.mark.parametrize("stop", [5, 10])
def test_stopped_between_two_prunings_or_after_them_it_ends_the_same(
    ema: float | None, stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = network()
    options: dict[str, Any] = {"ema": ema, "evaluation": score(falling=True)}
    expected = train(whole, checkpoint=tmp_path / "whole", **options)
    update, done = loop._Run._update, [0]

    def stopping(self: Any, group: Any) -> float:
        done[0] += 1
        if done[0] == stop:
            raise KeyboardInterrupt
        return update(self, group)

    monkeypatch.setattr(loop._Run, "_update", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(network(), checkpoint=tmp_path / "stopped", **options)
    model = network()
    assert train(model, checkpoint=tmp_path / "stopped", **options) == expected
    assert done[0] - stop <= 12  # the first epoch, whose state is always kept, was not done again
    state = copy.deepcopy(whole.state_dict())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
