"""The networks that a checkpoint or a recipe names."""

from __future__ import annotations

import sys

import pytest
import torch
import torch_pruning as tp
from torch import nn

from intrafusion.models import MODELS, CifarResNet, CifarResNet18, UnknownModelError, ZeroPadShortcut, named_model

SHAPES = {name: (1, 8, 8) if name == "digits_cnn" else (3, 32, 32) for name in MODELS}


@pytest.mark.parametrize("name", [name for name in MODELS if name != "cifar_resnet110"])
def test_every_network_returns_one_logit_per_class(name: str) -> None:
    model = named_model(name, num_classes=7).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, *SHAPES[name])).shape == (2, 7)


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_depth_counts_convolutions_and_the_linear_layer(depth: int) -> None:
    model = named_model(f"cifar_resnet{depth}")
    assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules()) == depth


def test_depth_that_no_resnet_has() -> None:
    with pytest.raises(ValueError, match=r"depth 6 n \+ 2 .* not 21"):
        CifarResNet(21)


def test_resnet20_has_the_keys_of_the_checkpoints() -> None:
    keys = {key.rsplit(".", 1)[0] for key in named_model("cifar_resnet20").state_dict()}
    blocks = {f"layer{i}.{j}.{part}" for i in (1, 2, 3) for j in range(3) for part in ("conv1", "bn1", "conv2", "bn2")}
    assert keys == {"conv1", "bn1", "linear"} | blocks


def test_vgg11_has_the_keys_of_the_checkpoints() -> None:
    keys = {key.rsplit(".", 1)[0] for key in named_model("cifar_vgg11_bn").state_dict()}
    numbers = (0, 1, 4, 5, 8, 9, 11, 12, 15, 16, 18, 19, 22, 23, 25, 26)
    assert keys == {"classifier"} | {f"features.{i}" for i in numbers}


def test_resnet18_has_the_size_and_the_keys_of_common_cifar_checkpoints() -> None:
    model = named_model("cifar_resnet18")
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_173_962
    keys = {key.rsplit(".", 1)[0] for key in model.state_dict()}
    blocks = {f"layer{i}.{j}.{part}" for i in range(1, 5) for j in (0, 1) for part in ("conv1", "bn1", "conv2", "bn2")}
    assert keys == {"conv1", "bn1", "linear"} | blocks | {f"layer{i}.0.shortcut.{j}" for i in (2, 3, 4) for j in (0, 1)}


def test_resnet18_keeps_the_resolution_until_its_second_stage() -> None:
    model = CifarResNet18(width=2).eval()
    assert model.layer1(model.conv1(torch.zeros(1, 3, 32, 32))).shape == (1, 2, 32, 32)


def test_shortcut_takes_every_second_pixel_and_pads_with_zero_channels() -> None:
    x = torch.arange(2 * 4 * 4, dtype=torch.float32).view(1, 2, 4, 4)
    y = ZeroPadShortcut(stride=2, padding=1)(x)
    assert y.shape == (1, 4, 2, 2)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert y[:, [0, 3]].abs().sum() == 0


def test_the_groups_inside_the_blocks_can_be_pruned() -> None:
    model = named_model("cifar_resnet20").eval()
    ignored = [m for name, m in model.named_modules() if name in ("conv1", "linear") or name.endswith("conv2")]
    importance = tp.importance.GroupMagnitudeImportance(p=1)
    tp.pruner.BasePruner(model, (torch.zeros(1, 3, 32, 32),), importance, ignored_layers=ignored).step()
    assert [model.get_submodule(f"layer{i}.{j}.conv1").out_channels for i in (1, 2, 3) for j in range(3)] == [
        *[8] * 3, *[16] * 3, *[32] * 3,
    ]  # fmt: skip
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_torchvision() -> None:
    assert named_model("torchvision:resnet18", num_classes=3).fc.out_features == 3
    with pytest.raises(UnknownModelError, match="torchvision has no network 'resnet19'; did you mean 'resnet1"):
        named_model("torchvision:resnet19")


def test_timm_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UnknownModelError, match=r"needs the package timm: pip install 'intrafusion\[timm\]'"):
        named_model("timm:resnet18")


def test_a_misspelt_name_is_corrected() -> None:
    with pytest.raises(
        UnknownModelError,
        match=r"'cifar_resnet21'; did you mean 'cifar_resnet\d+'\? Known: .*, digits_cnn, torchvision:NAME, timm:NAME$",
    ):
        named_model("cifar_resnet21")


@pytest.mark.parametrize("name", ["os:getcwd", "intrafusion.models:DigitsCNN", ":digits_cnn", "", "torchvision"])
def test_a_name_runs_no_code(name: str) -> None:
    with pytest.raises(UnknownModelError, match=f"no network is called '{name}'"):
        named_model(name)
