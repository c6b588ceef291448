"""A small network, its pruners, and a method that is written down again: for the tests of methods and steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch_pruning as tp
from torch import Tensor, nn

from intrafusion import (
    Fusion,
    IntraFusionBNScalePruner,
    IntraFusionGroupNormPruner,
    IntraFusionGrowingRegPruner,
    IntraFusionPruner,
    Method,
    Pair,
    Plan,
)
from tests.nets import Plain, randomise_

PRUNERS = [IntraFusionPruner, IntraFusionBNScalePruner, IntraFusionGroupNormPruner, IntraFusionGrowingRegPruner]


def dense() -> nn.Module:
    torch.manual_seed(0)
    return randomise_(Plain(16))


def batches(count: int = 2) -> list[Tensor]:
    return [torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def build(fusion: str | Fusion, calibration=None, make: Callable = IntraFusionPruner, **more) -> IntraFusionPruner:
    """A pruner that halves conv1, conv2 and fc1 of `Plain`."""
    model, l1 = dense(), tp.importance.GroupMagnitudeImportance(p=1)
    pruner = make(
        model, torch.zeros(2, 3, 8, 8), l1, pruning_ratio=0.5, ignored_layers=[model.fc2], fusion=fusion,
        calibration=calibration, **more,
    )  # fmt: skip
    pruner.progress = False
    return pruner


def stepped(fusion: str | Fusion, calibration=None) -> nn.Module:
    pruner = build(fusion, calibration)
    pruner.step()
    return pruner.model


def error(model: nn.Module) -> float:
    """Mean squared difference to the dense network on inputs that nobody has seen."""
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return float((model(x) - dense()(x)).square().mean())


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def summed(plan: Plan) -> Pair:
    """`paper`, written down again: the coefficients of every channel sum to 1."""
    columns = plan.coupling / plan.source[:, None]
    return Pair(columns.T.clone(), columns, plan.kept)


class Summed(Method):
    """The same as a class."""

    def pair(self, table, plan, view) -> Pair:
        return summed(plan)
