"""Ours: rows move from where a rule starts them to where the group is rebuilt best, and every layer is refitted.

The rule (published Intra-Fusion's, the barycentre, one of your own) says which channels a kept one starts to stand for;
`docs/method.md` has the rest. The same method is `data-free` on synthetic inputs and `calibrated` on the user's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from intrafusion.correct.correction import LayerView
from intrafusion.correct.descent import descend_
from intrafusion.correct.refit import can_refit, match_statistics_, refit_
from intrafusion.correct.streams import Rotation, may_be_turned, stream_moments
from intrafusion.groups.apply import Rewrite, shift_carrier
from intrafusion.groups.streams import stream_of
from intrafusion.groups.table import GroupTable
from intrafusion.methods.method import Method
from intrafusion.methods.view import View
from intrafusion.ot import Pair, Plan, selection_pair
from intrafusion.ot.rows import best_rows, read_back, read_copies


class Refit(Method):
    """start: the method, a rule for example, whose pair the rows start from. inputs: `synthetic` or `calibration`.
    descent: so many steps by all layers together follow the last refit.
    """

    samples = fills_up = circuits = sensitivity = True

    def __init__(self, start: Method, inputs: str, descent: int = 0) -> None:
        self.start, self.inputs, self.descent = start, inputs, descent

    @property
    def label(self) -> str:
        return "data-free" if self.inputs == "synthetic" else "calibrated"

    def pair(self, table: GroupTable, plan: Plan, view: View) -> Pair:
        """The start's pair, its rows moved to where the group is rebuilt best.

        In front of a depthwise convolution the rows stay: a mixture of channels that are filtered differently is no
        filter of a mixture. So they do where channels of the group are multiplied with each other, as in a gate. What
        is lost is then left to the layers that read the group. A residual stream that is read through norms is turned
        to its principal directions instead.
        """
        stream = stream_of(view.graph, table) if len(plan.kept) > 1 else None
        self._rotation: Rotation | None = None
        if stream is not None and may_be_turned(stream, view.graph, lambda network: view.run(network, view.example)):
            moments = stream_moments(stream, view.dense, view.run, view.batches)
            self._rotation = Rotation(stream, moments, plan.kept.cpu())
            return self._rotation.pair
        chosen = selection_pair(plan.kept, table.n)
        start = self.start.pair(table, plan, view)
        readers = view.samples(table)
        columns = read_copies(start.columns.cpu().double(), plan.kept, readers)
        stays = any(slot.is_depthwise for slot in table.slots) or not all(reader.movable for reader in readers)
        consumers = [slot for slot in table.slots if slot.reads]
        refitted = bool(consumers) and all(can_refit(slot.owner) and slot.name in view.order for slot in consumers)
        if refitted and not all(reader.movable for reader in readers):
            # the refit's ridge pulls towards these columns: none that were learnt on the inputs which judge it
            return Pair(chosen.rows, _inside_classes(columns.T, table, plan).T, plan.kept)
        if not readers:  # nothing says which rows are good: those that stay are, for readers that will be refitted
            return chosen if stays or refitted else start
        may_shift = shift_carrier(table) is not None
        rows, shift = chosen.rows, torch.zeros(len(plan.kept), dtype=torch.float64)
        if not stays:
            halfway = (start.rows + chosen.rows.to(start.rows)) / 2
            given = {"selection": chosen.rows, "columns": columns}
            rows, shift = best_rows(halfway, readers, may_shift=may_shift, **given)
        read = read_back(rows, shift, readers, columns)
        rows, read = (_inside_classes(side.cpu(), table, plan) for side in (rows, read.T))
        return Pair(rows, read.T, plan.kept, None if stays or not may_shift else shift.cpu(), read.T)

    def rewrite(self, table: GroupTable, pair: Pair, view: View) -> Rewrite | None:
        """Of a stream that is turned: the norms' gains and shifts go over into what reads them."""
        return self._rotation

    def repair_(self, layer: LayerView, view: View) -> None:
        """Refit the layer so that it gives what the dense one gives; where that is not possible, its batch-norm."""
        if can_refit(layer.layer):
            sights, rows = layer.sights, layer.rows
            how = {"kept": layer.kept, "may_have_bias": layer.may_have_bias, "sensitivity": layer.sensitivity}
            refit_(layer.layer, layer.norm, layer.dense, layer.dense_norm, sights, rows, **how)
        elif layer.norm is not None:
            match_statistics_(layer.layer, layer.norm, layer.sights, layer.rows)

    def end_(self, view: View) -> None:
        if self.descent:
            how = {"order": view.order, "seed": view.seed, "progress": view.progress}
            descend_(view.model, view.dense, view.run, view.own, view.drawn, self.descent, **how)


def _inside_classes(rows: Tensor, table: GroupTable, plan: Plan) -> Tensor:
    same = table.classes[plan.kept.cpu()][:, None] == table.classes[None, :]
    return torch.where(same, rows, 0.0)
