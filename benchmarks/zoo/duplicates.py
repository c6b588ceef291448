"""A network half of whose channels are exact duplicates of others, and an importance under which those go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning.dependency.group import Group

from intrafusion import IntraFusionPruner
from intrafusion.groups.permutation_check import is_output, reordered
from intrafusion.groups.table import GroupTable
from intrafusion.running import copy_of


def duplicated(pruner: IntraFusionPruner, but: set[str]) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy of the pruner's network in which half of the channels of every group that can be fused are others again.

    but: names of groups that are left alone. Returns also, for each group, [n] whether a channel is an original.
    """
    groups = pruner.DG.get_all_groups(pruner.ignored_layers, pruner.root_module_types)
    tables = [pruner.table(group) for group in groups if not pruner.is_attention(group)]
    tables = [t for t in tables if t.name not in but and not t.unsupported and not is_output(pruner.DG, t)]
    orders = {table.name: (table, *halves(table.classes)) for table in tables if has_twins(table)}
    with reordered(*((table, order) for table, order, _ in orders.values())):
        model = copy_of(pruner.model)
    return model, {name: kept for name, (_, _, kept) in orders.items()}


def has_twins(table: GroupTable) -> bool:
    """Has every channel another one that it may be merged with?"""
    return int(table.classes.unique(return_counts=True)[1].min()) > 1


def halves(classes: Tensor) -> tuple[Tensor, Tensor]:
    """([n] of which channel each becomes a copy, [n] whether it stays itself, as the first half of each class does)."""
    order, kept = torch.arange(len(classes)), torch.zeros(len(classes), dtype=torch.bool)
    for label in classes.unique():
        members = (classes == label).nonzero().flatten()
        first = members[: len(members) // 2]
        order[members] = first[torch.arange(len(members)) % len(first)]
        kept[first] = True
    return order, kept


class Keep:
    """An importance for which originals are worth one and their copies nothing; other groups are left alone."""

    def __init__(self, kept: dict[str, Tensor], model: nn.Module) -> None:
        self._kept, self._names = kept, {module: name for name, module in model.named_modules()}

    def __call__(self, group: Group) -> Any:
        root: Any = group[0].dep.target.module
        kept = self._kept.get(self._names.get(root, ""))
        return None if kept is None or len(kept) != len(group[0].idxs) else kept.float()
