"""Parameters that stand in the network by themselves: positions, tokens, layer scales."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from intrafusion.groups.gaussian import Gaussian
from intrafusion.groups.kinds.base import LayerKind, Place, Reached, Side, Slot, own_values, present, register
from intrafusion.groups.layout import gather, to_channels


class Values(LayerKind):
    """What has values of its own for each channel, whatever the input."""

    def features(self, slot: Slot) -> Tensor | None:
        return own_values(slot) if slot.makes_channels else None

    def moments(self, slot: Slot, inputs: Gaussian | None) -> Gaussian | None:
        """Each channel's values, all of them equally likely."""
        weight = slot.owner if isinstance(slot.owner, nn.Parameter) else slot.owner.weight
        values = gather(to_channels(weight.detach().double(), slot.axis), slot.local[:, :1])
        return Gaussian(values.mean(dim=1), torch.cov(values, correction=0).reshape(len(values), len(values)))


class Parameter(Values):
    """A free nn.Parameter: added to the channels, or multiplied with them; the reader's autograd node tells which."""

    modules = (nn.Parameter,)

    def slot(self, at: Reached) -> Slot | str | None:
        multiplied = any("mul" in str(getattr(reader.module, "_grad_fn", "")).lower() for reader in at.node.outputs)
        side = Side.PASSES if multiplied else Side.MAKES
        return at.slot(self, side, at.owner.shape[at.node.pruning_dim], axis=at.node.pruning_dim)

    def places(self, slot: Slot) -> tuple[Place, ...]:
        return present(slot.place("data", averaged=slot.side is Side.PASSES))


register(Parameter())
