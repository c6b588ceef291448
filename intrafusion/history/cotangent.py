"""The linear map that carries whatever is shaped like a parameter's gradient to the parameter that replaces it.

A fused network has the channels y' = R y and the readers V' = V S. If L' is its loss, the chain rule gives, where the
merged channels are duplicates (S R = the identity on what the network can produce),

    dL'/dy'_k = sum_j S_jk dL/dy_j        producers: rows of the gradient are mixed by S^T
    dL'/dV'_k = sum_j R_kj dL/dV_j        readers: columns are mixed by R

so a gradient, and a momentum (a smoothed gradient), is mixed by coefficients c: g' = sum_j c_j g_j. Where the readers
are refitted, S is the reading of the old channels from the new ones that the refit regresses to, not the plan's. The
second moment of g' is

    E[g'^2] = sum_ij c_i c_j E[g_i g_j]

which an optimizer does not know; of its two ends, gradients that move as one (duplicates) and independent ones,

    (sum_j c_j sqrt(E[g_j^2]))^2        and        sum_j c_j^2 E[g_j^2]

the larger is carried. It is exact for duplicates and for what is alone, never negative, and for coefficients of one
sign an upper bound (Cauchy-Schwarz), so that no step is larger than with the true moment.

A layer in front of a batch-norm is carried in folded coordinates, dL/d(aW) = dL/dW / a with the batch-norm's scale a:
the merge and the refit may split the folded layer into weight and scale differently from before, and flip the sign of
both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from intrafusion.groups.draft import Mix
from intrafusion.groups.kinds.base import Slot
from intrafusion.groups.layout import from_channels, mix_, to_channels
from intrafusion.groups.table import GroupTable
from intrafusion.ot import Pair


@dataclass(frozen=True)
class Mixing:
    """Coefficients of one tensor's channels: weights [c, n] for root channels `places` [c]; the rest as in `Slot`."""

    weights: Tensor
    places: Tensor
    local: Tensor
    axis: int = 0
    chunks: int = 1

    def __call__(self, value: Tensor, power: int) -> Tensor:
        """value: float64, of the parameter's shape. power 1: a gradient; 2: a second moment."""
        matrix = to_channels(value, self.axis, self.chunks).clone()
        local, weights, places = (t.to(value.device) for t in (self.local, self.weights, self.places))
        if power == 1:
            mix_(matrix, local, weights, places)
        else:
            mixed, alone = matrix.sqrt(), matrix.clone()
            mix_(mixed, local, weights, places)
            mix_(alone, local, weights.square(), places)
            target = local[places]
            target = target[target >= 0]
            matrix[target] = torch.maximum(mixed[target].square(), alone[target])
        return from_channels(matrix, value, self.axis, self.chunks)


@dataclass(frozen=True)
class Cut:
    """The entries along one axis that a cut leaves: kept [k] int64."""

    axis: int
    kept: Tensor

    def __call__(self, value: Tensor) -> Tensor:
        return value.index_select(self.axis, self.kept.to(value.device))


@dataclass(frozen=True)
class Cotangent:
    """From the gradient of a parameter to that of its successor: divide by `before`, mix, cut, multiply by `after`.

    before, after: [old channels] and [new channels] along `axis`, or None if no scale changed.
    """

    mixings: Sequence[Mixing] = ()
    cuts: Sequence[Cut] = ()
    axis: int = 0
    before: Tensor | None = None
    after: Tensor | None = None

    @property
    def is_selection(self) -> bool:
        """True if entries are only left out: what stays, stays bit for bit."""
        return not self.mixings and self.before is None

    def __call__(self, value: Tensor, power: int = 1) -> Tensor:
        """value: of the old parameter's shape; power 1: a gradient or momentum, 2: a second moment (not negative).

        Returns a tensor of the new parameter's shape in the dtype of `value`; the arithmetic is float64.
        """
        if self.is_selection:
            return self._cut(value).clone()
        result = value.detach().double()
        if self.before is not None:
            inverse = torch.where(self.before == 0, 0.0, 1.0 / self.before)
            result = result * self._along(inverse.abs() ** power if power == 2 else inverse, result)
        for mixing in self.mixings:
            result = mixing(result, power)
        result = self._cut(result)
        if self.after is not None:
            result = result * self._along(self.after.abs() ** power if power == 2 else self.after, result)
        return result.to(value.dtype)

    def _cut(self, value: Tensor) -> Tensor:
        for cut in self.cuts:
            value = cut(value)
        return value

    def _along(self, vector: Tensor, like: Tensor) -> Tensor:
        shape = [1] * like.dim()
        shape[self.axis] = -1
        return vector.to(like).reshape(shape)


def mixings(table: GroupTable, pair: Pair) -> list[tuple[Slot, str, Mixing]]:
    """(slot, name of the tensor in the slot's owner, map) of every tensor whose gradient `pair` mixes.

    The name is '' where the owner is the parameter itself.
    """
    read = pair.columns if pair.read is None else pair.read
    rows, columns = Mix.of(pair.rows, pair.kept), Mix.of(read.T, pair.kept)
    found = []
    for slot in table.slots:
        for place in slot.places:
            by = rows if place.reads else columns
            if len(by.places) and place.parameter_name is not None:
                map_ = Mixing(by.weights.double(), by.places, place.local, place.axis, place.chunks)
                found.append((slot, place.parameter_name, map_))
    return found
