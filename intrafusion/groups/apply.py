"""Apply a pair (R, S) to a group: every slot in place at full size, then torch-pruning cuts.

Only the kept places are written, and of those only the ones that a merge changes, so that a selection leaves every
tensor bit for bit as torch-pruning would cut it. Gradients are not written here: `lineage.py` carries them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.groups.batchnorm import bias_of, correlation, merge, merge_alone, read, row_average
from intrafusion.groups.layout import from_channels, gather, mix_, to_channels
from intrafusion.groups.table import GroupTable, Role, Slot
from intrafusion.ot import Pair, selection_pair


@dataclass(frozen=True)
class _Map:
    """The changed part of one side of a pair: `weights` [c, n] for the root channels `places` [c]."""

    weights: Tensor
    places: Tensor

    def average(self) -> _Map:
        return _Map(row_average(self.weights), self.places)


@dataclass
class Draft:
    """New values of tensors, collected first and written together, so that a failure changes nothing."""

    values: dict[tuple[Any, str], Tensor] = field(default_factory=dict)

    def of(self, owner: Any, attribute: str) -> Tensor:
        """The present value of owner.attribute in float64 (a free parameter's attribute is `data`)."""
        known = self.values.get((owner, attribute))
        return getattr(owner, attribute).detach().double() if known is None else known

    def put(self, owner: Any, attribute: str, value: Tensor) -> None:
        self.values[owner, attribute] = value

    def commit(self) -> None:
        """Write all values in the dtype they had. Raises ValueError, and writes none, if one is not finite."""
        ready = []
        for (owner, attribute), value in self.values.items():
            old = getattr(owner, attribute)
            new = value.to(old.dtype)
            if not torch.isfinite(new).all():
                raise ValueError(f"the fused {attribute} of {type(owner).__name__} would not be finite in {old.dtype}")
            ready.append((owner, attribute, new))
        for owner, attribute, new in ready:
            if isinstance(owner, nn.Parameter) or attribute in owner._buffers:
                setattr(owner, attribute, new)
            else:
                _replace_parameter(owner, attribute, new)


def apply_pair(table: GroupTable, pair: Pair) -> None:
    """Write the fused channels of `pair` into the kept places of the group's tensors.

    pair.rows: [k, n], pair.columns: [n, k]. Every value is computed in float64 before any is written.
    Raises ValueError if a new value is not finite; the network is unchanged then.
    """
    draft = Draft()
    chosen = selection_pair(pair.kept, table.n)
    rows = _changed(pair.rows, chosen.rows, pair.kept)
    columns = _changed(pair.columns.T, chosen.rows, pair.kept)
    for slot in table.slots:
        if len(rows.places) or len(columns.places):
            _APPLY[slot.role](draft, table, slot, rows, columns)
    carrier = shift_carrier(table)
    if pair.shift is not None and carrier is not None:
        _add_shift(draft, carrier, pair)
    draft.commit()


def shift_carrier(table: GroupTable) -> Slot | None:
    """The producer that a pair's shift is added to (one only, or a residual stream would get it several times)."""
    for slot in table.slots:
        if slot.role is Role.PRODUCER and (slot.partner is not None or slot.owner.bias is not None):
            return slot
    return None


def _add_shift(draft: Draft, slot: Slot, pair: Pair) -> None:
    at, shift = slot.local[:, 0][pair.kept.cpu()], pair.shift
    assert shift is not None
    owner, name = (slot.owner, "bias") if slot.partner is None else (slot.partner, "bias")
    if slot.partner is not None and not slot.partner.affine:
        name = "running_mean"
        shift = -shift * (draft.of(slot.partner, "running_var")[at].cpu() + slot.partner.eps).sqrt()
    vector = draft.of(owner, name).clone()
    vector[at.to(vector.device)] += shift.to(vector)
    draft.put(owner, name, vector)


def _changed(weights: Tensor, selection: Tensor, kept: Tensor) -> _Map:
    moved = (weights != selection.to(weights)).any(dim=1)
    return _Map(weights[moved], kept.to(weights.device)[moved])


def _mix(draft: Draft, slot: Slot, attribute: str, by: _Map, axis: int = 0, chunks: int = 1) -> None:
    if getattr(slot.owner, attribute) is None:
        return
    matrix = to_channels(draft.of(slot.owner, attribute), axis, chunks).clone()
    local, places, weights = (t.to(matrix.device) for t in (slot.local, by.places, by.weights))
    mix_(matrix, local, weights, places)
    draft.put(slot.owner, attribute, from_channels(matrix, draft.of(slot.owner, attribute), axis, chunks))


def _producer(draft: Draft, table: GroupTable, slot: Slot, rows: _Map, columns: _Map) -> None:
    if slot.partner is not None:
        _with_batchnorm(draft, slot, rows)
        return
    _mix(draft, slot, "weight", rows, slot.axis, slot.chunks)
    _mix(draft, slot, "bias", rows)


def _consumer(draft: Draft, table: GroupTable, slot: Slot, rows: _Map, columns: _Map) -> None:
    _mix(draft, slot, "weight", columns, slot.axis, slot.chunks)


def _depthwise(draft: Draft, table: GroupTable, slot: Slot, rows: _Map, columns: _Map) -> None:
    """A depthwise filter is a gain on a channel that was mixed already: averaged, not summed."""
    if slot.partner is not None:
        _with_batchnorm(draft, slot, rows, average=True)
        return
    _mix(draft, slot, "weight", rows.average())
    _mix(draft, slot, "bias", rows)


def _norm(draft: Draft, table: GroupTable, slot: Slot, rows: _Map, columns: _Map) -> None:
    """A normalisation forgets the scale of what it reads, so its weight carries the scale of the merge."""
    _mix(draft, slot, "weight", rows, slot.axis)
    _mix(draft, slot, "bias", rows, slot.axis)


def _free(draft: Draft, table: GroupTable, slot: Slot, rows: _Map, columns: _Map) -> None:
    by = rows.average() if slot.role is Role.GAIN else rows
    _mix(draft, slot, "data" if isinstance(slot.owner, nn.Parameter) else "weight", by, slot.axis)


def _with_batchnorm(draft: Draft, slot: Slot, rows: _Map, average: bool = False) -> None:
    """A producer and its batch-norm: merged as one affine map, split again into two real layers."""
    layer, bn = slot.owner, slot.partner
    assert bn is not None
    weight = to_channels(draft.of(layer, "weight"), slot.axis, slot.chunks)
    local, places, mix = (t.to(weight.device) for t in (slot.local, rows.places, rows.weights))
    first, stats = local[:, 0], read(bn)
    raw, inside = gather(weight, local), stats.at(local[:, 0])
    bias = bias_of(layer, slot.size)[first]  # every channel of a producer is there
    averaged = row_average(mix) @ (inside.scale[:, None] * raw) if average else None
    new = merge(raw, bias, inside, mix, affine=bn.affine, mixed=averaged)
    at = first[places]
    matrix = weight.clone()
    matrix[at] = new.rows
    draft.put(layer, "weight", from_channels(matrix, layer.weight, slot.axis, slot.chunks))
    _put_entries(draft, bn, at, new, fold_bias=layer)


def _put_entries(draft: Draft, bn: Any, at: Tensor, new, fold_bias: Any = None) -> None:
    fields = [(bn, "running_mean", new.mean), (bn, "running_var", new.var)]
    if bn.affine:
        fields += [(bn, "weight", new.gamma), (bn, "bias", new.beta)]
    if fold_bias is not None and fold_bias.bias is not None:
        fields.append((fold_bias, "bias", new.bias))
    for owner, name, values in fields:
        vector = draft.of(owner, name).clone()
        vector[at] = values
        draft.put(owner, name, vector)


def _batchnorm(draft: Draft, table: GroupTable, slot: Slot, rows: _Map, columns: _Map) -> None:
    """A batch-norm that no producer of the group can take in."""
    bn = slot.owner
    if any(other.partner is bn for other in table.slots):
        return
    if bn.running_mean is None:
        _norm(draft, table, slot, rows, columns)
        return
    stats = read(bn)
    device = stats.mean.device
    mix, places, local = (t.to(device) for t in (rows.weights, rows.places, slot.local))
    rho = _input_correlation(table, device)
    for copy in local.unbind(dim=1):
        there = copy[places] >= 0
        new = merge_alone(stats.at(copy), mix[there], rho, affine=bn.affine)
        _put_entries(draft, bn, copy[places][there], new)


def _input_correlation(table: GroupTable, device: torch.device) -> Tensor:
    """[n, n] correlation of a group's channels, from the filters that produce them (the identity if there are none)."""
    filters = [
        gather(
            to_channels(slot.owner.weight.detach().double(), slot.axis, slot.chunks).to(device), slot.local.to(device)
        )
        for slot in table.slots
        if slot.role is Role.PRODUCER
    ]
    if not filters:
        return torch.eye(table.n, dtype=torch.float64, device=device)
    return correlation(torch.cat(filters, dim=1))


_APPLY = {
    Role.PRODUCER: _producer,
    Role.CONSUMER: _consumer,
    Role.DEPTHWISE: _depthwise,
    Role.BATCHNORM: _batchnorm,
    Role.NORM: _norm,
    Role.GAIN: _free,
    Role.SHIFT: _free,
}


def _replace_parameter(owner: nn.Module, name: str, value: Tensor) -> None:
    old = getattr(owner, name)
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    new.grad = old.grad
    setattr(owner, name, new)
