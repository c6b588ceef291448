"""The dense network and the pruned one, side by side, while groups are cut and layers put right.

Before a group is cut the walk comes to the first layer that makes its channels, and all layers before have been put
right on the way. What the outputs of every layer stand for, in terms of the dense network's, is remembered as a
`RowMap`, so that whoever puts a layer right knows what it should give.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from tqdm import tqdm

from intrafusion.correct.refit import RowMap, can_refit, outputs
from intrafusion.correct.sensitivity import sensitivities
from intrafusion.correct.survey import Run, Survey, visits
from intrafusion.correct.tracking import track_statistics_
from intrafusion.correct.walk import ByBatch, Sight, Walk
from intrafusion.groups.apply import shift_carrier
from intrafusion.groups.layout import mix_
from intrafusion.groups.table import GroupTable, Slot, batchnorm_of, module_name
from intrafusion.ot import Pair
from intrafusion.ot.rows import Samples
from intrafusion.running import copy_of

_NORMS = nn.modules.batchnorm._BatchNorm
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)


@dataclass(frozen=True)
class LayerView:
    """One layer that may be put right.

    layer, norm: of the pruned network; dense, dense_norm: of the dense one; norm is the batch-norm that reads the layer
    alone, or None. rows: what its outputs stand for. kept: which of the dense inputs are still there, None if they have
    been mixed, or all are. may_have_bias: whether it may get a bias if it has none.
    sights: (dense, pruned), one pair per batch, or per call where there are several in a pass. sensitivity: how
    much each place of each batch counts, [inputs, *places], 1 on average; None if that is not known.
    """

    name: str
    layer: Any
    norm: Any
    dense: Any
    dense_norm: Any
    rows: RowMap
    sights: Sequence[tuple[Sight, Sight]]
    kept: Tensor | None = None
    may_have_bias: bool = True
    sensitivity: Sequence[Tensor] | None = None


class Correction:
    """graph: of the network that is pruned. run: calls a network on one batch. batches: the inputs. tables: of the
    groups that are going to be cut. repair_: puts one layer right. tracked: inputs whose statistics the batch-norms get
    that no layer is refitted with (all, if none are given). openings: how sequences begin, inputs of one token that
    refits look at beside them and nothing else does. after_cut: whether that is done when the layer's own group
    has been cut, or before. sensitivity: whether it is told how much places count. unbiased: layers that must not
    get a bias. survey: whether samples are going to be asked for; sources: whether to choose rows on them. memory: how
    many bytes of activations may be held at a time; what is beyond lies in files.

    The dense network is a copy, taken now. Memory holds two networks and what their passes will still read.
    """

    def __init__(
        self,
        graph: tp.DependencyGraph,
        run: Run,
        batches: Sequence,
        tables: Sequence[GroupTable],
        repair_: Callable[[LayerView], None] | None,
        *,
        tracked: Sequence = (),
        openings: Sequence = (),
        unbiased: Collection[str] = (),
        after_cut: bool = False,
        sensitivity: bool = False,
        survey: bool = True,
        sources: bool = True,
        memory: int | None = None,
        progress: bool = True,
    ) -> None:
        self.graph, self.model, self.run, self.batches = graph, graph.model, run, batches
        self.dense = copy_of(graph.model).requires_grad_(False).eval()
        self._repair_, self._after_cut, self._memory = repair_, after_cut, memory
        self._tracked, self._unbiased = tracked or batches, unbiased
        partners = layers_of(graph)
        shapes: dict[str, torch.Size] = {}
        seen = lambda visit: shapes.update({visit.name: visit.output.shape})  # noqa: E731
        self._calls = visits(self.dense, run, batches[0], partners, seen)
        self.layers = {name: partners[name] for name in self._calls}
        shown = tables if survey else ()
        self._survey = Survey(
            self.dense, run, batches, self.layers, self._calls, shown,
            lean=repair_ is not None, sources=sources, progress=progress,
        )  # fmt: skip
        self._openings = openings
        self._sensitivity: dict[str, list[Tensor]] = {}
        if sensitivity and not openings:
            once = {name: shape for name, shape in shapes.items() if self._calls[name] == 1}
            self._sensitivity = sensitivities(self.dense, run, batches, self.layers, once, progress=progress)
        self._rows: dict[str, RowMap] = {}
        self._kept: dict[str, Tensor | None] = {}
        self._walk: Walk | None = None
        self._touched = False
        hidden = None if progress else True
        self._bar = tqdm(total=len(self.layers), desc="layers", unit="layer", delay=2, leave=False, disable=hidden)

    def position(self, table: GroupTable) -> int:
        """A group's turn: where the forward pass first meets a layer that makes its channels; -1 if it never does."""
        order = list(self.layers)
        places = [order.index(slot.name) for slot in table.slots if slot.makes_channels and slot.name in self.layers]
        return min(places, default=-1)

    def come_to(self, table: GroupTable) -> None:
        """Put every layer right up to the first one that makes the group's channels, that one included."""
        at = self.position(table)
        if self._repair_ is None:
            return
        if at < 0:  # its layers are called in no way that is understood: whatever has run may have read them
            self._end_walk()
            return
        name = list(self.layers)[at]
        if self._walk is not None and not self._walk.stands_before(name) and self._walk.name != name:
            self._end_walk()
        if self._walk is None:
            self._walk = self._new_walk()
            self._bar.reset()
        while self._walk.name != name:
            self._advance()

    def samples(self, table: GroupTable) -> list[Samples]:
        """What up to four readers of a group see, of the pruned network where the walk stands at what they read."""
        walk = self._walk
        if walk is not None and walk.name in self._survey.makers(table):
            outputs = walk.outputs()
            known = len(outputs) - self._calls[walk.name or ""] * len(self._openings)  # which the survey has not seen
            return self._survey.samples(table, walk.name or "", ByBatch(known, outputs.__getitem__))
        return self._survey.samples(table)

    def cut(self, table: GroupTable, pair: Pair, inside: Mapping[str, Tensor] | None = None) -> None:
        """A group has been mixed by `pair` and cut. inside: what outputs of its layers stand for, [left, full]."""
        if self._repair_ is None:
            return
        self._touched = True
        self._note(table, pair, inside or {})
        self._survey.forget(table)
        if self._walk is not None:
            shared = (self.model.get_submodule(name) for name, count in self._calls.items() if count > 1)
            owners = [owner for owner, _ in table.reach]
            self._walk.changed(rejoin=any(map(_may_have_been_read, owners)) or not set(owners).isdisjoint(shared))

    def finish(self) -> None:
        """Put the layers right that are left."""
        if self._touched and self._repair_ is not None:
            if self._walk is None:
                self._walk = self._new_walk()
            while not self._walk.is_at_last:  # what comes behind the last layer is nobody's input
                self._advance()
            if self._after_cut:
                self._put_right()
            self._end_walk()
            track_statistics_(self.model, self.dense, self.run, self._tracked, self._norms_apart())
        self.close()
        self._touched = False

    def close(self) -> None:
        """Break the walk off; the next group starts another."""
        self._end_walk()
        self._bar.close()

    def __del__(self) -> None:
        if getattr(self, "_walk", None) is not None:
            self._end_walk()

    def _norms_apart(self) -> list[str]:
        """Batch-norms that are not put right together with a layer."""
        fitted = {norm for name, norm in self.layers.items() if can_refit(self.model.get_submodule(name))}
        norms = (name for name, module in self.model.named_modules() if isinstance(module, _NORMS))
        return [name for name in norms if name not in fitted]

    def _new_walk(self) -> Walk:
        batches = [*self.batches, *self._openings]
        return Walk((self.dense, self.model), self.run, batches, self.layers, self._calls, self._memory)

    def _end_walk(self) -> None:
        walk, self._walk = self._walk, None
        if walk is not None:
            walk.close()

    def _advance(self) -> None:
        assert self._walk is not None
        if self._after_cut:
            self._put_right()
        self._walk.advance()
        self._bar.update()
        if not self._after_cut:
            self._put_right()

    def _put_right(self) -> None:
        walk = self._walk
        if not self._touched or walk is None or walk.name is None or self._repair_ is None:
            return
        name, sensitivity = walk.name, self._sensitivity.get(walk.name)
        layer, dense = self.model.get_submodule(name), self.dense.get_submodule(name)
        norm = self.layers[name]
        if isinstance(layer, nn.Embedding):
            return  # what it gives depends on nothing that was cut before
        rows = self._rows.get(name) or RowMap.identity(outputs(dense))
        sights = walk.sights(present=self._after_cut)
        if len(rows.weights) != outputs(layer) or not sights:
            return  # cut in a way that the table does not tell
        view = LayerView(
            name,
            layer,
            self.model.get_submodule(norm) if norm else None,
            dense,
            self.dense.get_submodule(norm) if norm else None,
            rows,
            sights,  # type: ignore[arg-type]
            kept=self._kept.get(name),
            may_have_bias=name not in self._unbiased,
            sensitivity=sensitivity if sensitivity is not None and len(sensitivity) == len(sights) else None,
        )
        self._repair_(view)
        walk.changed(rejoin=self._calls[name] > 1)

    def _note(self, table: GroupTable, pair: Pair, inside: Mapping[str, Tensor]) -> None:
        """Remember what the outputs of the group's layers stand for from now on."""
        for name, weights in inside.items():
            if name in self.layers:
                old = self._rows.get(name) or RowMap.identity(weights.shape[1])
                self._rows[name] = old.then(weights.cpu())
        carrier = shift_carrier(table)
        kept = pair.kept.cpu()
        for slot in table.slots:
            if slot.name in inside or slot.name not in self.layers or not (slot.produces or slot.is_depthwise):
                continue
            old = self._rows.get(slot.name) or RowMap.identity(slot.size)
            mapped = torch.eye(slot.size, dtype=torch.float64)
            mix_(mapped, slot.local, pair.rows.cpu(), kept)
            moved = torch.zeros(slot.size, dtype=torch.float64)
            if pair.shift is not None and slot is carrier:
                moved[slot.local[:, 0][kept]] = pair.shift.cpu()
            left = _left(slot, kept)
            self._rows[slot.name] = old.then(mapped[left], moved[left])
        stay = not inside and pair.rows_stay
        for slot in table.slots:
            if slot.reads and slot.name in self.layers:
                old = self._kept.get(slot.name, torch.arange(slot.size))
                self._kept[slot.name] = old[_left(slot, kept)] if stay and old is not None else None


def layers_of(graph: tp.DependencyGraph) -> dict[str, str]:
    """Every layer with a weight of its own, and the name of the batch-norm that reads it alone, or ''.

    Layers whose weight is tied to another's, or computed from other tensors, are left out: they are not put right.
    """
    model = graph.model
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if isinstance(module, _LAYERS) and weight is not None and owners[id(weight)] == 1:
            norm = batchnorm_of(graph, module)
            found[name] = module_name(graph, norm) if norm is not None else ""
    return found


def _may_have_been_read(owner: Any) -> bool:
    """Can a pass that stands at the first layer of a group hold something that was made from another's tensors?

    Not if that is a layer whose calls are given its tensors as they are, and are prepared anew: see `Layers.renew`.
    """
    if isinstance(owner, nn.Parameter):
        return True
    if not isinstance(owner, nn.Module):
        return False
    if isinstance(owner, (nn.LayerNorm, nn.RMSNorm)):
        return owner.weight is None  # its shape is then all there is
    plain = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.PReLU)
    return not isinstance(owner, plain) and next(owner.parameters(), None) is not None


def _left(slot: Slot, kept: Tensor) -> Tensor:
    """Local channels that a cut leaves, increasing."""
    gone = torch.ones(len(slot.local), dtype=torch.bool)
    gone[kept] = False
    alive = torch.ones(slot.size, dtype=torch.bool)
    local = slot.local[gone]
    alive[local[local >= 0]] = False
    return alive.nonzero().flatten()
