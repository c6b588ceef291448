"""The published behaviour on the real checkpoints (skipped where INTRAFUSION_DATA is not set)."""

from __future__ import annotations

import copy

import pytest
import torch
import torch_pruning as tp
from torch import nn

from benchmarks.paper_parity import NETWORKS, PAPER, accuracy, expected, images, load, pruned
from intrafusion import IntraFusionPruner


def fold_by_hand(model: nn.Module) -> nn.Module:
    """Every batch-norm multiplied into the convolution before it and replaced by nothing."""
    model = copy.deepcopy(model)
    convolution = None
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d):
            convolution = module
        if isinstance(module, nn.BatchNorm2d):
            scale = module.weight / (module.running_var + module.eps).sqrt()
            bias = 0 if convolution.bias is None else convolution.bias
            shift = module.bias + scale * (bias - module.running_mean)
            convolution.weight = nn.Parameter((convolution.weight * scale[:, None, None, None]).detach())
            convolution.bias = nn.Parameter(shift.detach())
            model.set_submodule(name, nn.Identity())
    return model


def kept_everywhere(model: nn.Module, roots: list[str], make, **kwargs) -> dict[str, list[int]]:
    weighted = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    pruner = make(
        model,
        (torch.zeros(1, 3, 32, 32),),
        tp.importance.GroupMagnitudeImportance(p=1),
        pruning_ratio=0.5,
        ignored_layers=[m for name, m in weighted.items() if name not in roots],
        **kwargs,
    )
    pruner.step()
    return {name: sorted(removed) for name, _, removed in pruner.pruning_history()}


@pytest.mark.parametrize("network", NETWORKS)
def test_the_kept_channels_are_those_of_torch_pruning_on_the_folded_network(network, shared_data):
    dense, roots = load(network, shared_data)
    folded = fold_by_hand(dense)
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(folded(x), dense(x), atol=1e-3)
    for root in roots:
        theirs = kept_everywhere(copy.deepcopy(folded), [root], tp.pruner.BasePruner)
        ours = kept_everywhere(copy.deepcopy(dense), [root], IntraFusionPruner, fusion="paper")
        assert theirs == ours
        assert set(ours) == {root}


@pytest.mark.slow
@pytest.mark.parametrize(("group", "ratio", "tolerance"), [("layer3.2.conv1", 0.5, 0.5), ("all at once", 0.3, 2.0)])
def test_a_published_cell_is_reproduced(group, ratio, tolerance, shared_data, image_cache, monkeypatch):
    monkeypatch.setenv("INTRAFUSION_CACHE", str(image_cache))
    dense, names = load("ResNet-20", shared_data)
    roots = names if group == "all at once" else [group]
    discarded, fused = expected()["ResNet-20"][group][[0.3, 0.5, 0.7].index(ratio)]
    data = images(shared_data, progress=False)
    assert accuracy(pruned(dense, roots, ratio, PAPER), data) == pytest.approx(fused, abs=tolerance)
    assert accuracy(pruned(dense, roots, ratio, PAPER.discarded()), data) == pytest.approx(discarded, abs=tolerance)
