"""Prune a copy of a network as a recipe says: build the importance, run the pruner, check what comes out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

from intrafusion import (
    CHIPImportance,
    FLAPImportance,
    Fusion,
    GroupReport,
    IntraFusionPruner,
    ReconstructionImportance,
    WandaImportance,
)
from intrafusion.lab.data.dataset import Dataset
from intrafusion.lab.errors import LabError
from intrafusion.lab.models import closest, find_layers
from intrafusion.lab.recipe.sections import PruneSection
from intrafusion.running import copy_of

ALL = "all"


class OutputChanged(LabError):
    """Pruning removed values of the network's own output, or left layers that do not fit together."""


class OverrideError(LabError):
    """A pattern of ``overrides`` does not fit the groups of the network."""

    def __init__(self, pattern: str, message: str) -> None:
        super().__init__(message)
        self.pattern = pattern


IMPORTANCES: dict[str, Callable[..., Any]] = {
    "l1": lambda *_: tp.importance.GroupMagnitudeImportance(p=1),
    "l2": lambda *_: tp.importance.GroupMagnitudeImportance(p=2),
    "taylor": lambda *_: tp.importance.GroupTaylorImportance(),
    "lamp": lambda *_: tp.importance.LAMPImportance(p=2),
    "bn_scale": lambda *_: tp.importance.BNScaleImportance(),
    "random": lambda *_: tp.importance.RandomImportance(),
    "fpgm": lambda *_: tp.importance.FPGMImportance(p=2),
    "chip": lambda images, _: CHIPImportance(images()),
    "reconstruction": lambda images, _: ReconstructionImportance(images()),
    "reconstruction_backward": lambda images, _: ReconstructionImportance(images(), search="backward"),
    "reconstruction_data_free": lambda *_: ReconstructionImportance(),
    "flap": lambda images, ranked: FLAPImportance(images(), standardised=ranked),
    "wanda": lambda images, ranked: WandaImportance(images(), standardised=ranked),
}
"""How each is made: of a function that reads unlabelled training images, and of whether groups are ranked together."""
_NEEDS_GRADIENTS = frozenset({"taylor"})
_NEEDS_IMAGES = frozenset({"taylor", "chip", "reconstruction", "reconstruction_backward", "flap", "wanda"})


@dataclass(frozen=True)
class Pruned:
    """A pruned copy.

    Attributes:
        model: in eval mode, without gradients.
        groups: what happened to each group, step by step.
        kept: digest of every removed channel of every group; equal for networks that keep the same channels.
    """

    model: nn.Module
    groups: tuple[GroupReport, ...]
    kept: str


@dataclass(frozen=True)
class Coupled:
    """The layers of one group, by name: the one it starts at, all that produce its channels, all that read them."""

    name: str
    producers: tuple[str, ...]
    readers: tuple[str, ...]


def prune(
    dense: nn.Module, example: Tensor, settings: PruneSection, fusion: Fusion, ratio: float, *,
    data: Dataset, only: str = ALL, discard: bool = False, progress: bool = True,
) -> Pruned:  # fmt: skip
    """Prune a copy of ``dense``; the original is untouched.

    Args:
        example: ``[1, C, H, W]``.
        ratio: share of the channels that go, in [0, 1).
        data: where the images come from, if the importance or the fusion needs any.
        only: name of the one group to prune, or ``"all"``.
        discard: the honest twin instead: plain torch-pruning, cutting the very channels that ``fusion`` removes.
        progress: show progress bars (on a terminal only).

    Raises:
        LabError: a name matches no layer.
        OutputChanged: the last layer was pruned, or torch-pruning missed layers that belong together.
        intrafusion.FusionError: a group cannot be pruned.
    """
    model = copy_of(dense).eval()
    # With scores from before the only step, a discarding run keeps the same channels, without the work of fusing them.
    scored_once = not fusion.rescore and settings.iterative_steps == 1
    used = fusion.discarded() if discard and scored_once else fusion
    pruner = make_pruner(model, example, settings, used, ratio, data=data, only=only)
    pruner.progress = progress
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        for _ in range(settings.iterative_steps):
            if settings.importance in _NEEDS_GRADIENTS:
                _accumulate_gradients_(model, data, settings)
            pruner.step()
    groups, history = tuple(pruner.report.groups), pruner.pruning_history()
    if discard:
        model = copy_of(dense).eval()
        replay = _pruner(model, example, settings, Fusion.preset("discard"))
        replay.load_pruning_history(history)
        for size in pruner.report.attributes:  # numbers of heads and the like; history has channels only
            setattr(model.get_submodule(size.module), size.name, size.after)
        groups = tuple(replace(group, merged="selection", cost=None, reason="") for group in groups)
    model.zero_grad(set_to_none=True)
    _check_output(model, dense, example)
    return Pruned(model, groups, _digest(history))


def make_pruner(
    model: nn.Module, example: Tensor, settings: PruneSection, fusion: Fusion, ratio: float, *, data: Dataset,
    only: str = ALL,
) -> IntraFusionPruner:  # fmt: skip
    """The pruner of ``model`` that the settings describe, with ``settings.iterative_steps`` to go; see :func:`prune`.

    Raises:
        LabError: a name matches no layer.
    """
    ignored = ignored_layers(model, settings.ignored)
    if only != ALL:
        roots = group_roots(model, example, settings)
        if only not in roots:
            raise LabError(f"no group starts at '{only}'; groups: {', '.join(roots)}")
        ignored += [model.get_submodule(name) for name in roots if name != only]
    return _pruner(
        model,
        example,
        settings,
        fusion,
        ratio=ratio,
        ignored=ignored,
        importance=IMPORTANCES[settings.importance](lambda: _images(data, settings), settings.global_pruning),
        own_ratios={model.get_submodule(name): own for name, own in own_ratios(model, example, settings).items()},
        calibration=_images(data, settings) if fusion.correct == "calibrated" else None,
    )


def uses_images(settings: PruneSection, fusion: Fusion) -> bool:
    """Whether what is pruned depends on the training images."""
    return settings.importance in _NEEDS_IMAGES or fusion.correct == "calibrated"


def without_images(settings: PruneSection) -> PruneSection:
    """Settings that give the same widths from the weights alone, where they exist.

    Without a global ranking the importance decides which channels go, and never how many.
    """
    if settings.global_pruning or settings.importance not in _NEEDS_IMAGES:
        return settings
    return replace(settings, importance="l1")


def coupled_layers(model: nn.Module, example: Tensor, settings: PruneSection) -> list[Coupled]:
    """Every group that is pruned, in the order of the network's modules."""
    copied = copy_of(model).eval()
    pruner = _pruner(
        copied, example, settings, Fusion.preset("discard"), ignored=ignored_layers(copied, settings.ignored)
    )
    names = {
        id(module): name
        for name, module in copied.named_modules()
        if isinstance(module, tuple(pruner.root_module_types))
    }
    found: dict[str, Coupled] = {}
    for group in pruner.DG.get_all_groups(pruner.ignored_layers, pruner.root_module_types):
        layers = [(names[id(dep.target.module)], dep.handler) for dep, _ in group if id(dep.target.module) in names]
        produced = [name for name, handler in layers if pruner.DG.is_out_channel_pruning_fn(handler)]
        read = [name for name, handler in layers if name not in produced]
        found[layers[0][0]] = Coupled(layers[0][0], tuple(dict.fromkeys(produced)), tuple(dict.fromkeys(read)))
    return [found[name] for name in names.values() if name in found]


def group_roots(model: nn.Module, example: Tensor, settings: PruneSection) -> list[str]:
    """The names of the layers that groups start at, in the order of the network's modules."""
    return [group.name for group in coupled_layers(model, example, settings)]


def own_ratios(model: nn.Module, example: Tensor, settings: PruneSection) -> dict[str, float]:
    """The ratio of every group that ``settings.overrides`` gives one, by the group's name.

    Raises:
        LabError: a pattern matches no pruned layer, or one group is given two ratios.
    """
    found: dict[str, float] = {}
    groups = coupled_layers(model, example, settings) if settings.overrides else []
    for pattern, ratio in (settings.overrides or {}).items():
        chosen = find_layers(model, pattern)
        matched = {id(module) for layer in chosen.values() for module in layer.modules()}
        hit = [g for g in groups if any(id(model.get_submodule(name)) in matched for name in g.producers)]
        if not hit:
            pruned = [name for group in groups for name in group.producers]
            raise OverrideError(pattern, f"'{pattern}' matches no pruned layer; {closest(pattern, pruned)}")
        for group in hit:
            if found.setdefault(group.name, ratio) != ratio:
                message = f"the group of {', '.join(group.producers)} has the ratio {found[group.name]} already"
                raise OverrideError(pattern, message)
    return found


def ignored_layers(model: nn.Module, patterns: Sequence[str]) -> list[nn.Module]:
    """The modules whose names match one of the patterns (``*`` stands for anything, dots included).

    Raises:
        LabError: a pattern matches nothing.
    """
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        found |= find_layers(model, pattern)
    return list(found.values())


def _pruner(
    model: nn.Module, example: Tensor, settings: PruneSection, fusion: Fusion, *, ratio: float = 0.5,
    ignored: Sequence[nn.Module] = (), importance: Callable | None = None,
    own_ratios: Mapping[nn.Module, float] | None = None, calibration: list[Tensor] | None = None,
) -> IntraFusionPruner:  # fmt: skip
    return IntraFusionPruner(
        model,
        (example,),
        importance or IMPORTANCES["l1"](),
        global_pruning=settings.global_pruning,
        isomorphic=settings.isomorphic,
        pruning_ratio=ratio,
        pruning_ratio_dict=own_ratios,
        iterative_steps=settings.iterative_steps,
        ignored_layers=list(ignored),
        round_to=settings.round_to,
        widths=None if settings.widths is None else dict.fromkeys(settings.widths, ratio),
        fusion=fusion,
        calibration=calibration,
    )


def _images(data: Dataset, settings: PruneSection) -> list[Tensor]:
    """Unlabelled training images."""
    return [images for images, _ in data.draw("train", settings.images, seed=settings.seed)]


def _accumulate_gradients_(model: nn.Module, data: Dataset, settings: PruneSection) -> None:
    """Leave the gradient of the mean loss over ``settings.images`` training images in ``.grad``."""
    model.zero_grad(set_to_none=True)
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
        before = dense(example).shape
        try:
            after = model(example).shape
        except RuntimeError as error:
            raise OutputChanged(
                f"the pruned network cannot be run ({error}): torch-pruning does not follow its channels through some "
                "operation; leave the layers before it alone"
            ) from error
    if before != after:
        raise OutputChanged(
            f"pruning changed the network's output from {before[-1]} to {after[-1]} values; "
            "its last layer must be left alone"
        )


def _digest(history: Sequence[Any]) -> str:
    steps = [(str(name), bool(out), sorted(int(i) for i in removed)) for name, out, removed in history]
    plain = sorted(steps, key=lambda step: step[:2])  # the steps of one layer stay in their order
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16]
