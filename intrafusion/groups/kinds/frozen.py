"""Batch-norms whose statistics, scales and shifts are buffers, as detectors keep those of their pretraining.

Every library has a class of its own for them, so they are known by what they hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning import ops

from intrafusion.groups.kinds.base import LayerKind, Place, Reached, Side, Slot, kind_of, present, register
from intrafusion.groups.kinds.normalisation import SIZES

_STATISTICS = ("running_mean", "running_var")
_BUFFERS = ("weight", "bias", *_STATISTICS)


class FrozenBatchNorm(LayerKind):
    """Its channels can be cut, and change places. They are not merged: their scales differ and cannot be trained."""

    rigid: ClassVar[str] = "is a frozen batch-norm, which is only cut (as an nn.BatchNorm2d it would be fused as well)"

    def __init__(self, modules: tuple[type, ...] = ()) -> None:
        self.modules, self.pruner = modules, FrozenPruner()

    def slot(self, at: Reached) -> Slot | str | None:
        return at.slot(self, Side.PASSES, len(at.owner.running_mean))

    def places(self, slot: Slot) -> tuple[Place, ...]:
        return present(*(slot.place(name) for name in _BUFFERS))


class FrozenPruner(tp.BasePruningFunc):
    """Cuts the buffers, and the attributes that hold their length."""

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        n = len(layer.running_mean)
        keep = torch.tensor(sorted(set(range(n)).difference(idxs)), device=layer.running_mean.device)
        for name in _BUFFERS:
            if isinstance(value := getattr(layer, name, None), Tensor):
                setattr(layer, name, value[keep])
        for name in SIZES:
            if type(size := getattr(layer, name, None)) is int and size == n:
                setattr(layer, name, len(keep))
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: Any) -> int:
        return len(layer.running_mean)

    get_in_channels = get_out_channels


def recognise(model: nn.Module) -> None:
    """Make the classes of a network's frozen batch-norms known, so that they are cut and not overlooked."""
    for module in model.modules():
        if kind_of(module) is None and _is_frozen(module):
            register(FrozenBatchNorm((type(module),)))


def _is_frozen(module: nn.Module) -> bool:
    """Does it hold a mean, a variance and maybe a scale and a shift for each channel, and nothing that is trained?"""
    held = {name: value for name in _BUFFERS if (value := module._buffers.get(name)) is not None}
    one_axis = all(value.dim() == 1 for value in held.values()) and len({len(value) for value in held.values()}) == 1
    known = one_axis and held.keys() >= set(_STATISTICS) and not isinstance(module, ops.TORCH_BATCHNORM)
    return (
        known
        and not isinstance(module, nn.modules.batchnorm._NormBase)
        and all(p is None for p in module._parameters.values())
    )
