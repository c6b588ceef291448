"""One feature row per channel: its weights in every layer of the group, seen with batch-norm folded in."""

from __future__ import annotations

import torch
import torch_pruning as tp
from torch import Tensor

from intrafusion.groups.kinds.base import Slot
from intrafusion.groups.table import GroupTable, batchnorm_of


def channel_features(
    graph: tp.DependencyGraph, table: GroupTable, *, rows: bool = True, columns: bool = True, bias: bool = False
) -> Tensor:
    """[n, d] float64 features of a group's channels, on the device of its first layer.

    rows: the filters that produce a channel (and depthwise filters, embeddings, free parameters); columns: the weights
    that read it; bias: the folded shift of every producer. Raises ValueError if nothing is left to compare.
    """
    parts: list[Tensor | None] = []
    for slot in table.slots:
        parts.append(slot.kind.features(slot) if rows else None)
        parts.append(columns_of(graph, slot) if columns else None)
        parts.append(slot.kind.shifts(slot) if bias else None)
    found = [part for part in parts if part is not None]
    if not found:
        raise ValueError("no layer of the group has weights to compare with the chosen features")
    return torch.cat([part.to(found[0].device) for part in found], dim=1)


def columns_of(graph: tp.DependencyGraph, slot: Slot) -> Tensor | None:
    """[n, d] weights that read each channel, times the scale of the batch-norm behind it; None for no reader."""
    return slot.kind.columns(slot, batchnorm_of(graph, slot.owner))
