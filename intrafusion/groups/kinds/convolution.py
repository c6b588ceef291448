"""Convolutions: ordinary, grouped, depthwise, transposed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch_pruning import ops

from intrafusion.groups.draft import Draft, Mix
from intrafusion.groups.kinds.base import LayerKind, Place, Reached, Side, Slot, present, register
from intrafusion.groups.kinds.filters import MOST_INPUTS, Filters, Geometry


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
        """Any number of dimensions, any padding, grouped ones too, of bearable width."""
        return owner.weight[0].numel() <= MOST_INPUTS

    def windows(self, layer: Any, inputs: Tensor, call: Geometry) -> Tensor:
        kernel = layer.kernel_size
        if any(padding := _padding(kernel, call)):
            inputs = F.pad(inputs, padding)
        images, channels, *sides = inputs.shape
        to_image, to_channel, *steps = inputs.stride()
        each = list(zip(sides, steps, kernel, call.stride, call.dilation, strict=True))
        places = [(side - apart * (size - 1) - 1) // stride + 1 for side, _, size, stride, apart in each]
        return inputs.as_strided(
            (images, *places, channels, *kernel),
            (to_image, *(s * stride for _, s, _, stride, _ in each), to_channel, *(s * a for _, s, _, _, a in each)),
        )


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


def _padding(kernel: Sequence[int], call: Geometry) -> list[int]:
    """As `F.pad` wants it. With `same` and an even kernel there is one more behind than before."""
    pairs = [(0, 0)] * len(kernel)
    if call.padding == "same":
        whole = [apart * (size - 1) for size, apart in zip(kernel, call.dilation, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in whole]
    elif not isinstance(call.padding, str):
        pairs = [(side, side) for side in call.padding]
    return [side for pair in reversed(pairs) for side in pair]


DEPTHWISE, TRANSPOSED = Depthwise(), Transposed()
register(Convolution())
