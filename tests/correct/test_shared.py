"""Layers that are called several times in a forward pass are fitted on all of their calls together."""

from __future__ import annotations

import copy

import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional as F

from intrafusion import IntraFusionPruner
from intrafusion.correct.survey import visits
from intrafusion.correct.walk import Walk
from tests.nets import randomise_


class Pyramid(nn.Module):
    """One head on three scales, of which the later ones are computed after the head was called."""

    def __init__(self):
        super().__init__()
        self.scales = nn.ModuleList(nn.Conv2d(3, 8, 3, padding=1) for _ in range(3))
        self.head, self.last = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        outputs = []
        for scale in self.scales:
            outputs.append(self.last(torch.relu(self.head(torch.relu(scale(x))))).mean(dim=(2, 3)))
            x = F.avg_pool2d(x, 2) * 2
        return torch.cat(outputs, dim=1)


class Siamese(nn.Module):
    """One tower for two inputs, compared at the end; it sees the second through a pool."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 3)
        self.fc = nn.Linear(8, 4)

    def tower(self, x):
        return self.b(torch.relu(self.norm(self.a(x)))).mean(dim=(2, 3))

    def forward(self, x):
        return self.fc((self.tower(x) - self.tower(F.max_pool2d(x, 2))).abs())


class Loop(nn.Module):
    """One layer, three times in a row."""

    def __init__(self):
        super().__init__()
        self.inwards, self.again, self.out = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 3, padding=1), nn.Linear(12, 4)

    def forward(self, x):
        x = torch.relu(self.inwards(x))
        for _ in range(3):
            x = x + 0.5 * torch.relu(self.again(x))
        return self.out(x.mean(dim=(2, 3)))


NETS = {"pyramid": (Pyramid, "last"), "siamese": (Siamese, "fc"), "loop": (Loop, "out")}


def inputs(count=500):
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("fusion", ["data-free", "calibrated"])
def test_a_shared_layer_is_corrected(net, fusion):
    torch.manual_seed(0)
    make, last = NETS[net]
    dense = randomise_(make()).eval()
    errors = {}
    for preset in (fusion, "discard"):
        model = copy.deepcopy(dense)
        pruner = IntraFusionPruner(
            model, inputs(1), tp.importance.GroupMagnitudeImportance(p=1), pruning_ratio=0.5,
            ignored_layers=[model.get_submodule(last)], fusion=preset,
            calibration=[inputs()] if preset == "calibrated" else None,
        )  # fmt: skip
        pruner.step()
        judges = torch.randn(200, 3, 12, 12)
        with torch.no_grad():
            errors[preset] = float((model(judges) - dense(judges)).norm())
    assert errors[fusion] < 0.7 * errors["discard"]


def test_the_walk_stops_at_the_last_call_and_shows_all_of_them():
    model = Pyramid().eval()
    names = {name: "" for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    calls = visits(model, lambda network, x: network(x), inputs(2), names)
    assert calls == {"scales.0": 1, "scales.1": 1, "scales.2": 1, "head": 3, "last": 3}
    assert list(calls) == ["scales.0", "scales.1", "scales.2", "head", "last"]
    walk = Walk((model, copy.deepcopy(model)), lambda network, x: network(x), [inputs(2), inputs(3)], names, calls)
    seen = {}
    while (name := walk.advance()) is not None:
        seen[name] = [tuple(now.inputs.shape) for _, now in walk.sights()]
    walk.close()
    sizes = [(count, 8, side, side) for count in (2, 3) for side in (12, 6, 3)]
    assert seen["scales.1"] == [(2, 3, 6, 6), (3, 3, 6, 6)]
    assert seen["head"] == sizes
