"""Normalisations without statistics of their own: LayerNorm, GroupNorm, InstanceNorm, RMSNorm and users' own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning import ops

from intrafusion.groups.gaussian import Gaussian
from intrafusion.groups.kinds.base import LayerKind, Reached, Side, Slot, kind_of, register
from intrafusion.groups.layout import gather, to_channels

SIZES = ("normalized_shape", "dim", "d_model", "hidden_size", "num_features", "features", "size")
"""Where classes of this kind hold their width: a number, or a tuple that ends with it."""


class Normalisation(LayerKind):
    """A normalisation forgets the scale of what it reads, so its weight carries the scale of the merge.

    centred: is the mean over the channels taken out?
    """

    centred: bool = True
    channel_axis: ClassVar[int] = -1

    def moments(self, slot: Slot, inputs: Gaussian | None) -> Gaussian | None:
        """Mean 0 (if it is taken out) and power 1 over all the channels, then gain and shift."""
        if inputs is None:
            return None
        mean = inputs.mean - inputs.mean.mean() if self.centred else inputs.mean
        power = (inputs.cov.diagonal() + mean.square()).mean().clamp(min=1e-300)
        mean, cov = mean / power.sqrt(), inputs.cov / power
        gain, shift = (_vector(slot, name) for name in ("weight", "bias"))
        if gain is not None:
            mean, cov = gain * mean, gain[:, None] * cov * gain
        return Gaussian(mean if shift is None else mean + shift, cov)


class LayerNorm(Normalisation):
    modules = (ops.TORCH_LAYERNORM,)

    def slot(self, at: Reached) -> Slot | str | None:
        shape, dim = at.owner.normalized_shape, at.node.pruning_dim
        if len(shape) < -dim:
            return f"{at.name!r} normalises over a dimension that torch-pruning does not cut"
        return at.slot(self, Side.PASSES, shape[dim], axis=dim)


class GroupNorm(Normalisation):
    modules = (ops.TORCH_GROUPNORM,)
    channel_axis = 1

    def slot(self, at: Reached) -> Slot | str | None:
        return at.slot(self, Side.PASSES, at.owner.num_channels, at.owner.num_groups)


class InstanceNorm(Normalisation):
    modules = (ops.TORCH_INSTANCENORM,)
    channel_axis = 1

    def slot(self, at: Reached) -> Slot | str | None:
        if at.owner.track_running_stats:
            return f"{at.name!r} is an instance-norm with running statistics, which torch-pruning cannot cut"
        return at.slot(self, Side.PASSES, at.owner.num_features)


class RMSNorm(Normalisation):
    """A norm over the last axis that torch-pruning does not know: nn.RMSNorm, or a class of the user's."""

    centred = False
    is_composite = True

    def __init__(self, modules: tuple[type, ...] = (nn.RMSNorm,), sizes: Sequence[str] = SIZES) -> None:
        self.modules = modules
        self.pruner = NormPruner(sizes)

    def slot(self, at: Reached) -> Slot | str | None:
        size = norm_width(at.owner)
        if size is None:
            return f"{at.name!r} ({type(at.owner).__name__}) has no weight of one axis: its width is not known"
        return at.slot(self, Side.PASSES, size)


class NormPruner(tp.BasePruningFunc):
    """Cuts the weight (and bias) of a norm over the last axis, and the attributes that hold its width.

    sizes: names of the attributes that may; those of the layer's width are changed.
    """

    def __init__(self, sizes: Sequence[str] = SIZES) -> None:
        super().__init__(pruning_dim=-1)
        self.sizes = tuple(sizes)

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        n, gone = norm_width(layer), set(idxs)
        if n is None:
            return layer
        keep = [i for i in range(n) if i not in gone]
        for name in ("weight", "bias"):
            if isinstance(getattr(layer, name, None), nn.Parameter):
                setattr(layer, name, self._prune_parameter_and_grad(getattr(layer, name), keep, -1))
        for name in self.sizes:
            old = getattr(layer, name, None)
            if type(old) is int and old == n:
                setattr(layer, name, len(keep))
            elif isinstance(old, (tuple, list)) and list(old[-1:]) == [n]:
                setattr(layer, name, type(old)((*old[:-1], len(keep))))
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: Any) -> int | None:
        return norm_width(layer)

    get_in_channels = get_out_channels


def norm_width(layer: Any) -> int | None:
    """How many channels a norm over the last axis has; None if it is over several axes, or does not say."""
    weight = getattr(layer, "weight", None)
    shape = tuple(getattr(layer, "normalized_shape", ()) if weight is None else weight.shape)
    return shape[0] if len(shape) == 1 else None


def register_norm(cls: type, *, sizes: Sequence[str] = SIZES, centred: bool = False) -> None:
    """Let a class of your own be fused and cut like nn.RMSNorm.

    cls: a module with a parameter `weight` [channels], and maybe `bias`, that normalises over the last axis. sizes:
    names of the attributes that hold the number of channels, if its forward reads one. centred: does it subtract the
    mean, as LayerNorm does?

    >>> intrafusion.register_norm(MyRMSNorm)
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register_norm takes a class of modules, not {cls!r}")
    kind = RMSNorm((cls,), sizes)
    kind.centred = centred
    register(kind)


def recognise_norms(model: nn.Module) -> None:
    """Make a network's own classes known that compute what nn.RMSNorm does: that is tried, whatever they are called."""
    for module in model.modules():
        if kind_of(module) is None and _is_rms_norm(module):
            register_norm(type(module))


def _is_rms_norm(module: Any) -> bool:
    """Has it one parameter, a weight of one axis, and gives weight · x / rms(x)?"""
    weight = module._parameters.get("weight")
    held = [*module.parameters(), *module.buffers()]
    if len(held) != 1 or weight is None or weight.dim() != 1 or not weight.is_floating_point() or not len(weight):
        return False
    x = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    wanted = weight * x * x.square().mean(dim=-1, keepdim=True).rsqrt()
    try:
        with torch.no_grad():
            given = module(x)
    except Exception:  # whatever a foreign module raises: it is none
        return False
    return isinstance(given, Tensor) and given.shape == x.shape and torch.allclose(given, wanted, rtol=1e-2, atol=1e-4)


def _vector(slot: Slot, name: str) -> Tensor | None:
    value = getattr(slot.owner, name, None)
    if value is None:
        return None
    return gather(to_channels(value.detach().double(), slot.axis), slot.local[:, :1]).mean(dim=1)


for _kind in (LayerNorm(), GroupNorm(), InstanceNorm(), RMSNorm()):
    register(_kind)
