"""Channels that go are read from those that stay, and nothing else changes."""

from __future__ import annotations

import copy

import torch
from torch import nn

from intrafusion import IntraFusionPruner
from intrafusion.methods.read_back import ReadBack
from intrafusion.prune.step import Step


def first_ones(group):
    return -torch.arange(len(group[0].idxs)).float()


def pruned(model, x):
    """The network with the first half of each width, read back, and the inputs that this was done on."""
    pruner = IntraFusionPruner(
        model, x[:2], first_ones, pruning_ratio=0.5, ignored_layers=[model[-1]], fusion="calibrated", calibration=[x]
    )
    pruner.progress, pruner.keep_inputs, pruner.current_step = False, True, 1
    step = Step(pruner, ReadBack("calibration"))
    for group in step.groups(pruner.chosen()):
        group.prune()
    return torch.cat([batch[0] if isinstance(batch, tuple) else batch for batch in step.inputs])


def test_readers_read_by_least_squares_on_what_they_see():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)).eval()
    dense, x = copy.deepcopy(model), torch.randn(300, 6)
    seen = pruned(model, x)
    with torch.no_grad():
        h = dense[:2](seen).double()
    wanted = torch.linalg.lstsq(h[:, :4], h).solution.T  # [8, 4]
    assert torch.equal(model[0].weight, dense[0].weight[:4])
    assert torch.equal(model[2].bias, dense[2].bias)
    assert torch.allclose(model[2].weight.double(), dense[2].weight.double() @ wanted, atol=0.02)


def test_copies_are_read_from_what_stays_behind_a_flatten_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)).eval()
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter[4:] = parameter[:4]
    dense, x = copy.deepcopy(model), torch.randn(64, 3, 6, 6)
    pruned(model, x)
    assert model[0].out_channels == 4
    assert (dense(x) - model(x)).norm() < 0.01 * dense(x).norm()
