"""LBYL, "leave before you leave" (Lee et al., arXiv 2502.08474): a removed channel is read from all the kept ones.

For every removed channel j the coefficients s of the kept channels minimise

    |f_j - sum_i s_i f_i|^2  +  weight_bn · (c_j - sum_i s_i c_i)^2  +  weight_ridge · |s|^2

with folded filters f and folded biases c: the residual error, the batch-norm error and the activation error. The two
weights are tuned per network and ratio in the paper.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.rivals.base import WeightRival, same_class
from intrafusion.ot import Pair, Plan, selection_pair
from intrafusion.surgery.groups import GroupTable


def combine(
    filters: Tensor, shifts: Tensor, kept: Tensor, classes: Tensor, weight_bn: float, weight_ridge: float
) -> Tensor:
    """Columns S [n, k] of the closed form; kept channels are read from themselves.

    filters: [n, d]; shifts: [n, p]; classes: [n]. weight_ridge is in units of the kept filters' mean squared norm, so that
    it means the same in layers of any scale.
    """
    same = (classes[:, None] == classes[None, :]).to(filters)
    gram = (filters @ filters.T + weight_bn * (shifts @ shifts.T)) * same
    system = gram[kept][:, kept]
    size = filters[kept].square().sum(dim=1).mean().clamp(min=1e-300)
    system = system + weight_ridge * size * torch.eye(len(kept)).to(system)
    columns = torch.linalg.solve(system, gram[:, kept].T).T.contiguous()
    columns[kept] = torch.eye(len(kept)).to(columns)
    return columns


class LBYL(WeightRival):
    """All kept channels for each removed one."""

    def __init__(self, *args: Any, weight_bn: float, weight_ridge: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weight_bn, self.weight_ridge = weight_bn, weight_ridge

    def pair(self, table: GroupTable, plan: Plan) -> Pair:
        filters, shifts = self.filters(table), self.shifts(table)
        classes = table.classes.to(filters.device)
        columns = combine(
            filters, shifts.to(filters), plan.kept.to(filters.device), classes, self.weight_bn, self.weight_ridge
        )
        return Pair(selection_pair(plan.kept, table.n).rows, columns.cpu(), plan.kept)
