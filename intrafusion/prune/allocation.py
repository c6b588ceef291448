"""Unequal widths: channels move between groups, at an equal total, to where their loss costs least.

Every group is pruned alone, at some ratios around its own, by the very fusion of the pruner, and what that does to
the network's output is measured on inputs that nothing was fitted to. With D_g the squared relative error that a group
leaves, interpolated between its ratios, the new ratios are those of

    min  Σ_g D_g(r_g)    so that the network costs no more than with equal ratios

by dynamic programming; what a choice really costs is counted on a network that is plainly cut so. Errors of groups do
not add up exactly, so both are tried in the end, and equal widths stay where they do better. The network is put back
after every try.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch_pruning as tp
from torch import nn
from tqdm import tqdm

from intrafusion.groups.snapshot import Snapshot
from intrafusion.groups.table import module_name
from intrafusion.history.lineage import Lineage
from intrafusion.prune.fused_group import FusionError
from intrafusion.prune.inputs import Inputs, inputs_for
from intrafusion.prune.report import Allocation
from intrafusion.prune.twin import Judges, count_of, held_out
from intrafusion.prune.widths import set_ratio_

ALLOCATIONS = ("equal", "measured", "measured-parameters")
_GRID = 16
"""Ratios are chosen in such parts of a group's width."""
_SHARE = 4
"""One input of so many judges."""
_TRIES, _BINS = 12, 1000


@dataclass(frozen=True)
class _Group:
    """layers: those that torch-pruning may look a ratio up by; ratio: its own."""

    name: str
    layers: tuple[nn.Module, ...]
    ratio: float


def allocate_(pruner: Any, step: Callable[[], Any], allocation: str) -> Allocation | None:
    """Give the groups of a pruner their ratios; None if there are fewer than two of them.

    step: one step of the pruner. Raises FusionError for a network whose costs cannot be counted.
    """
    groups = list(_groups(pruner))
    if len(groups) < 2:
        return None
    bench = _Bench(pruner, step, _macs if allocation == "measured" else _parameters)
    equal = {group.name: group.ratio for group in groups}
    curves = {}
    for group in tqdm(groups, desc="widths", unit="group", leave=False, disable=None if pruner.progress else True):
        levels = sorted({0.5 * group.ratio, group.ratio, min(0.5 + 0.5 * group.ratio, pruner.max_pruning_ratio)})
        tried = [bench.fused({group: level}) for level in levels]
        curves[group.name] = _Curve(levels, tried)
    limit = bench.cost({group: group.ratio for group in groups})
    ratios = _within(curves, limit, lambda found: bench.cost({group: found[group.name] for group in groups}))
    before, after = (bench.fused({g: one[g.name] for g in groups}).error for one in (equal, ratios))
    chosen = ratios if after < before else equal
    for group in groups:
        for layer in group.layers:
            set_ratio_(pruner, layer, chosen[group.name])
    return Allocation(chosen, before, after, bench.told)


def _groups(pruner: Any) -> Iterator[_Group]:
    """Those that torch-pruning would cut, attention heads left out: their number is a ratio of its own."""
    for group in pruner.all_groups():
        root = group[0].dep.target.module
        ratio = pruner.get_target_pruning_ratio(root, pruner.iterative_steps)
        if ratio > 0 and not pruner.is_attention(group) and isinstance(root, nn.Module):
            making = [item.dep.target.module for item in group if pruner.DG.is_out_channel_pruning_fn(item.dep.handler)]
            layers = dict.fromkeys([root, *(layer for layer in making if isinstance(layer, nn.Module))])
            yield _Group(module_name(pruner.DG, root), tuple(layers), ratio)


@dataclass(frozen=True)
class _Tried:
    """The relative error of the output that a try leaves, and what the network costs then."""

    error: float
    cost: float


class _Curve:
    """What a group's ratio does, between the ratios [l] that were tried and 0, where it does nothing."""

    def __init__(self, levels: Sequence[float], tried: Sequence[_Tried]) -> None:
        errors = np.maximum.accumulate([one.error if math.isfinite(one.error) else 1e3 for one in tried])
        self.ratios = np.unique([*(np.arange(math.ceil(_GRID * levels[-1])) / _GRID), levels[-1]])
        self.damage = np.interp(self.ratios, [0.0, *levels], [0.0, *errors]) ** 2
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


class _Bench:
    """Tries ratios on the pruner's own network, which is put back. told: what is judged on, in words."""

    def __init__(self, pruner: Any, step: Callable[[], Any], count: Callable[[Any], float]) -> None:
        self._pruner, self._step, self._count = pruner, step, count
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._inputs = _parted(inputs_for(pruner, pruner.fusion.method()))
        self.told = self._inputs.judges[0].told

    def fused(self, ratios: Mapping[_Group, float]) -> _Tried:
        """Prune the groups to these ratios, and no others."""
        with self._trying(ratios):
            self._step()
            compared = self._pruner.report.comparisons
            if not compared:
                raise FusionError("what a group's ratio costs could not be measured: the network's outputs say nothing")
            return _Tried(compared[-1].fused, self._count(self._pruner))

    def cost(self, ratios: Mapping[_Group, float]) -> float:
        """What the network costs when it is plainly cut so."""
        with self._trying(ratios):
            self._pruner.fusion = self._pruner.fusion.discarded()
            self._step()
            return self._count(self._pruner)

    @contextmanager
    def _trying(self, ratios: Mapping[_Group, float]) -> Iterator[None]:
        pruner = self._pruner
        snapshot = Snapshot(pruner.DG, pruner.model.modules(), pruner.state())
        mark = pruner.report.mark()
        try:
            pruner.is_trying, pruner.lineage, pruner.inputs = True, Lineage(pruner.DG), self._inputs
            pruner.prune_num_heads = pruner.prune_head_dims = pruner.progress = False
            pruner.iterative_steps, pruner.current_step, pruner.per_step_pruning_ratio = 1, 0, [0.0, 0.0]
            pruner.pruning_ratio_dict, pruner._layer_to_scope = {}, dict(pruner._layer_to_scope)
            for group, ratio in ratios.items():
                for layer in group.layers:
                    set_ratio_(pruner, layer, ratio)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            snapshot.restore()
            pruner.report.back_to(mark)


def _parted(inputs: Inputs) -> Inputs:
    """The same, with a quarter of the inputs to judge on where there are some."""
    batches = inputs.own or inputs.drawn
    wanted = (count_of(batches) + sum(count_of(one.batches) for one in inputs.judges[:1])) // _SHARE
    if not batches or count_of(batches) <= wanted:
        return inputs
    kept, judges = held_out([*batches, *inputs.judges[0].batches], wanted)
    told = f"{count_of(judges)} {'calibration' if inputs.own else 'synthetic'} inputs that were held out"
    every = [Judges(judges, told)]
    return Inputs(kept, inputs.drawn, every) if inputs.own else Inputs([], kept, every)


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
