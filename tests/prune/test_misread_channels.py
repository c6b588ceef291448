"""Where torch-pruning takes a reader's channels for others, or hides them: said with the way out, which works."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch_pruning as tp
from torch import nn

from intrafusion import FusionError, IntraFusionPruner


class Twice(nn.Module):
    """One layer called twice, its outputs side by side: torch-pruning takes them for one."""

    def __init__(self):
        super().__init__()
        self.stem, self.twin, self.fc = nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(20, 4)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.fc(torch.cat([self.twin(x), self.twin(torch.tanh(x))], dim=2))


class Slope(nn.Module):
    """A PReLU of one slope in front of a concat."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.act, self.fc = nn.Linear(6, 8), nn.Linear(6, 8), nn.PReLU(), nn.Linear(16, 4)

    def forward(self, x):
        return self.fc(torch.cat([self.act(self.a(x)), self.b(x)], dim=1))


@pytest.mark.parametrize("fusion", ["calibrated", "data-free"])
def test_a_reader_that_gets_other_channels_than_it_was_cut_for_is_named_with_the_group(fusion):
    for ignored, refused in ((["fc"], True), (["fc", "twin"], False)):
        model = Twice()
        before = copy.deepcopy(model.state_dict())
        pruner = IntraFusionPruner(
            model, torch.randn(2, 3, 6), tp.importance.GroupMagnitudeImportance(p=1),
            ignored_layers=[model.get_submodule(name) for name in ignored], fusion=fusion,
            calibration=[torch.randn(200, 3, 6)] if fusion == "calibrated" else None,
        )  # fmt: skip
        if not refused:
            pruner.step()
            assert model.stem.out_features == 4
            continue
        with pytest.raises(FusionError, match=r"the channels of 'twin' come to 'fc'.*ignored_layers=\[model.twin\]"):
            pruner.step()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_prelu_of_one_slope_that_hides_channels_is_named_and_one_slope_per_channel_helps():
    model = Slope()
    make = partial(IntraFusionPruner, pruning_ratio=0.5, fusion="paper")
    with pytest.raises(ValueError, match=r"PReLU of one slope, and there is 'act'.*num_parameters"):
        make(model, torch.randn(2, 6), tp.importance.GroupMagnitudeImportance(p=1), ignored_layers=[model.fc])
    model.act = nn.PReLU(8)
    make(model, torch.randn(2, 6), tp.importance.GroupMagnitudeImportance(p=1), ignored_layers=[model.fc]).step()
    assert (model.a.out_features, model.b.out_features) == (4, 4)
