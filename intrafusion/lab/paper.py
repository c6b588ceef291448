"""The published figures of a run's set-up, to print beside ours."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from intrafusion.lab.recipe.loader import Recipe

_NETWORKS = {
    "cifar_vgg11_bn": "VGG11-BN",
    "cifar_resnet18": "ResNet18",
    "torchvision:resnet50": "ResNet50",
}
_CHAIN = 8
_DATA = {"cifar10": ("CIFAR-10", 10), "cifar100": ("CIFAR-100", 100), "imagenet": ("ImageNet", 1000)}
"""Theirs, and the number of classes, for which a part of a data set does not pass."""
_INNER = {"ResNet18": r"layer\d\.\d\.conv1", "ResNet50": r"layer\d\.\d\.conv[12]"}
"""The layers inside the blocks of a network, each of which is a group; all others are part of a residual stream."""


@dataclass(frozen=True)
class Published:
    """A table of the paper: accuracies in per cent, ``(discard, fused)`` by group and ratio.

    dense: of their checkpoint, which is not ours, if they say; where: the tables' numbers; source: the paper.
    """

    dense: float | None
    where: str
    source: str
    figures: dict[tuple[str, float], tuple[float, float]]


def published(recipe: Recipe, groups: Sequence[str]) -> Published | None:
    """What the paper says about a recipe that prunes each of ``groups`` (in the network's order) alone, if anything."""
    network, data = _NETWORKS.get(recipe.model.name), _data(recipe)
    content = json.loads(resources.files("intrafusion.lab").joinpath("paper_tables.json").read_text(encoding="utf-8"))
    table = content["tables"].get(f"{network} / {data}")
    if recipe.prune.groups != "each" or network is None or table is None:
        return None
    figures = {}
    for group, number in numbers(network, groups).items():
        for ratio in recipe.prune.ratios or ():
            pair = table["groups"].get(str(number), {}).get(f"{recipe.prune.importance}@{ratio:.4g}")
            if pair is not None:
                figures[group, ratio] = tuple(pair)
    return Published(table["dense"], table["where"], content["source"], figures) if figures else None


def numbers(network: str, groups: Sequence[str]) -> dict[str, int]:
    """The number in the paper's tables of each group, by the name of the layer it starts at; few or none if unknown.

    The published code goes through the layers from the last to the first and gives a group its number when it meets the
    first of its layers: the end of a stage's residual stream comes before the blocks of that stage. The tables stop
    before the groups nearest to the input of ResNet-18 (one of twelve) and of ResNet-50 (19 of 37).
    """
    if network not in _INNER:  # a chain: all groups, or their numbers are not known
        return {group: number for number, group in enumerate(reversed(groups))} if len(groups) == _CHAIN else {}
    blocks = {"ResNet18": (2, 2, 2, 2), "ResNet50": (3, 4, 6, 3)}[network]
    inner = {"ResNet18": ("conv1",), "ResNet50": ("conv2", "conv1")}[network]
    order: list[str] = []
    for stage in (4, 3, 2, 1):
        order.append(f"layer{stage}")
        order += [f"layer{stage}.{block}.{part}" for block in reversed(range(blocks[stage - 1])) for part in inner]
    places = {name: number for number, name in enumerate(order)}
    stem = "layer1" if network == "ResNet18" else "conv1"  # only there part of the first stage's stream
    names = {
        group: group if re.fullmatch(_INNER[network], group) else stem if group == "conv1" else group.split(".")[0]
        for group in groups
    }
    return {group: places[name] for group, name in names.items() if name in places}


def _data(recipe: Recipe) -> str | None:
    name = recipe.data.name
    if name not in _DATA:  # a folder of images says in its title what they are
        found = re.findall(r"cifar-?10{1,2}(?!\d)|imagenet(?![\w-])", recipe.data.shown.lower())
        name = found[0].replace("-", "") if found else ""
    theirs, classes = _DATA.get(name, (None, None))
    return theirs if recipe.model.num_classes == classes else None
