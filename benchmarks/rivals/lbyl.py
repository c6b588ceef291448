"""LBYL, "leave before you leave" (Lee et al., arXiv 2502.08474): a removed channel is read from all the kept ones.

For every removed channel j the coefficients s of the kept channels minimise

    |f_j - sum_i s_i f_i|^2  +  weight_bn · (c_j - sum_i s_i c_i)^2  +  weight_ridge · |s|^2

with folded filters f and folded biases c: the residual error, the batch-norm error and the activation error. The two
weights are tuned per network and ratio in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.rivals.base import WeightRival, pruned
from intrafusion import Fusion, Pair, Plan, method
from intrafusion.groups.table import GroupTable
from intrafusion.methods import METHODS
from intrafusion.methods.view import View
from intrafusion.ot import selection_pair
from intrafusion.running import evaluating

WEIGHT_BN, WEIGHT_RIDGE = 0.1, 1.0
"""A compromise between ResNet-20 and VGG11-BN, which would each like another pair; chosen on training images."""

GRID_BN = (0.0, 0.1, 1.0, 3.0)
GRID_RIDGE = (0.01, 0.1, 0.5, 2.0, 8.0)
"""What the two weights are tuned over."""

TUNED_ON = 250
"""Images that the tuning looks at: enough to tell 20 candidates apart, each of which has to be run on them."""


def combine(
    filters: Tensor, shifts: Tensor, kept: Tensor, classes: Tensor, weight_bn: float, weight_ridge: float
) -> Tensor:
    """Columns S [n, k] of the closed form; kept channels are read from themselves.

    filters: [n, d]; shifts: [n, p]; classes: [n]. weight_ridge is in units of the kept filters' mean squared norm, so
    that it means the same in layers of any scale.
    """
    same = (classes[:, None] == classes[None, :]).to(filters)
    gram = (filters @ filters.T + weight_bn * (shifts @ shifts.T)) * same
    system = gram[kept][:, kept]
    size = filters[kept].square().sum(dim=1).mean().clamp(min=1e-300)
    system = system + weight_ridge * size * torch.eye(len(kept)).to(system)
    columns = torch.linalg.solve(system, gram[:, kept].T).T.contiguous()
    columns[kept] = torch.eye(len(kept)).to(columns)
    return columns


@method("LBYL")
class LBYL(WeightRival):
    """All kept channels for each removed one.

    Attributes:
        weight_bn, weight_ridge: settings of a method are attributes of its class; another pair is another class.
    """

    weight_bn, weight_ridge = WEIGHT_BN, WEIGHT_RIDGE

    def pair(self, table: GroupTable, plan: Plan, view: View) -> Pair:
        filters, shifts = self.weights(table, "filters"), self.weights(table, "biases")
        classes = table.classes.to(filters.device)
        columns = combine(
            filters, shifts.to(filters), plan.kept.to(filters.device), classes, self.weight_bn, self.weight_ridge
        )
        return Pair(selection_pair(plan.kept, table.n).rows, columns.cpu(), plan.kept)


def candidate(weight_bn: float, weight_ridge: float) -> str:
    """The name of LBYL with these two weights, registered when it is first asked for."""
    name = f"LBYL({weight_bn}, {weight_ridge})"
    if name not in METHODS:
        method(name)(type("LBYL", (LBYL,), {"weight_bn": weight_bn, "weight_ridge": weight_ridge}))
    return name


def tuned_lbyl(
    dense: nn.Module,
    roots: Sequence[str] | None,
    ratio: float,
    importance: Callable,
    example_inputs: Any,
    *,
    images: Sequence[Tensor],
    seed: int = 0,
) -> nn.Module:
    """LBYL with the two weights whose network agrees most with the dense one on unlabelled images.

    The weights are chosen for the whole network, so that each candidate is pruned to its end: no method of its own, but
    the best of several. images: batches [N, ...]; `TUNED_ON` of them are used. Nothing is drawn: `seed` does nothing.
    """
    few = [batch.split(TUNED_ON)[0] for batch in images[:1]]
    candidates = [
        pruned(Fusion(merge=candidate(*weights)), dense, roots, ratio, importance, example_inputs)
        for weights in product(GRID_BN, GRID_RIDGE)
    ]
    return max(candidates, key=lambda model: agreement(dense, model, few))


@torch.no_grad()
def agreement(dense: nn.Module, model: nn.Module, images: Sequence[Tensor]) -> float:
    """Share of the images to which both networks give their largest output at the same place."""
    with evaluating(dense, model):
        same = [dense(batch).argmax(dim=-1) == model(batch).argmax(dim=-1) for batch in images]
    return float(torch.cat(same).float().mean())
