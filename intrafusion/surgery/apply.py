"""Apply a pair (R, S) to a group: every slot in place at full size, then torch-pruning cuts.

Only the kept places are written, and of those only the ones that a merge changes, so that a selection leaves every
tensor bit for bit as torch-pruning would cut it. Gradients travel by the dual map (rows by S^T, columns by R), which is
the exact gradient of the fused network when the merged channels are duplicates.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.ot import Pair, selection_pair
from intrafusion.surgery.batchnorm import bias_of, correlation, merge, merge_alone, read, row_average
from intrafusion.surgery.groups import GroupTable, Role, Slot
from intrafusion.surgery.layout import from_channels, gather, mix_, to_channels


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
        """The present value of owner.attribute in float64 (a free parameter's attributes are `data`, `grad`)."""
        known = self.values.get((owner, attribute))
        return _look_up(owner, attribute).detach().double() if known is None else known

    def put(self, owner: Any, attribute: str, value: Tensor) -> None:
        self.values[owner, attribute] = value

    def commit(self) -> None:
        """Write all values in the dtype they had. Raises ValueError, and writes none, if one is not finite."""
        ready = []
        for (owner, attribute), value in self.values.items():
            old = _look_up(owner, attribute)
            new = value.to(old.dtype)
            if not torch.isfinite(new).all():
                raise ValueError(f"the fused {attribute} of {type(owner).__name__} would not be finite in {old.dtype}")
            ready.append((owner, attribute, new))
        for owner, attribute, new in ready:
            if isinstance(owner, nn.Parameter):
                setattr(owner, attribute, new)
            elif attribute.endswith(".grad"):
                getattr(owner, attribute.removesuffix(".grad")).grad = new
            elif attribute in owner._buffers:
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


def _mix(draft: Draft, slot: Slot, attribute: str, forward: _Map, dual: _Map, axis: int = 0, chunks: int = 1) -> None:
    """Mix a tensor's channels by `forward` and its gradient's, if there is one, by `dual`."""
    tensor = _look_up(slot.owner, attribute)
    if tensor is None:
        return
    work = [(attribute, forward)]
    if isinstance(slot.owner, nn.Parameter):
        grad_name, grad = "grad", slot.owner.grad
    else:
        grad_name, grad = f"{attribute}.grad", tensor.grad
    if grad is not None:
        work.append((grad_name, dual))
    for name, side in work:
        matrix = to_channels(draft.of(slot.owner, name), axis, chunks).clone()
        local, places, weights = (t.to(matrix.device) for t in (slot.local, side.places, side.weights))
        mix_(matrix, local, weights, places)
        draft.put(slot.owner, name, from_channels(matrix, draft.of(slot.owner, name), axis, chunks))


def _producer(draft: Draft, table: GroupTable, slot: Slot, rows: _Map, columns: _Map) -> None:
    if slot.partner is not None:
        _with_batchnorm(draft, slot, rows, columns)
        return
    _mix(draft, slot, "weight", rows, columns, slot.axis, slot.chunks)
    _mix(draft, slot, "bias", rows, columns)


def _consumer(draft: Draft, table: GroupTable, slot: Slot, rows: _Map, columns: _Map) -> None:
    _mix(draft, slot, "weight", columns, rows, slot.axis, slot.chunks)


def _depthwise(draft: Draft, table: GroupTable, slot: Slot, rows: _Map, columns: _Map) -> None:
    """A depthwise filter is a gain on a channel that was mixed already: averaged, not summed."""
    if slot.partner is not None:
        _with_batchnorm(draft, slot, rows, columns, average=True)
        return
    _mix(draft, slot, "weight", rows.average(), columns)
    _mix(draft, slot, "bias", rows, columns)


def _norm(draft: Draft, table: GroupTable, slot: Slot, rows: _Map, columns: _Map) -> None:
    """A normalisation forgets the scale of what it reads, so its weight carries the scale of the merge."""
    _mix(draft, slot, "weight", rows, columns, slot.axis)
    _mix(draft, slot, "bias", rows, columns, slot.axis)


def _free(draft: Draft, table: GroupTable, slot: Slot, rows: _Map, columns: _Map) -> None:
    forward = rows.average() if slot.role is Role.GAIN else rows
    name = "data" if isinstance(slot.owner, nn.Parameter) else "weight"
    _mix(draft, slot, name, forward, columns, slot.axis)


def _with_batchnorm(draft: Draft, slot: Slot, rows: _Map, columns: _Map, average: bool = False) -> None:
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
    _dual_gradients(draft, slot, columns, stats.scale)


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


def _dual_gradients(draft: Draft, slot: Slot, columns: _Map, scale: Tensor) -> None:
    """Gradients of a producer with a batch-norm: the layer's in folded coordinates, where dL/d(aW) = dL/dW / a."""
    layer, bn = slot.owner, slot.partner
    local, weights, places = (t.to(scale.device) for t in (slot.local, columns.weights, columns.places))
    at = local[:, 0][places]
    gamma = draft.of(bn, "weight") if bn.affine else torch.ones_like(scale)
    to_folded = torch.where(scale == 0, 0.0, 1.0 / scale)
    from_folded = gamma / (draft.of(bn, "running_var") + bn.eps).sqrt()
    one = torch.ones_like(scale)
    fields = ((layer, "weight", to_folded, from_folded), (layer, "bias", to_folded, from_folded))
    for owner, name, before, after in (*fields, (bn, "weight", one, one), (bn, "bias", one, one)):
        parameter = getattr(owner, name)
        if parameter is None or parameter.grad is None:
            continue
        axis, chunks = (slot.axis, slot.chunks) if name == "weight" and owner is layer else (0, 1)
        matrix = to_channels(draft.of(owner, f"{name}.grad"), axis, chunks).clone()
        folded = before[:, None] * matrix
        mix_(folded, local, weights, places)
        matrix[at] = after[at, None] * folded[at]
        draft.put(owner, f"{name}.grad", from_channels(matrix, parameter, axis, chunks))


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
    if bn.affine:
        for name in ("weight", "bias"):
            if getattr(bn, name).grad is not None:
                _mix(draft, slot, name, _Map(rows.weights[:0], rows.places[:0]), columns)


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


def _look_up(owner: Any, attribute: str) -> Any:
    if attribute.endswith(".grad"):
        return getattr(owner, attribute.removesuffix(".grad")).grad
    return getattr(owner, attribute)


def _replace_parameter(owner: nn.Module, name: str, value: Tensor) -> None:
    old = getattr(owner, name)
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    new.grad = old.grad
    setattr(owner, name, new)
