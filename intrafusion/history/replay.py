"""Prune a second network exactly as a first one was pruned: the same channels, mixed by the same pairs (R, S).

For an average of the first network's weights (EMA): channel k of the average must go on meaning what channel k of the
network means, or averaging them further makes no sense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning as tp
from torch_pruning.dependency.group import Group

from intrafusion.correct.correction import Correction
from intrafusion.groups.apply import Rewrite, cut_, write_
from intrafusion.groups.table import GroupTable, module_name, tabulate
from intrafusion.ot import Pair, selection_pair


@dataclass(frozen=True)
class GroupCut:
    """What was done to one group.

    root: name of its first layer; outputs: whether that loses output channels; removed: the root channels that went;
    channel_groups: torch-pruning's number of chunks; pair: how the rest was mixed (None: not at all); sizes: (module,
    attribute, value) of what else was set then; rewrite: what was written besides the pair, or None; inside: what the
    outputs of some layers stand for since, where the pair does not say (see `Correction.cut`).
    """

    root: str
    outputs: bool
    removed: tuple[int, ...]
    channel_groups: int
    pair: Pair | None
    sizes: tuple[tuple[str, str, Any], ...] = ()
    rewrite: Rewrite | None = None
    inside: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @staticmethod
    def of(graph: tp.DependencyGraph, group: Group, channel_groups: int, pair: Pair | None, **more: Any) -> GroupCut:
        root = group[0].dep
        outputs = graph.is_out_channel_pruning_fn(root.handler)
        removed = tuple(sorted({int(i) for i in group[0].idxs}))
        return GroupCut(module_name(graph, root.target.module), outputs, removed, channel_groups, pair, **more)


@torch.no_grad()
def replay_(graph: tp.DependencyGraph, cuts: Sequence[GroupCut], correction: Correction | None) -> None:
    """Prune the network of `graph` by the recorded `cuts`, in order; `correction` puts its layers right on the way.

    Raises ValueError, naming the group, if the network is not as wide as the first one was.
    """
    for cut in cuts:
        root = graph.model.get_submodule(cut.root)
        pruner: Any = graph.get_pruner_of_module(root)
        handler = pruner.prune_out_channels if cut.outputs else pruner.prune_in_channels
        table = tabulate(graph, root, handler, cut.channel_groups)
        kept = _kept(table, cut)
        if correction is not None:
            correction.come_to(table)
        write_(graph, table, cut.pair, cut.rewrite)
        cut_(graph, graph.get_pruning_group(root, handler, list(cut.removed)), table)
        for name, attribute, value in cut.sizes:
            held = getattr(graph.model.get_submodule(name), attribute)
            setattr(graph.model.get_submodule(name), attribute, type(held)(value))
        if correction is not None:
            correction.cut(table, cut.pair or selection_pair(kept, table.n), cut.inside)
    if correction is not None:
        correction.finish()


def _kept(table: GroupTable, cut: GroupCut) -> torch.Tensor:
    removed = set(cut.removed)
    expected = table.n if cut.pair is None else cut.pair.rows.shape[1]
    if table.n != expected or max(removed) >= table.n:
        raise ValueError(f"group {cut.root!r} has {table.n} channels, which is not the network that was pruned")
    return torch.tensor([i for i in range(table.n) if i not in removed], dtype=torch.long)
