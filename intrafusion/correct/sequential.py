"""Correct a network layer by layer, in the order of its forward pass, while it is being pruned.

Before a group is cut, every layer up to its producers is refitted, so that what the group's channels are mixed from is
what the dense network has there. Then the rows are chosen on what these layers give, the group is cut, and the layers
that read it are refitted when their turn comes. The inputs are the user's, or synthetic ones: no label is ever used.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from tqdm import tqdm

from intrafusion.correct.memo import Memo, Room
from intrafusion.correct.observe import Sight, look
from intrafusion.correct.refit import RowMap, can_refit, match_statistics_, outputs, refit_
from intrafusion.correct.samples import blocks_of, collect, reads_of
from intrafusion.groups.apply import shift_carrier
from intrafusion.groups.layout import mix_
from intrafusion.groups.table import GroupTable, Role, Slot, batchnorm_of, module_name
from intrafusion.ot import Pair, Plan, selection_pair
from intrafusion.ot.merge import barycentre
from intrafusion.ot.rows import Samples, best_rows, read_back
from intrafusion.running import call_order, evaluating

_MOST_READERS = 4
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


class Sequential:
    """One pruning step, corrected layer by layer.

    graph: of the network that is pruned. run: calls a network on one batch of inputs. batches: the inputs. progress:
    show a bar. The dense network is copied: memory holds two networks, one layer's Gram matrix and what `Memo` keeps.
    """

    def __init__(
        self, graph: tp.DependencyGraph, run: Callable[[nn.Module, Any], Any], batches: Sequence, progress: bool = True
    ) -> None:
        self.graph, self.model, self.run, self.batches = graph, graph.model, run, batches
        self.dense = copy.deepcopy(graph.model).requires_grad_(False).eval()
        with evaluating(self.model):
            self.order = call_order(lambda: run(self.model, batches[0]), self.model, _LAYERS)
        names = [module_name(graph, batchnorm_of(graph, self.model.get_submodule(name))) for name in self.order]
        self._partner = {
            layer: bn if batchnorm_of(graph, self.model.get_submodule(layer)) is not None else ""
            for layer, bn in zip(self.order, names, strict=True)
        }
        self._rows: dict[str, RowMap] = {}
        room = Room()
        self._memos = [(Memo(room), Memo(room)) for _ in batches]
        self._next = 0
        disable = None if progress else True
        self._bar = tqdm(total=len(self.order), desc="refit", unit="layer", delay=2, leave=False, disable=disable)

    def position(self, table: GroupTable) -> int:
        """When a group's turn comes: where the forward pass first meets one of its producers."""
        places = [self.order.index(s.name) for s in table.slots if s.role is Role.PRODUCER and s.name in self.order]
        return min(places, default=len(self.order))

    def refit_until(self, table: GroupTable) -> None:
        """Refit every layer up to the group's first producer, that one included."""
        self._refit_to(self.position(table) + 1)

    def finish(self) -> None:
        """Refit the layers that are left."""
        self._refit_to(len(self.order))
        self._next = 0  # a group may still be cut later, by hand
        self._bar.close()

    def pair(self, table: GroupTable, plan: Plan) -> Pair:
        """The plan's barycentre, its rows moved to where the group is rebuilt best.

        In front of a depthwise convolution the rows stay: a mixture of channels that are filtered differently is no
        filter of a mixture. What is lost is then left to the layers that read the group.
        """
        if any(slot.role is Role.DEPTHWISE for slot in table.slots):
            return selection_pair(plan.kept, table.n)
        start = barycentre(plan)
        readers = [reader for slot in self._readers(table) if (reader := self._samples(table, slot)) is not None]
        if not readers:
            return start
        halfway = (start.rows + selection_pair(plan.kept, table.n).rows.to(start.rows)) / 2
        may_shift = shift_carrier(table) is not None
        rows, shift = best_rows(halfway, readers, may_shift=may_shift)
        read = read_back(rows, shift, readers)
        rows, read = (self._inside_classes(side.cpu(), table, plan) for side in (rows, read.T))
        return Pair(rows, start.columns, plan.kept, shift.cpu() if may_shift else None, read.T)

    def note(self, table: GroupTable, pair: Pair) -> None:
        """Remember what the outputs of the group's layers stand for, once torch-pruning has cut them."""
        carrier = shift_carrier(table)
        for slot in table.slots:
            if slot.role not in (Role.PRODUCER, Role.DEPTHWISE):
                continue
            old = self._rows.get(slot.name, RowMap.identity(slot.size))
            mapped = torch.eye(slot.size, dtype=torch.float64)
            mix_(mapped, slot.local, pair.rows.cpu(), pair.kept.cpu())
            moved = torch.zeros(slot.size, dtype=torch.float64)
            if pair.shift is not None and slot is carrier:
                moved[slot.local[:, 0][pair.kept.cpu()]] = pair.shift
            left = self._left(slot, pair.kept.cpu())
            self._rows[slot.name] = RowMap(mapped[left] @ old.weights, mapped[left] @ old.shift + moved[left])

    @staticmethod
    def _left(slot: Slot, kept: Tensor) -> Tensor:
        """Local channels that a cut leaves, increasing."""
        gone = torch.ones(len(slot.local), dtype=torch.bool)
        gone[kept] = False
        alive = torch.ones(slot.size, dtype=torch.bool)
        local = slot.local[gone]
        alive[local[local >= 0]] = False
        return alive.nonzero().flatten()

    @staticmethod
    def _inside_classes(rows: Tensor, table: GroupTable, plan: Plan) -> Tensor:
        same = table.classes[plan.kept.cpu()][:, None] == table.classes[None, :]
        return torch.where(same, rows, 0.0)

    def _refit_to(self, end: int) -> None:
        while self._next < end:
            name = self.order[self._next]
            self._next += 1
            self._refit(name)
            self._bar.update()

    def _refit(self, name: str) -> None:
        layer, dense = self.model.get_submodule(name), self.dense.get_submodule(name)
        partner = self._partner[name]
        bn = self.model.get_submodule(partner) if partner else None
        rows = self._rows.get(name) or RowMap.identity(outputs(dense))
        if len(rows.weights) != outputs(layer):  # cut in a way that the table does not tell
            return
        if can_refit(layer):
            dense_bn = self.dense.get_submodule(partner) if partner else None
            refit_(layer, bn, dense, dense_bn, self._sights(name), rows)
        elif bn is not None:
            match_statistics_(layer, bn, self._sights(name), rows)

    def _sights(self, name: str, add: bool = True) -> Iterator[tuple[Sight, Sight]]:
        """(dense, pruned) views of a layer, batch by batch."""
        partner = self._partner[name]
        with evaluating(self.model):
            for batch, memos in zip(self.batches, self._memos, strict=True):
                both = []
                for model, memo in zip((self.dense, self.model), memos, strict=True):
                    bn = model.get_submodule(partner) if partner else None
                    forward = partial(self.run, model, batch)
                    both.append(look(forward, model.get_submodule(name), bn, add=add, memo=memo))
                yield both[0], both[1]

    def _readers(self, table: GroupTable) -> list[Slot]:
        consumers = [s for s in table.slots if s.role is Role.CONSUMER and s.name in self.order and s.chunks == 1]
        return sorted(consumers, key=lambda slot: self.order.index(slot.name))[:_MOST_READERS]

    def _samples(self, table: GroupTable, slot: Slot) -> Samples | None:
        """What a reader of the group sees, at positions spread over all batches; None if that is not understood."""
        blocks = (blocks_of(pruned, dense, slot, table.n) for dense, pruned in self._sights(slot.name, add=False))
        return collect(blocks, len(self.batches), reads_of(self.dense.get_submodule(slot.name), slot))
