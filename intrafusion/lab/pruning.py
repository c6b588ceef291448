"""Prune a copy of a network as a recipe says: build the importance, run the pruner, check what comes out."""

from __future__ import annotations

import copy
import fnmatch
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

from intrafusion import Fusion, GroupReport, IntraFusionPruner
from intrafusion.lab.data import Dataset
from intrafusion.lab.errors import LabError
from intrafusion.lab.recipe import PruneSection

ALL = "all"


class OutputChanged(LabError):
    """Pruning removed values of the network's own output."""


IMPORTANCES: dict[str, Callable[[], Any]] = {
    "l1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
    "l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
    "taylor": lambda: tp.importance.GroupTaylorImportance(),
    "lamp": lambda: tp.importance.LAMPImportance(p=2),
    "bn_scale": lambda: tp.importance.BNScaleImportance(),
    "random": lambda: tp.importance.RandomImportance(),
    "fpgm": lambda: tp.importance.FPGMImportance(p=2),
}
_NEEDS_GRADIENTS = frozenset({"taylor"})


@dataclass(frozen=True)
class Pruned:
    """A pruned copy.

    Attributes:
        model: in eval mode, without gradients.
        groups: what happened to each group.
        kept: digest of every removed channel of every group; equal for networks that keep the same channels.
    """

    model: nn.Module
    groups: tuple[GroupReport, ...]
    kept: str


def prune(
    dense: nn.Module, example: Tensor, settings: PruneSection, fusion: Fusion, ratio: float, *,
    data: Dataset, only: str = ALL, discard: bool = False,
) -> Pruned:  # fmt: skip
    """Prune a copy of ``dense``; the original is untouched.

    Args:
        example: ``[1, C, H, W]``.
        ratio: share of the channels that go, in [0, 1).
        data: where the images for gradients come from, if the importance needs any.
        only: name of the one group to prune, or ``"all"``.
        discard: the honest twin instead: plain torch-pruning, cutting the very channels that ``fusion`` removes.

    Raises:
        LabError: a name matches no layer.
        OutputChanged: the last layer was pruned.
        intrafusion.FusionError: a group cannot be pruned.
    """
    model = copy.deepcopy(dense).eval()
    if settings.importance in _NEEDS_GRADIENTS:
        _accumulate_gradients_(model, data, settings)
    ignored = ignored_layers(model, settings.ignored)
    if only != ALL:
        roots = group_roots(model, example, settings)
        if only not in roots:
            raise LabError(f"no group starts at '{only}'; groups: {', '.join(roots)}")
        ignored += [model.get_submodule(name) for name in roots if name != only]
    # With scores from before the step, a discarding run keeps the same channels, without the work of fusing them.
    used = fusion.discarded() if discard and not fusion.rescore else fusion
    pruner = _pruner(model, example, settings, used, ratio, ignored, _calibration(data, settings, used))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        pruner.step()
    groups, history = tuple(pruner.report.groups), pruner.pruning_history()
    if discard:
        model = copy.deepcopy(dense).eval()
        replay = _pruner(model, example, settings, Fusion.preset("discard"), ratio, [])
        replay.load_pruning_history(history)
        groups = tuple(replace(group, merged="selection", cost=None, reason="") for group in groups)
    model.zero_grad(set_to_none=True)
    _check_output(model, dense, example)
    return Pruned(model, groups, _digest(history))


def group_roots(model: nn.Module, example: Tensor, settings: PruneSection) -> list[str]:
    """The names of the layers that groups start at, in the order of the network's modules."""
    copied = copy.deepcopy(model).eval()
    ignored = ignored_layers(copied, settings.ignored)
    pruner = _pruner(copied, example, settings, Fusion.preset("discard"), 0.5, ignored)
    groups = pruner.DG.get_all_groups(ignored_layers=pruner.ignored_layers, root_module_types=pruner.root_module_types)
    roots = {id(group[0].dep.target.module) for group in groups}
    return [name for name, module in copied.named_modules() if id(module) in roots]


def ignored_layers(model: nn.Module, patterns: Sequence[str]) -> list[nn.Module]:
    """The modules whose names match one of the patterns (``*`` stands for anything, dots included).

    Raises:
        LabError: a pattern matches nothing.
    """
    names = {name: module for name, module in model.named_modules() if name}
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            shown = [name for name, module in names.items() if isinstance(module, nn.Conv2d | nn.Linear)]
            raise LabError(f"'{pattern}' matches no layer; convolutions and linear layers: {', '.join(shown)}")
        found |= {name: names[name] for name in matched}
    return list(found.values())


def _pruner(
    model: nn.Module, example: Tensor, settings: PruneSection, fusion: Fusion, ratio: float,
    ignored: list[nn.Module], calibration: list[Tensor] | None = None,
) -> IntraFusionPruner:  # fmt: skip
    return IntraFusionPruner(
        model,
        (example,),
        IMPORTANCES[settings.importance](),
        global_pruning=settings.global_pruning,
        pruning_ratio=ratio,
        ignored_layers=ignored,
        round_to=settings.round_to,
        fusion=fusion,
        calibration=calibration,
    )


def _calibration(data: Dataset, settings: PruneSection, fusion: Fusion) -> list[Tensor] | None:
    """Unlabelled training images for a fusion that is corrected with images, ``None`` for any other."""
    if fusion.correct != "calibrated":
        return None
    return [images for images, _ in data.draw("train", settings.images, seed=settings.seed)]


def _accumulate_gradients_(model: nn.Module, data: Dataset, settings: PruneSection) -> None:
    """Leave the gradient of the mean loss over ``settings.images`` training images in ``.grad``."""
    generator = torch.Generator().manual_seed(settings.seed)
    device = next(model.parameters()).device
    count = min(settings.images, len(data.split("train")))
    left = count
    with torch.enable_grad():
        for images, labels in data.batches("train", min(100, count), generator=generator, device=device):
            images, labels = images[:left], labels[:left]
            (F.cross_entropy(model(images), labels, reduction="sum") / count).backward()
            left -= len(labels)
            if left <= 0:
                break


def _check_output(model: nn.Module, dense: nn.Module, example: Tensor) -> None:
    with torch.no_grad():
        before, after = dense(example).shape, model(example).shape
    if before != after:
        raise OutputChanged(
            f"pruning changed the network's output from {before[-1]} to {after[-1]} values; "
            "its last layer must be left alone"
        )


def _digest(history: Sequence[Any]) -> str:
    plain = sorted((str(name), bool(out), sorted(int(i) for i in removed)) for name, out, removed in history)
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16]
