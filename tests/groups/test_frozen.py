"""Frozen batch-norms, of torchvision and of others, are cut with their channels."""

from __future__ import annotations

import pytest
import torch
import torch_pruning as tp
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import intrafusion
from intrafusion import IntraFusionPruner


class Detr(nn.Module):
    """As DETR's own: no attributes but buffers, another eps."""

    def __init__(self, n):
        super().__init__()
        self.n = n
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((n,), value))

    def forward(self, x):
        scale = (self.weight * (self.running_var + 1e-5).rsqrt()).reshape(1, -1, 1, 1)
        return x * scale + self.bias.reshape(1, -1, 1, 1) - self.running_mean.reshape(1, -1, 1, 1) * scale


class WithActivation(Detr):
    """As timm's: what follows is part of it, and its width is an attribute."""

    def __init__(self, n):
        super().__init__(n)
        self.num_features, self.act = n, nn.ReLU()

    def forward(self, x):
        assert x.shape[1] == self.num_features
        return self.act(super().forward(x))


def network(norm, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), norm(16), nn.ReLU(), nn.Conv2d(16, 12, 3, bias=False), norm(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip
    for name, buffer in model.named_buffers():
        buffer.copy_(torch.rand_like(buffer) + (0.5 if "var" in name or "weight" in name else -0.5))
    return model.eval()


@pytest.mark.filterwarnings("ignore:.*could only be cut", "ignore::intrafusion.prune.twin.WorseThanCut")
@pytest.mark.parametrize("fusion", ["discard", "paper", "data-free", "calibrated"])
@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, Detr, WithActivation])
def test_they_are_cut_with_their_channels_and_the_report_says_that_they_are_not_fused(norm, fusion, tmp_path):
    model, x = network(norm), torch.randn(32, 3, 10, 10)
    dense = {name: value.clone() for name, value in model.named_buffers()}
    more = {"calibration": [x]} if fusion == "calibrated" else {}
    importance = tp.importance.GroupMagnitudeImportance(p=1)
    pruner = IntraFusionPruner(model, x[:1], importance, ignored_layers=[model[-1]], fusion=fusion, **more)
    pruner.progress = False
    with torch.no_grad():
        wanted = model(x)
    pruner.step()
    for at, kept in ((1, 8), (4, 6)):
        for name in ("weight", "bias", "running_mean", "running_var"):
            now, before = getattr(model[at], name), dense[f"{at}.{name}"]
            assert now.shape == (kept,)
            assert set(now.tolist()) <= set(before.tolist())
    gap = (model(x) - wanted).norm() / wanted.norm()
    assert gap < {"discard": 2.0, "paper": 2.0}.get(fusion, 0.3)
    if fusion != "discard":
        assert all("is a frozen batch-norm" in group.reason for group in pruner.report.groups)
    intrafusion.save(model, tmp_path / "model.safetensors")
    loaded = intrafusion.load(tmp_path / "model.safetensors", network(norm, seed=1))
    assert torch.equal(loaded(x), model(x))


def test_what_is_trained_or_holds_something_else_is_no_frozen_batch_norm():
    from intrafusion.groups.kinds.frozen import _is_frozen

    trained = Detr(4)
    del trained.weight
    trained.weight = nn.Parameter(torch.ones(4))
    assert _is_frozen(Detr(4))
    assert not any(map(_is_frozen, (trained, nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.Linear(2, 2))))
