"""Unequal widths: channels move between groups, at an equal total, to where their loss costs least.

Every group is pruned alone, at some ratios around its own, and what that does to the network's output is measured on
inputs that nothing was fitted to. (Under a method that looks at inputs, the readers of the group get what is lost of
it back by least squares, and nothing else is put right: one pass of the network over the inputs that judge per try.)
With D_g the damage that a group leaves, interpolated between its ratios, the new ratios are those of

    min  Σ_g D_g(r_g)    so that the network costs no more than with equal ratios

by dynamic programming; what a choice really costs is counted on a network that is plainly cut so. Errors of groups do
not add up, and reading back puts right only a part of what a step does: so a whole step with each decides, and equal
widths stay where they do better. The network is put back after every try.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch_pruning as tp
from torch import nn
from tqdm import tqdm

from intrafusion.groups.table import module_name
from intrafusion.prune.fused_group import FusionError
from intrafusion.prune.report import Allocation
from intrafusion.prune.trials import Bench, Tried
from intrafusion.prune.widths import kind_of_group, set_ratio_
from intrafusion.running import full_precision

_GRID = 16
"""Ratios are chosen in such parts of a group's width."""
_TRIES, _BINS = 12, 1000


@dataclass(frozen=True)
class _Group:
    """layers: those that torch-pruning may look a ratio up by; ratio: its own."""

    name: str
    layers: tuple[nn.Module, ...]
    ratio: float


@full_precision()
def allocate_(pruner: Any, step: Callable[[], Any], allocation: str) -> Allocation | None:
    """Give the groups of a pruner their ratios; None if there are fewer than two of them.

    step: one step of the pruner. Raises FusionError for a network whose costs cannot be counted.
    """
    groups = list(_groups(pruner))
    if len(groups) < 2:
        return None
    bench = Bench(pruner, step, _macs if allocation == "measured" else _parameters)
    equal = {group.name: group.ratio for group in groups}
    curves = {}
    for group in tqdm(groups, desc="widths", unit="group", leave=False, disable=None if pruner.progress else True):
        levels = sorted({0.5 * group.ratio, group.ratio, min(0.5 + 0.5 * group.ratio, pruner.max_pruning_ratio)})
        tried = [bench.tried({group.layers: level}) for level in levels]
        curves[group.name] = _Curve(levels, tried)

    def every(ratios: Mapping[str, float]) -> dict[tuple[nn.Module, ...], float]:
        return {group.layers: ratios[group.name] for group in groups}

    limit = bench.cost(every(equal))
    ratios = _within(curves, limit, lambda found: bench.cost(every(found)))
    before, after = (bench.stepped(every(one)) for one in (equal, ratios))
    chosen = ratios if after < before else equal
    for group in groups:
        for layer in group.layers:
            set_ratio_(pruner, layer, chosen[group.name])
    return Allocation(chosen, bench.shown(before), bench.shown(after), bench.told, bench.measure)


def _groups(pruner: Any) -> Iterator[_Group]:
    """Those that torch-pruning would cut. Attention heads and residual streams keep the ratios that they have."""
    present = set(pruner.model.modules())  # torch-pruning's own, as of a concat, are several groups' roots
    for group in pruner.all_groups():
        root = group[0].dep.target.module
        ratio = pruner.get_target_pruning_ratio(root, pruner.iterative_steps)
        if ratio > 0 and isinstance(root, nn.Module) and kind_of_group(pruner, group) not in ("heads", "stream"):
            making = [item.dep.target.module for item in group if pruner.DG.is_out_channel_pruning_fn(item.dep.handler)]
            layers = dict.fromkeys(layer for layer in (root, *making) if layer in present)
            yield _Group(module_name(pruner.DG, root), tuple(layers), ratio)


class _Curve:
    """What a group's ratio does, between the ratios [l] that were tried and 0, where it does nothing."""

    def __init__(self, levels: Sequence[float], tried: Sequence[Tried]) -> None:
        damage = np.maximum.accumulate([one.damage if math.isfinite(one.damage) else 1e6 for one in tried])
        self.ratios = np.unique([*(np.arange(math.ceil(_GRID * levels[-1])) / _GRID), levels[-1]])
        self.damage = np.interp(self.ratios, [0.0, *levels], [0.0, *damage])
        self.saved = -np.polyfit(levels, [one.cost for one in tried], 1)[0] * self.ratios


def _within(curves: Mapping[str, _Curve], limit: float, cost: Callable[[dict[str, float]], float]) -> dict[str, float]:
    """The ratios that do the least damage of those that cost no more than `limit`.

    What groups save does not quite add up (two of them meet in a layer): as much more is asked for as it takes.
    """
    known: dict[tuple[float, ...], float] = {}

    def costs(ratios: dict[str, float]) -> float:
        key = tuple(ratios.values())
        if key not in known:
            known[key] = cost(ratios)
        return known[key]

    whole = costs(dict.fromkeys(curves, 0.0))
    low, high = 0.5 * (whole - limit), sum(float(curve.saved[-1]) for curve in curves.values())
    best = {name: float(curve.ratios[-1]) for name, curve in curves.items()}
    for _ in range(_TRIES):
        asked = (low + high) / 2
        found = least_damage(curves, asked)
        if costs(found) <= limit:
            best, high = found, asked
        else:
            low = asked
    return best


def least_damage(curves: Mapping[str, _Curve], asked: float) -> dict[str, float]:
    """The ratios with the least sum of damages of those whose savings add up to `asked` (in `_BINS` parts of it)."""
    damage = np.full(_BINS + 1, np.inf)  # of the groups so far, by what they save; all beyond is in the last place
    damage[0] = 0.0
    places, choices = np.arange(_BINS + 1), []
    for curve in curves.values():
        saved = np.floor(curve.saved * _BINS / max(asked, 1e-300) + 1e-6).clip(0, _BINS).astype(int)
        every = np.full((len(saved), _BINS + 1), np.inf)
        for number, (one, harm) in enumerate(zip(saved, curve.damage, strict=True)):
            np.minimum.at(every[number], np.minimum(places + one, _BINS), damage + harm)
        choices.append((saved, damage, every.argmin(axis=0)))
        damage = every.min(axis=0)
    at, found = _BINS, {}
    for (name, curve), (saved, before, choice) in zip(reversed(list(curves.items())), reversed(choices), strict=True):
        number = int(choice[at])
        found[name] = float(curve.ratios[number])
        below = np.arange(max(0, at - saved[number]), at + 1) if at == _BINS else np.array([at - saved[number]])
        at = int(below[before[below].argmin()])
    return {name: found[name] for name in curves}


def _parameters(pruner: Any) -> float:
    return float(sum(parameter.numel() for parameter in pruner.model.parameters()))


def _macs(pruner: Any) -> float:
    try:
        return float(tp.utils.count_ops_and_params(pruner.model, pruner.example_inputs)[0])
    except Exception as error:
        raise FusionError(
            f"torch-pruning cannot count what this network costs ({type(error).__name__}: {error}): "
            "allocation='measured-parameters' counts parameters"
        ) from error
