"""Linear layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from intrafusion.groups.kinds.base import register
from intrafusion.groups.kinds.filters import MOST_INPUTS, Filters, Geometry


class Linear(Filters):
    """nn.Linear: channels are the last axis of its activations."""

    modules = (nn.Linear,)
    channel_axis = -1

    def outputs(self, layer: Any) -> int:
        return layer.out_features

    def inputs(self, layer: Any) -> int:
        return layer.in_features

    def can_refit(self, owner: Any) -> bool:
        return owner.in_features <= MOST_INPUTS

    def windows(self, layer: Any, inputs: Tensor, call: Geometry) -> Tensor:
        return inputs


register(Linear())
