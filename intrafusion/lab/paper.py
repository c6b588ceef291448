"""The published figures of a run's set-up, to print beside ours."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from intrafusion.lab.recipe import Recipe

_NETWORKS = {"cifar_vgg11_bn": "VGG11-BN"}
"""Ours to theirs, for chains of layers only: which group of a ResNet has which published number is not documented."""
_DATA = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}


@dataclass(frozen=True)
class Published:
    """A table of the paper: accuracies in per cent, ``(discard, fused)`` by group and ratio.

    dense: of their checkpoint, which is not ours; where: the tables' numbers; source: the paper.
    """

    dense: float
    where: str
    source: str
    figures: dict[tuple[str, float], tuple[float, float]]


def published(recipe: Recipe, groups: Sequence[str]) -> Published | None:
    """What the paper says about a recipe that prunes each of ``groups`` (in the network's order) alone, if anything."""
    data = re.findall(r"cifar-?10{1,2}(?!\d)", f"{recipe.data.name} {recipe.data.title}".lower())
    name = f"{_NETWORKS.get(recipe.model.name)} / {_DATA.get(data[0].replace('-', '')) if data else None}"
    content = json.loads(resources.files("intrafusion.lab").joinpath("paper_tables.json").read_text(encoding="utf-8"))
    table = content["tables"].get(name)
    if recipe.prune.groups != "each" or table is None or len(groups) != len(table["groups"]):
        return None
    figures = {}
    for number, group in enumerate(reversed(groups)):  # the paper counts from the output
        for ratio in recipe.prune.ratios or ():
            pair = table["groups"][str(number)].get(f"{recipe.prune.importance}@{ratio:.4g}")
            if pair is not None:
                figures[group, ratio] = tuple(pair)
    return Published(table["dense"], table["where"], content["source"], figures) if figures else None
