"""Batch-norms that no layer of the group can take in: behind a concat, a sum, or a layer that is used twice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch_pruning import ops

from intrafusion.groups.batchnorm import correlation, merge_alone, read
from intrafusion.groups.draft import Draft, Mix
from intrafusion.groups.gaussian import Gaussian
from intrafusion.groups.kinds.base import LayerKind, Place, Reached, Side, Slot, present, register
from intrafusion.groups.kinds.filters import filters_of, put_batchnorm


class BatchNorm(LayerKind):
    """A batch-norm; one that can be folded into the layer before it is that layer's `partner`, and written with it."""

    modules = (ops.TORCH_BATCHNORM,)
    is_batchnorm = True

    def slot(self, at: Reached) -> Slot | str | None:
        return at.slot(self, Side.PASSES, at.owner.num_features)

    def places(self, slot: Slot) -> tuple[Place, ...]:
        return present(*(slot.place(name) for name in ("weight", "bias", "running_mean", "running_var")))

    def write(self, draft: Draft, slot: Slot, rows: Mix, columns: Mix, group: Sequence[Slot]) -> None:
        bn = slot.owner
        if any(other.partner is bn for other in group):
            return
        if bn.running_mean is None:
            super().write(draft, slot, rows, columns, group)
            return
        stats = read(bn)
        device = stats.mean.device
        mix, places, local = (t.to(device) for t in (rows.weights, rows.places, slot.local))
        rho = input_correlation(group, device)
        for copy in local.unbind(dim=1):
            there = copy[places] >= 0
            new = merge_alone(stats.at(copy), mix[there], rho, affine=bn.affine)
            put_batchnorm(draft, bn, copy[places][there], new)

    def moments(self, slot: Slot, inputs: Gaussian | None) -> Gaussian | None:
        """Its own mean and variance, the correlation of its input with the sign of its gain."""
        if inputs is None or slot.owner.running_mean is None:
            return inputs
        bn = read(slot.owner).at(slot.local[:, 0].to(slot.owner.running_mean.device))
        std = bn.gamma * (bn.var / (bn.var + bn.eps)).sqrt()
        return Gaussian(bn.beta, std[:, None] * inputs.correlation * std)


def input_correlation(group: Sequence[Slot], device: torch.device) -> Tensor:
    """[n, n] correlation of a group's channels, from the filters that produce them (the identity if there are none)."""
    filters = [filters_of(slot.owner).filters(slot).to(device) for slot in group if slot.produces]
    if not filters:
        return torch.eye(len(group[0].local), dtype=torch.float64, device=device)
    return correlation(torch.cat(filters, dim=1))


register(BatchNorm())
