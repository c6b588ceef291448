"""Features are read where they are: no wide layer is copied, and none is held in more digits than it has."""

from __future__ import annotations

import pytest
import torch
import torch_pruning as tp
from torch import nn

from intrafusion.groups.features import channel_features, feature_parts
from intrafusion.groups.table import tabulate
from intrafusion.ot import transport_plan


def table_of(model, x, layer):
    graph = tp.DependencyGraph().build_dependency(model, x)
    return graph, tabulate(graph, layer, graph.get_pruner_of_module(layer).prune_out_channels)


def test_wide_linear_layers_are_views():
    model = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 10))
    rows, columns = feature_parts(*table_of(model, torch.randn(2, 30), model[0]))
    assert rows.data_ptr() == model[0].weight.data_ptr()
    assert columns.data_ptr() == model[2].weight.data_ptr()
    assert columns.shape == (20, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parts_come_in_the_networks_precision_and_side_by_side_are_the_features(dtype):
    norm = nn.BatchNorm2d(8)
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Flatten(), nn.Linear(32, 5)).to(dtype).eval()
    found = table_of(model, torch.randn(2, 3, 4, 4, dtype=dtype), model[0])
    parts = feature_parts(*found, bias=True)
    assert {part.dtype for part in parts} == {dtype}
    whole = channel_features(*found, bias=True)
    assert whole.dtype == torch.float64
    assert torch.equal(torch.cat(parts, dim=1).double(), whole)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    assert torch.allclose(parts[0], (scale[:, None, None, None] * model[0].weight).flatten(1))
    kept = torch.arange(0, 8, 2)
    one, other = (transport_plan(features, kept).coupling for features in (parts, whole))
    assert torch.allclose(one, other, atol=1e-12)
