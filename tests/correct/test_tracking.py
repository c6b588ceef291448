"""Batch-norms that no refit sets: training mode starts from the function of eval mode for them too."""

from __future__ import annotations

import copy

import pytest
import torch
import torch_pruning as tp
from torch import nn

from intrafusion import IntraFusionPruner
from tests.nets import randomise_


class BehindConcat(nn.Module):
    """A batch-norm that reads two layers at once."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.norm, self.c, self.fc = nn.BatchNorm2d(16), nn.Conv2d(16, 6, 3), nn.Linear(6, 4)

    def forward(self, x):
        x = torch.relu(self.norm(torch.cat((self.a(x), self.b(x)), dim=1)))
        return self.fc(torch.relu(self.c(x)).mean(dim=(2, 3)))


class BeforeLayer(nn.Module):
    """Pre-activation: the sum is normalised, and read again by the shortcut."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.a, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)
        self.last = nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.a(torch.relu(self.norm(x)))
        return self.fc(torch.relu(self.last(x)).mean(dim=(2, 3)))


@pytest.mark.parametrize("net", [BehindConcat, BeforeLayer])
def test_training_mode_starts_from_the_function_of_eval_mode(net):
    """As well as the dense network does, whose statistics are those of the same inputs."""
    model, images = randomise_(net()), [torch.randn(250, 3, 8, 8) * 2 + 1 for _ in range(4)]
    _reset_statistics_(model, images)
    dense = copy.deepcopy(model)
    metric = tp.importance.GroupMagnitudeImportance(p=1)
    IntraFusionPruner(
        model, images[0][:1], metric, pruning_ratio=0.5, ignored_layers=[model.fc], fusion="calibrated",
        calibration=images,
    ).step()  # fmt: skip
    assert _gap(model, images[0]) < 2 * _gap(dense, images[0]) + 1e-3


def test_what_is_not_cut_keeps_its_statistics_bit_for_bit():
    model, images = randomise_(BeforeLayer()), [torch.randn(16, 3, 8, 8)]
    before = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
    pruner = IntraFusionPruner(
        model, images[0][:1], tp.importance.GroupMagnitudeImportance(p=1), pruning_ratio=0.0,
        ignored_layers=[model.fc], fusion="calibrated", calibration=images,
    )  # fmt: skip
    pruner.step()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def _reset_statistics_(model, images):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    model.train()
    with torch.no_grad():
        for batch in images:
            model(batch)
    model.eval()


@torch.no_grad()
def _gap(model, batch):
    """Relative distance between the outputs in training mode and in eval mode."""
    still = copy.deepcopy(model)
    evaluated, trained = still.eval()(batch), still.train()(batch)
    return float((evaluated - trained).norm() / (evaluated - evaluated.mean(dim=0)).norm())
