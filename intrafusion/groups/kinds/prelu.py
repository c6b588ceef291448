"""PReLU: a slope for each channel, or one for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.groups.gaussian import Gaussian
from intrafusion.groups.kinds.base import LayerKind, Place, Reached, Side, Slot, own_values, present, register


class PReLU(LayerKind):
    """nn.PReLU: slopes are gains, averaged where channels are mixed."""

    modules = (nn.PReLU,)

    def slot(self, at: Reached) -> Slot | str | None:
        return at.slot(self, Side.PASSES, at.owner.num_parameters) if at.owner.num_parameters > 1 else None

    def places(self, slot: Slot) -> tuple[Place, ...]:
        return present(slot.place("weight", averaged=True))

    def pointwise(self, owner: Any) -> Callable[[Tensor], Tensor] | None:
        slope = owner.weight.detach().double()
        return None if owner.num_parameters > 1 else lambda z: torch.where(z > 0, z, slope * z)

    def moments(self, slot: Slot, inputs: Gaussian | None) -> Gaussian | None:
        slope = own_values(slot)[:, :1]
        return None if inputs is None else inputs.through(lambda z: torch.where(z > 0, z, slope * z))


register(PReLU())
