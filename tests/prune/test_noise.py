"""Networks that draw random numbers in eval mode are checked, fused and corrected like others."""

from __future__ import annotations

import copy

import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional as F

from intrafusion import IntraFusionPruner


class MonteCarlo(nn.Module):
    """Dropout that stays on, drawn in three ways."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(8, 24), nn.Linear(24, 16), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x):
        y = F.dropout(self.a(x).relu(), 0.1, training=True)
        y = self.b(y).relu()
        y = y * torch.bernoulli(torch.full_like(y, 0.9)) / 0.9
        y = self.c(y).relu()
        return self.head(y * (torch.rand(y.shape) > 0.1))


class Latent(nn.Module):
    """A sample around a mean, with a spread that the network gives, of a distribution of torch's."""

    def __init__(self):
        super().__init__()
        self.encode, self.mean, self.spread = nn.Conv1d(4, 24, 3, padding=1), nn.Conv1d(24, 8, 1), nn.Conv1d(24, 8, 1)
        self.decode, self.head = nn.Conv1d(8, 24, 3, padding=1), nn.Conv1d(24, 4, 1)

    def forward(self, x):
        h = self.encode(x).relu()
        z = torch.distributions.Normal(self.mean(h), F.softplus(self.spread(h) - 3) + 1e-3).rsample()
        return self.head(self.decode(z).relu())


CASES = {"dropout": (MonteCarlo, (8,), 3), "latent": (Latent, (4, 12), 3)}


def means(model, x):
    """Over the noise."""
    with torch.no_grad():
        return torch.stack([model(x) for _ in range(64)]).mean(0)


@pytest.mark.filterwarnings("ignore::intrafusion.prune.twin.WorseThanCut")
@pytest.mark.parametrize("fusion", ["paper", "barycentre", "data-free", "calibrated"])
@pytest.mark.parametrize("name", CASES)
def test_every_group_is_fused_and_the_result_does_not_depend_on_who_drew_before(name, fusion):
    kind, shape, groups = CASES[name]
    dense, results = kind().eval(), []
    x = torch.randn(256, *shape)
    for seed in (0, 1):
        model = copy.deepcopy(dense)
        torch.manual_seed(seed)
        more = {"calibration": [x]} if fusion == "calibrated" else {}
        importance = tp.importance.GroupMagnitudeImportance(p=1)
        pruner = IntraFusionPruner(
            model, x[:2], importance, pruning_ratio=0.3, ignored_layers=[model.head], fusion=fusion, **more
        )
        pruner.progress = False
        pruner.step()
        assert len(pruner.report.fused) == groups, str(pruner.report)
        results.append(model.state_dict())
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())


@pytest.mark.parametrize("name", CASES)
def test_it_is_corrected_on_average(name):
    kind, shape, _ = CASES[name]
    dense, x = kind().eval(), torch.randn(256, *shape)
    wanted, gaps = means(dense, x), {}
    for fusion in ("discard", "calibrated"):
        model = copy.deepcopy(dense)
        more = {"calibration": list(torch.randn(512, *shape).split(32))} if fusion == "calibrated" else {}
        importance = tp.importance.GroupMagnitudeImportance(p=1)
        pruner = IntraFusionPruner(
            model, x[:2], importance, pruning_ratio=0.3, ignored_layers=[model.head], fusion=fusion, **more
        )
        pruner.progress = False
        pruner.step()
        gaps[fusion] = (means(model, x) - wanted).norm().item()
    assert gaps["calibrated"] < 0.75 * gaps["discard"]


def test_a_wrong_index_map_is_found_behind_noise_too():
    class Part(MonteCarlo):
        def forward(self, x):
            y = F.dropout(self.a(x).relu(), 0.1, training=True) + torch.randn(len(x), 24)
            y[:, :6] *= 2.0
            return self.head(self.c(self.b(y).relu()).relu())

    model, x = Part().eval(), torch.randn(2, 8)
    pruner = IntraFusionPruner(
        model, x, tp.importance.GroupMagnitudeImportance(p=1), ignored_layers=[model.head], fusion="paper"
    )
    with pytest.raises(RuntimeError, match="the channels of 'a' are partly written in place"):
        pruner.step()
