"""Groups that fusion does not understand are cut as torch-pruning cuts them, with one warning that says why."""

from __future__ import annotations

import pytest
import torch
import torch_pruning as tp
from torch import nn

from intrafusion import IntraFusionPruner


def l1():
    return tp.importance.GroupMagnitudeImportance(p=1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.q, self.k, self.v, self.proj = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.embed(x)
        q, k, v = (layer(x).unflatten(2, (2, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return self.head((x + self.down(torch.relu(self.up(x)))).mean(1))


def test_attention_heads_are_cut_not_fused_with_one_warning_and_the_rest_is_fused():
    model, x = Attention().eval(), torch.randn(2, 5, 6)
    heads = {model.q: 2, model.k: 2, model.v: 2}
    pruner = IntraFusionPruner(model, x, l1(), num_heads=heads, ignored_layers=[model.head])
    with pytest.warns(UserWarning, match="could only be cut, not fused") as caught:
        pruner.step()
    assert len(caught) == 1
    assert len(pruner.report.fallbacks) == 1
    assert {group.name for group in pruner.report.fused} >= {"up"}
    assert model(x).shape == (2, 4)


def test_nn_multihead_attention_falls_back_to_a_cut():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.attention, self.head = (
                nn.Linear(6, 8),
                nn.MultiheadAttention(8, 2, batch_first=True),
                nn.Linear(8, 4),
            )

        def forward(self, x):
            x = self.embed(x)
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))

    model, x = Net(), torch.randn(2, 5, 6)
    pruner = IntraFusionPruner(
        model, x, l1(), ignored_layers=[model.head], num_heads={model.attention: 2}, pruning_ratio=0.5
    )
    with pytest.warns(UserWarning, match="could only be cut, not fused"):
        pruner.step()
    assert not pruner.report.fused


class Gate(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))

    def forward(self, x):
        return x * self.weight[:, None, None]


class GatePruner(tp.pruner.BasePruningFunc):
    def prune_out_channels(self, layer, idxs):
        kept = sorted(set(range(len(layer.weight))) - set(idxs))
        layer.weight = self._prune_parameter_and_grad(layer.weight, kept, 0)
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer):
        return len(layer.weight)

    get_in_channels = get_out_channels


def test_customised_pruners_are_obeyed_and_their_groups_cut():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Gate(8), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()
    pruner = IntraFusionPruner(
        model, torch.randn(1, 3, 4, 4), l1(), customized_pruners={Gate: GatePruner()}, ignored_layers=[model[4]]
    )
    with pytest.warns(UserWarning, match="customised pruner"):
        pruner.step()
    assert model[1].weight.shape == (4,)
    assert [group.name for group in pruner.report.fused] == ["2"]
