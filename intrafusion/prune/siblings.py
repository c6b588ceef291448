"""Torch-Pruning's other pruners, fusing: they score and train differently, and hand out groups alike."""

from __future__ import annotations

import torch_pruning as tp

from intrafusion.prune.pruner import FusionMixin


class IntraFusionBNScalePruner(FusionMixin, tp.pruner.BNScalePruner):
    """Drop-in for `torch_pruning.pruner.BNScalePruner` (network slimming): same arguments, plus `fusion`."""


class IntraFusionGroupNormPruner(FusionMixin, tp.pruner.GroupNormPruner):
    """Drop-in for `torch_pruning.pruner.GroupNormPruner` (DepGraph sparse training): same arguments, plus `fusion`."""


class IntraFusionGrowingRegPruner(FusionMixin, tp.pruner.GrowingRegPruner):
    """Drop-in for `torch_pruning.pruner.GrowingRegPruner` (growing regularisation): same arguments, plus `fusion`."""
