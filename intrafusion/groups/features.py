"""One feature row per channel: its weights in every layer of the group, seen with batch-norm folded in."""

from __future__ import annotations

import torch
import torch_pruning as tp
from torch import Tensor

from intrafusion.groups.kinds.base import Slot
from intrafusion.groups.layout import at_least_float32
from intrafusion.groups.table import GroupTable, batchnorm_of


def channel_features(
    graph: tp.DependencyGraph, table: GroupTable, *, rows: bool = True, columns: bool = True, bias: bool = False
) -> Tensor:
    """[n, d] float64 features of a group's channels, on the device of its first layer; see :func:`feature_parts`."""
    parts = feature_parts(graph, table, rows=rows, columns=columns, bias=bias)
    return torch.cat([part.to(parts[0].device).double() for part in parts], dim=1)


def feature_parts(
    graph: tp.DependencyGraph, table: GroupTable, *, rows: bool = True, columns: bool = True, bias: bool = False
) -> list[Tensor]:
    """[n, d_i] each, together the features of a group's channels: views of the weights where they can be, to be read.

    rows: the filters that produce a channel (and depthwise filters, embeddings, free parameters); columns: the weights
    that read it; bias: the folded shift of every producer. What is computed comes in the precision of its weights, or
    float32 if that is more.
    Raises ValueError if nothing is left to compare.
    """
    parts: list[Tensor] = []
    for slot in table.slots:
        own = slot.owner if isinstance(slot.owner, Tensor) else next(slot.owner.parameters(), None)
        found = (
            slot.kind.features(slot) if rows else None,
            slot.kind.columns(slot, batchnorm_of(graph, slot.owner)) if columns else None,
            slot.kind.shifts(slot) if bias else None,
        )
        dtype = torch.float64 if own is None else at_least_float32(own.dtype)
        parts += [part.to(dtype) for part in found if part is not None]
    if not parts:
        raise ValueError("no layer of the group has weights to compare with the chosen features")
    return parts


def columns_of(graph: tp.DependencyGraph, slot: Slot) -> Tensor | None:
    """[n, d] float64 weights that read each channel, times the scale of the batch-norm behind; None for no reader."""
    columns = slot.kind.columns(slot, batchnorm_of(graph, slot.owner))
    return None if columns is None else columns.double()
