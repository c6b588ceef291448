"""Neuron Merging (Kim et al., NeurIPS 2020): every removed channel is read from the kept one that is most like it.

The kept rows stay. A removed channel j is replaced by s·(kept channel i), s the ratio of their folded filters' norms,
so the consumer's column j, times s, is added to column i.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.rivals.base import WeightRival, same_class
from intrafusion import Pair, Plan, method
from intrafusion.groups.table import GroupTable
from intrafusion.methods.view import View
from intrafusion.ot import selection_pair

THRESHOLD = 0.1
"""Published for convolutions: below this cosine similarity a channel is not merged."""
LAMBDA = 0.85
"""Published for convolutions: the share of the cosine distance in the score; the rest is the bias distance."""


def merge_into_nearest(
    filters: Tensor, shifts: Tensor, kept: Tensor, allowed: Tensor, threshold: float = THRESHOLD, lam: float = LAMBDA
) -> Tensor:
    """Columns S [n, k]: the scaling matrix of the paper (algorithm for layers with batch-norm).

    filters: [n, d] and shifts: [n, p], folded, so that the sign of a batch-norm's weight is part of the filter.
    allowed: [n, k]. With y_j ~ s y_i + b the score of i is lam · (1 - cos) + (1 - lam) · |b| / s, the latter scaled to
    [0, 1] over the candidates. The authors' code exchanges the two batch-norms in s and b, and divides by variances
    where deviations are meant; here s and b are as derived.
    """
    norm = filters.norm(dim=1)
    unit = filters / norm.clamp(min=1e-300)[:, None]
    cosine = unit @ unit[kept].T
    scale = norm[:, None] / norm[kept].clamp(min=1e-300)[None, :]
    apart = (shifts[:, None, :] - scale[:, :, None] * shifts[kept][None, :, :]).norm(dim=2)
    apart = apart / scale.clamp(min=1e-300)
    never = torch.full_like(apart, torch.inf)
    possible = allowed.to(apart.device) & (norm[kept] > 0)[None, :]
    low = torch.where(possible, apart, never).amin(dim=1, keepdim=True)
    high = torch.where(possible, apart, -never).amax(dim=1, keepdim=True)
    apart = (apart - low) / (high - low).clamp(min=1e-300)
    score = torch.where(possible, lam * (1 - cosine) + (1 - lam) * apart, never)
    nearest = score.argmin(dim=1, keepdim=True)
    columns = torch.zeros_like(cosine)
    merged = possible.gather(1, nearest) & (cosine.gather(1, nearest) >= threshold)
    columns.scatter_(1, nearest, torch.where(merged, scale.gather(1, nearest), 0.0))
    columns[kept] = torch.eye(len(kept)).to(columns)
    return columns


@method("Neuron Merging")
class NeuronMerging(WeightRival):
    """One kept channel for each removed one."""

    def pair(self, table: GroupTable, plan: Plan, view: View) -> Pair:
        filters, shifts = self.weights(table, "filters"), self.weights(table, "biases")
        columns = merge_into_nearest(filters, shifts.to(filters), plan.kept, same_class(table, plan.kept))
        return Pair(selection_pair(plan.kept, table.n).rows, columns.cpu(), plan.kept)
