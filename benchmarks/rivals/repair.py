"""REPAIR (Jordan et al., arXiv 2211.08403): every pre-activation gets back the mean and deviation that it should have.

For a merged channel these are the members' means and deviations, averaged as the rows are. Layers are repaired in the
order of the forward pass, each on what the repaired layers before it give.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.rivals.base import mean_spread, reestimate_, set_spread_
from intrafusion import Method, Pair, Plan, method
from intrafusion.correct.correction import LayerView
from intrafusion.groups.kinds.filters import filters_of
from intrafusion.groups.layout import by_channel
from intrafusion.groups.table import GroupTable
from intrafusion.methods.view import View
from intrafusion.ot import selection_pair
from intrafusion.ot.merge import barycentre


@method("discard + batch-norm")
class Reestimated(Method):
    """Discard, then the statistics of every batch-norm from the images."""

    inputs = "calibration"
    plan = False

    def pair(self, table: GroupTable, plan: Plan, view: View) -> Pair:
        return selection_pair(plan.kept, table.n)

    def end_(self, view: View) -> None:
        reestimate_(view.model, view.run, view.batches)


@method("discard + REPAIR")
class Repaired(Method):
    """Discard, then repair every layer."""

    inputs = "calibration"
    plan = False
    after_cut = True

    def pair(self, table: GroupTable, plan: Plan, view: View) -> Pair:
        return selection_pair(plan.kept, table.n)

    @torch.no_grad()
    def repair_(self, layer: LayerView, view: View) -> None:
        axis = filters_of(layer.layer).channel_axis
        dense, now = _Statistics(axis), _Statistics(axis)
        for before, after in layer.sights:
            dense.add(before.output)
            now.add(after.output)
        weights = layer.rows.weights.to(dense.mean)
        rescale_(layer.layer, layer.norm, now.mean, now.std, weights @ dense.mean, weights.abs() @ dense.std)


@method("paper + REPAIR")
class RepairedPaper(Repaired):
    """Merge as published Intra-Fusion does, then repair every layer."""

    plan = True

    def pair(self, table: GroupTable, plan: Plan, view: View) -> Pair:
        """The plan's rows, averaged: their scale is what the repair decides."""
        pair = barycentre(plan)
        self._spread = mean_spread(table, pair.rows.cpu())
        return pair

    def mixed_(self, table: GroupTable, pair: Pair, view: View) -> None:
        if not pair.is_selection:
            set_spread_(self._spread, pair.kept)


class _Statistics:
    """Running mean and deviation per channel, in float64."""

    def __init__(self, axis: int) -> None:
        self.axis, self.n, self.sum, self.squares = axis, 0, torch.zeros(()), torch.zeros(())

    def add(self, value: Tensor) -> None:
        sample = by_channel(value, self.axis).double()
        self.n += len(sample)
        self.sum, self.squares = self.sum.to(sample) + sample.sum(0), self.squares.to(sample) + sample.square().sum(0)

    @property
    def mean(self) -> Tensor:
        return self.sum / self.n

    @property
    def std(self) -> Tensor:
        return (self.squares / self.n - self.mean.square()).clamp(min=0).sqrt()


def rescale_(layer: Any, bn: Any, mean: Tensor, std: Tensor, new_mean: Tensor, new_std: Tensor) -> None:
    """Change a layer (or its batch-norm) so that outputs with `mean`, `std` [L] get `new_mean`, `new_std` [L]."""
    alive = std > 1e-6 * std.max().clamp(min=1e-12)
    factor = torch.where(alive, new_std / torch.where(alive, std, 1.0), 1.0)
    if bn is not None and not bn.affine:
        _rescale_statistics_(bn, mean, factor, new_mean)
        return
    owner = layer if bn is None else bn
    old_bias = torch.zeros_like(mean) if owner.bias is None else owner.bias.detach().double()
    axis = 1 if owner is layer and getattr(layer, "transposed", False) else 0
    if axis == 1 and layer.groups > 1:
        return
    shape = [-1 if i == axis else 1 for i in range(owner.weight.dim())]
    weight = owner.weight.detach() * factor.reshape(shape).to(owner.weight)
    bias = (old_bias - mean) * factor + new_mean
    owner.weight = nn.Parameter(weight, requires_grad=owner.weight.requires_grad)
    owner.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=owner.weight.requires_grad)


def _rescale_statistics_(bn: Any, mean: Tensor, factor: Tensor, new_mean: Tensor) -> None:
    """The same for a batch-norm that has nothing but statistics."""
    old = (bn.running_var.double() + bn.eps).sqrt()
    new = old / factor.clamp(min=1e-6)
    bn.running_mean = (bn.running_mean.double() + mean * old - new_mean * new).to(bn.running_mean.dtype)
    bn.running_var = (new.square() - bn.eps).to(bn.running_var.dtype)
