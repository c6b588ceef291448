"""Convolutions: ordinary, grouped, depthwise, transposed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch_pruning import ops

from intrafusion.groups.draft import Draft, Mix
from intrafusion.groups.kinds.base import LayerKind, Place, Reached, Side, Slot, present, register
from intrafusion.groups.kinds.filters import MOST_INPUTS, Filters


class Convolution(Filters):
    """Ordinary and grouped convolutions, and the registered one of the family: `of` tells the others apart."""

    modules = (ops.TORCH_CONV,)

    def of(self, owner: Any) -> LayerKind:
        if owner.out_channels > 1 and owner.groups == owner.out_channels == owner.in_channels:
            return DEPTHWISE
        return TRANSPOSED if owner.transposed else self

    def outputs(self, layer: Any) -> int:
        return layer.out_channels

    def inputs(self, layer: Any) -> int:
        return layer.in_channels

    def groups(self, layer: Any) -> int:
        return layer.groups

    def can_refit(self, owner: Any) -> bool:
        """1d and 2d convolutions, grouped ones too, of bearable width."""
        ordinary = isinstance(owner, (nn.Conv1d, nn.Conv2d)) and owner.padding_mode == "zeros"
        return ordinary and owner.weight[0].numel() <= MOST_INPUTS

    def patches(self, layer: Any, inputs: Tensor) -> Tensor:
        kernel, dilation, stride, padding = layer.kernel_size, layer.dilation, layer.stride, _padding(layer)
        if isinstance(layer, nn.Conv1d):
            inputs = inputs[..., None]
            kernel, dilation, stride, padding = (*kernel, 1), (*dilation, 1), (*stride, 1), (*padding, 0)
        if set(kernel) == {1} and set(padding) == {0}:
            return inputs[:, :, :: stride[0], :: stride[1]].movedim(1, -1).flatten(0, -2)
        patches = F.unfold(inputs, kernel, dilation=dilation, padding=padding, stride=stride)
        return patches.transpose(1, 2).flatten(0, 1)

    def patch_values(self, layer: Any, inputs: Tensor, output: Tensor) -> int:
        return output[0].numel() * inputs.shape[0] * math.prod(layer.kernel_size)


class Depthwise(Convolution):
    """One filter per channel: a gain on a channel that was mixed already, so filters are averaged, not summed."""

    modules = ()
    is_depthwise = True

    def can_fold(self, owner: Any) -> bool:
        return not owner.transposed

    def slot(self, at: Reached) -> Slot | str | None:
        return at.slot(self, Side.PASSES, at.owner.out_channels, partner=at.partner)

    def places(self, slot: Slot) -> tuple[Place, ...]:
        return present(slot.place("weight", averaged=True), slot.place("bias"))

    def write(self, draft: Draft, slot: Slot, rows: Mix, columns: Mix, group: Sequence[Slot]) -> None:
        if slot.partner is None:
            super().write(draft, slot, rows, columns, group)
        else:
            self.write_folded(draft, slot, rows, averaged=True)


class Transposed(Convolution):
    """Its weight has the inputs first. It is not refitted: its outputs overlap, so they read no patches."""

    modules = ()

    def output_axis(self, owner: Any) -> int:
        return 1

    def can_fold(self, owner: Any) -> bool:
        return owner.groups == 1

    def can_refit(self, owner: Any) -> bool:
        return False

    def slot(self, at: Reached) -> Slot | str | None:
        slot = super().slot(at)
        if isinstance(slot, Slot) and at.owner.groups > 1:
            return f"{at.name!r} is a grouped transposed convolution, which torch-pruning cuts at the wrong channels"
        return slot


def _padding(layer: Any) -> tuple[int, ...]:
    if layer.padding == "valid":
        return (0,) * len(layer.kernel_size)
    if layer.padding == "same":
        return tuple(d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    return layer.padding


DEPTHWISE, TRANSPOSED = Depthwise(), Transposed()
register(Convolution())
