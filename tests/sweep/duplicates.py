"""A network whose channels are equal in pairs, and a metric that keeps one of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion import IntraFusionPruner
from intrafusion.groups.places import move
from intrafusion.groups.table import GroupTable
from tests.sweep.layers import StandardisedConv2d

# Norms over several channels: a pair that becomes one counts half as much there as before, unless all do.
_TOGETHER = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class Pairs:
    """A metric for torch-pruning: the second of each pair is worth less; no score for a group without pairs."""

    def __init__(self) -> None:
        self._scores: dict[tuple[Any, Callable], Tensor] = {}
        self.left_out: list[str] = []

    def __call__(self, group: Any) -> Tensor | None:
        root = group[0].dep
        return self._scores.get((root.target.module, root.handler))

    @torch.no_grad()
    def make_(self, pruner: IntraFusionPruner, equal_columns: bool) -> None:
        """Make every second channel of each class a copy of the one before it, in every group that can be fused.

        equal_columns: are the two read with equal weights too? A plan that compares by what reads a channel finds only
        those.
        """
        for group in list(pruner.DG.get_all_groups(pruner.ignored_layers, pruner.root_module_types)):
            root, table = group[0].dep, pruner.table(group)
            source = _source(table)
            copies = source != torch.arange(table.n)
            if table.unsupported or 2 * int(copies.sum()) != table.n:
                self.left_out.append(f"{table.name}: {table.unsupported or 'not all channels have a partner'}")
                continue
            for place in (place for slot in table.slots for place in slot.places):
                if equal_columns or not place.reads:
                    place.tensor.data = move(place.tensor.data, (place, source))
            self._scores[root.target.module, root.handler] = 2.0 - copies.float()

    def problem(self, model: nn.Module) -> str:
        """Why the pairs of this network do not merge without a trace by themselves ('' if they do)."""
        if self.left_out and any(isinstance(module, _TOGETHER) for module in model.modules()):
            return "a norm counts pairs and single channels together: " + "; ".join(self.left_out)
        if any(isinstance(module, StandardisedConv2d) for module in model.modules()):
            return "the deviation of a standardised filter changes with its columns"
        return "" if self._scores else "no group has pairs: " + "; ".join(self.left_out)


def _source(table: GroupTable) -> Tensor:
    """[n] which channel each is to equal: the one before it in its class, for every second."""
    source = torch.arange(table.n)
    for label in table.classes.unique():
        members = (table.classes == label).nonzero().flatten()
        source[members[1::2]] = members[: len(members) // 2 * 2 : 2]
    return source
