"""Which published figure belongs to which group."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from intrafusion.lab.models import build_model
from intrafusion.lab.paper import numbers, published
from intrafusion.lab.pruning import coupled_layers
from intrafusion.lab.recipe.loader import Recipe, load_recipe
from intrafusion.lab.recipe.sections import PruneSection
from intrafusion.models import CifarResNet18

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
RESNET18 = [
    "conv1", "layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.shortcut.0", "layer2.1.conv1",
    "layer3.0.conv1", "layer3.0.shortcut.0", "layer3.1.conv1", "layer4.0.conv1", "layer4.0.shortcut.0",
    "layer4.1.conv1",
]  # fmt: skip


def recipe(name: str, tmp_path: Path, *assignments: str) -> Recipe:
    weights = tmp_path / "w.safetensors"
    weights.touch()
    return load_recipe(RECIPES / f"{name}.yaml", [f"data.root={tmp_path}", f"model.weights={weights}", *assignments])


@pytest.mark.parametrize(
    ("network", "model", "last"),
    [
        ("ResNet18", lambda: CifarResNet18(width=2), "linear"),
        ("ResNet50", lambda: build_model("torchvision:resnet50", 2), "fc"),
    ],
)
def test_groups_are_numbered_from_the_last_layer_on(network: str, model, last: str) -> None:
    """As the published code does it: through the layers backwards, a group when its first layer is met."""
    dense = model().eval()
    coupled = coupled_layers(dense, torch.zeros(1, 3, 32, 32), PruneSection(ratios=(0.5,), ignored=(last,)))
    group_of = {layer: group.name for group in coupled for layer in group.producers}
    layers = [name for name, _ in dense.named_modules() if name in group_of]
    expected = list(dict.fromkeys(group_of[layer] for layer in reversed(layers)))
    found = numbers(network, [group.name for group in coupled])
    shown = {"ResNet18": 11, "ResNet50": 18}[network]
    assert sorted(found, key=found.__getitem__)[:shown] == expected[:shown]
    assert sorted(found.values())[:shown] == list(range(shown))


def test_a_chain_of_another_length_is_another_network() -> None:
    groups = [f"features.{index}" for index in range(8)]
    assert numbers("VGG11-BN", groups) == {f"features.{index}": 7 - index for index in range(8)}
    assert numbers("VGG11-BN", groups[1:]) == {}


@pytest.mark.parametrize(
    ("name", "where", "dense", "figure"),
    [
        ("cifar10_resnet18_groups", "Tables 12-13", 94.9, {"l1": (85.69, 93.47), "taylor": None}),
        ("cifar100_resnet18_groups", "Tables 16-17", None, {"l1": (39.59, 71.2)}),
    ],
)
def test_resnet18(name: str, where: str, dense: float | None, figure: dict, tmp_path: Path) -> None:
    found = published(recipe(name, tmp_path), RESNET18)
    assert found is not None
    assert (found.where, found.dense) == (where, dense)
    assert len(found.figures) == 3 * 11
    assert found.figures["layer2.0.shortcut.0", 0.3] == figure["l1"]
    assert ("layer1.0.conv1", 0.3) not in found.figures
    assert found.figures["conv1", 0.5] == published(recipe(name, tmp_path), ["conv1"]).figures["conv1", 0.5]  # type: ignore[union-attr]


@pytest.mark.parametrize("importance", ["taylor", "lamp"])
@pytest.mark.parametrize("name", ["cifar10_resnet18_groups", "cifar100_vgg11_bn_groups", "imagenet_resnet50_groups"])
def test_other_importances_have_figures_at_half_of_the_channels(name: str, importance: str, tmp_path: Path) -> None:
    given = recipe(name, tmp_path, f"prune.importance={importance}")
    groups = {
        "cifar100_vgg11_bn_groups": [f"features.{index}" for index in range(8)],
        "imagenet_resnet50_groups": ["layer4.0.downsample.0", "layer4.2.conv2", "layer3.1.conv1"],
    }.get(name, RESNET18)
    found = published(given, groups)
    assert found is not None
    assert {ratio for _, ratio in found.figures} == {0.5}
    assert published(recipe(name, tmp_path, "prune.importance=chip"), groups) is None


def test_imagenet(tmp_path: Path) -> None:
    found = published(
        recipe("imagenet_resnet50_groups", tmp_path), ["conv1", "layer4.0.downsample.0", "layer3.0.conv1"]
    )
    assert found is not None
    assert found.figures["layer4.0.downsample.0", 0.5] == (52.76, 66.69)
    assert {group for group, _ in found.figures} == {"layer4.0.downsample.0"}


@pytest.mark.parametrize(
    "assignments",
    [
        ["data.name=fake"],
        ["model.num_classes=11"],
        ["prune.groups=all"],
        ["model.name=cifar_resnet20", "prune.ignored=linear"],
        ["data.name=image_folder", "data.title=CIFAR-1000"],
        ["data.name=image_folder", "data.title=null"],
    ],
)
def test_other_set_ups_have_no_figures(assignments: list[str], tmp_path: Path) -> None:
    assert published(recipe("cifar10_resnet18_groups", tmp_path, *assignments), RESNET18) is None


def test_generated_images_are_never_called_by_another_name(tmp_path: Path) -> None:
    assert re.search(r" on fake$", recipe("cifar10_resnet18", tmp_path, "data.name=fake").title)
