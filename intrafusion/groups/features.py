"""One feature row per channel: its weights in every layer of the group, seen with batch-norm folded in."""

from __future__ import annotations

import torch
import torch_pruning as tp
from torch import Tensor

from intrafusion.groups.batchnorm import bias_of, folded_rows, read
from intrafusion.groups.layout import gather, to_channels
from intrafusion.groups.table import GroupTable, Role, Slot, batchnorm_of

_ROWS = (Role.PRODUCER, Role.DEPTHWISE, Role.SHIFT)


def channel_features(
    graph: tp.DependencyGraph, table: GroupTable, *, rows: bool = True, columns: bool = True, bias: bool = False
) -> Tensor:
    """[n, d] float64 features of a group's channels, on the device of its first layer.

    rows: the filters that produce a channel (and depthwise filters, embeddings, free parameters); columns: the weights
    that read it; bias: the folded shift of every producer. Raises ValueError if nothing is left to compare.
    """
    parts: list[Tensor] = []
    for slot in table.slots:
        if slot.role in _ROWS and rows:
            parts.append(_rows(slot))
        if slot.role is Role.CONSUMER and columns:
            parts.append(columns_of(graph, slot))
        if slot.role in (Role.PRODUCER, Role.DEPTHWISE) and bias:
            parts.append(gather(_shift(slot)[:, None], slot.local))
    if not parts:
        raise ValueError("no layer of the group has weights to compare with the chosen features")
    return torch.cat([part.to(parts[0].device) for part in parts], dim=1)


def _rows(slot: Slot) -> Tensor:
    if slot.role is Role.SHIFT:
        weight = slot.owner if isinstance(slot.owner, torch.nn.Parameter) else slot.owner.weight
        return gather(to_channels(weight.detach().double(), slot.axis), slot.local)
    matrix = to_channels(slot.owner.weight.detach().double(), slot.axis, slot.chunks)
    return folded_rows(slot.partner, matrix, slot.local)


def columns_of(graph: tp.DependencyGraph, slot: Slot) -> Tensor:
    """[n, d] weights that read each channel, times the scale of the batch-norm that follows the reader."""
    weight = slot.owner.weight.detach().double()
    bn = batchnorm_of(graph, slot.owner)
    if bn is not None:
        out_axis = 1 - slot.axis
        weight = weight * read(bn).scale.reshape([-1 if axis == out_axis else 1 for axis in range(weight.dim())])
    return gather(to_channels(weight, slot.axis, slot.chunks), slot.local)


def _shift(slot: Slot) -> Tensor:
    bias = bias_of(slot.owner, slot.size)
    if slot.partner is None:
        return bias
    bn = read(slot.partner)
    return bn.scale * (bias - bn.mean) + bn.beta
