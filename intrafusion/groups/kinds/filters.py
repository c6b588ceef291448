"""What linear layers and convolutions have in common: a filter per output channel, maybe a batch-norm behind."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from intrafusion.groups.batchnorm import bias_of, merge, read
from intrafusion.groups.draft import Draft, Mix
from intrafusion.groups.gaussian import Gaussian
from intrafusion.groups.kinds.base import LayerKind, Place, Reached, Side, Slot, kind_of, present
from intrafusion.groups.layout import at_least_float32, from_channels, gather, pick, scaled, to_channels

MOST_INPUTS = 8192
"""A layer whose outputs read more values than this is not refitted: its Gram matrix would not fit in memory."""


@dataclass(frozen=True)
class Geometry:
    """How one call of a convolution reads its input: what really arrives there, not what the layer's attributes say."""

    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()


PLAIN = Geometry()
"""Of a layer that is no convolution."""


class Filters(LayerKind):
    """A layer that makes each of its outputs from all (or a chunk) of its inputs."""

    is_map = True
    makes = True

    @abstractmethod
    def outputs(self, layer: Any) -> int:
        """How many channels the layer gives."""

    @abstractmethod
    def inputs(self, layer: Any) -> int:
        """How many channels the layer reads."""

    @abstractmethod
    def windows(self, layer: Any, inputs: Tensor, call: Geometry) -> Tensor:
        """[*places, ...] a view: for every place of an output all that is read there, in the order of the weight.

        inputs: what the call of the layer was given. call: how it reads them.
        """

    def groups(self, layer: Any) -> int:
        """How many chunks of inputs are read, each by its own outputs."""
        return 1

    def input_axis(self, layer: Any) -> int:
        return 1 - self.output_axis(layer)

    def can_fold(self, owner: Any) -> bool:
        return True

    def folded_weight(self, layer: Any, bn: Any) -> Tensor:
        """The weight in float64, with the scale of its batch-norm (or None)."""
        weight = layer.weight.detach().double()
        if bn is None:
            return weight
        axis = self.output_axis(layer)
        return weight * read(bn).scale.reshape([-1 if a == axis else 1 for a in range(weight.dim())])

    def slot(self, at: Reached) -> Slot | str | None:
        layer = at.owner
        if at.tied:
            return f"{at.name!r} ties its weight to another layer (torch-pruning unties them)"
        chunks = self.groups(layer)
        if at.outputs:
            return at.slot(self, Side.MAKES, self.outputs(layer), chunks, self.output_axis(layer), at.partner)
        return at.slot(self, Side.READS, self.inputs(layer), chunks, self.input_axis(layer))

    def places(self, slot: Slot) -> tuple[Place, ...]:
        if slot.reads:
            return present(slot.place("weight", chunks=slot.chunks, reader=slot.name))
        return present(slot.place("weight"), slot.place("bias"))

    def write(self, draft: Draft, slot: Slot, rows: Mix, columns: Mix, group: Sequence[Slot]) -> None:
        if slot.partner is None:
            super().write(draft, slot, rows, columns, group)
        else:
            self.write_folded(draft, slot, rows)

    def write_folded(self, draft: Draft, slot: Slot, rows: Mix, averaged: bool = False) -> None:
        """A layer and its batch-norm: merged as one affine map, split again into two real layers.

        averaged: the filters are gains on channels that are mixed already.
        """
        if not len(rows.places):  # channels that are tied to each other are never mixed, and have several places here
            return
        layer, bn = slot.owner, slot.partner
        old = draft.now(layer, "weight")
        weight = to_channels(old, slot.axis, slot.chunks)
        local, places = slot.local.to(weight.device), rows.places.to(weight.device)
        mix = rows.coefficients.to(weight.device)
        first, stats = local[:, 0], read(bn)
        bias = bias_of(layer, slot.size)[first]  # every channel of a producer is there
        new = merge(pick(weight, local), bias, stats.at(first), mix, affine=bn.affine, averaged=averaged)
        at = first[places]
        matrix = weight.clone()
        matrix[at] = new.rows
        draft.put(layer, "weight", from_channels(matrix, old, slot.axis, slot.chunks))
        put_batchnorm(draft, bn, at, new)
        if layer.bias is not None:
            draft.set_at(layer, "bias", at, new.bias)

    def can_shift(self, slot: Slot) -> bool:
        """Is there a bias, of the layer or its batch-norm, that can take up a shift of the channels?"""
        return slot.partner is not None or slot.owner.bias is not None

    def add_shift(self, draft: Draft, slot: Slot, kept: Tensor, shift: Tensor) -> None:
        """Add `shift` [k] to the channels `kept` [k]."""
        at = slot.local[:, 0][kept.cpu()]
        owner, name = (slot.owner, "bias") if slot.partner is None else (slot.partner, "bias")
        if slot.partner is not None and not slot.partner.affine:
            name = "running_mean"
            shift = -shift * (draft.of(slot.partner, "running_var")[at].cpu() + slot.partner.eps).sqrt()
        vector = draft.of(owner, name)
        at = at.to(vector.device)
        draft.set_at(owner, name, at, vector[at] + shift.to(vector))

    def filters(self, slot: Slot) -> Tensor:
        """[n, d] float64 filters of the channels, without batch-norm."""
        return gather(to_channels(slot.owner.weight.detach().double(), slot.axis, slot.chunks), slot.local)

    def features(self, slot: Slot) -> Tensor | None:
        if slot.reads:
            return None
        matrix = to_channels(slot.owner.weight.detach(), slot.axis, slot.chunks)
        if slot.partner is not None:
            matrix = scaled(matrix, read(slot.partner).scale, at_least_float32(matrix.dtype))
        return pick(matrix, slot.local)

    def columns(self, slot: Slot, bn: Any) -> Tensor | None:
        if not slot.reads:
            return None
        weight = slot.owner.weight.detach()
        if bn is not None:
            weight = self.folded_weight(slot.owner, bn).to(at_least_float32(weight.dtype))
        return pick(to_channels(weight, slot.axis, slot.chunks), slot.local)

    def shifts(self, slot: Slot) -> Tensor | None:
        if slot.reads:
            return None
        shift = bias_of(slot.owner, slot.size)
        if slot.partner is not None:
            bn = read(slot.partner)
            shift = bn.scale * (shift - bn.mean) + bn.beta
        return gather(shift[:, None], slot.local)

    def moments(self, slot: Slot, inputs: Gaussian | None) -> Gaussian | None:
        """Without its batch-norm: of white inputs, or, depthwise, of inputs that are white in space."""
        filters = self.filters(slot)
        bias = gather(bias_of(slot.owner, slot.size)[:, None], slot.local[:, :1])[:, 0]
        if inputs is None:
            return Gaussian(bias, filters @ filters.T)
        return Gaussian(bias + inputs.mean * filters.sum(dim=1), inputs.cov * (filters @ filters.T))


def filters_of(layer: Any) -> Filters:
    """The kind of a linear layer or convolution. Raises TypeError for another layer."""
    kind = kind_of(layer)
    if not isinstance(kind, Filters):
        raise TypeError(f"{type(layer).__name__} is neither a linear layer nor a convolution")
    return kind


def put_batchnorm(draft: Draft, bn: Any, at: Tensor, new: Any) -> None:
    """Write merged channels [c] into the entries `at` [c] of a batch-norm. new: a `batchnorm.Merged`."""
    draft.set_at(bn, "running_mean", at, new.mean)
    draft.set_at(bn, "running_var", at, new.var)
    if bn.affine:
        draft.set_at(bn, "weight", at, new.gamma)
        draft.set_at(bn, "bias", at, new.beta)
