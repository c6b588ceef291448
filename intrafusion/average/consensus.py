"""Refit an average of aligned networks, layer by layer, so that the network gives what its parents give on average.

Side by side, k aligned parents are one wide network: k n channels in a group of n, and every layer's output is the mean
of theirs,

    y_l = Σ_i w_i f_l,i(x)        f_l,i: layer l of parent i, with its batch-norm, in the common order of the channels.

It is brought back to n channels as pruning does it (`methods.refit`). For a group that one layer makes, the rows
R [n, k n] start at the average, [w_1 I .. w_k I], and move to where the readers' inputs are rebuilt best. Every layer,
in forward order, then becomes the ridge regression from what it really reads in the fused network to R f_l(x), or y_l:
what the average of two filters loses is regained before the next layer reads it. RegMean (Jin et al. 2023) is this
without rows, and with the parents' inputs in the place of the fused network's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from intrafusion.average.couplings import Couplings
from intrafusion.correct.correction import layers_of
from intrafusion.correct.refit import RowMap, can_refit, folded_weight, match_statistics_, outputs, refit_
from intrafusion.correct.survey import Survey, samples, visits
from intrafusion.correct.walk import Sight, Walk
from intrafusion.groups.apply import shift_carrier
from intrafusion.groups.kinds.filters import filters_of
from intrafusion.groups.table import GroupTable, Slot
from intrafusion.ot.rows import Samples, best_rows

_CLOSE = 1e-4
"""A layer that is nearer to its target than this part of it stays as it is: copies of one network are not touched."""


class Consensus:
    """The parents as one wide network, and the fused one that is fitted to it.

    fused: the average of the parents; refitted in place. parents: in eval mode, with the tensors and the order of
    channels of `fused`. weights: theirs; sum to 1. couplings: of that architecture. run: calls a network on one batch
    of inputs. batches: the inputs.
    """

    def __init__(
        self,
        fused: nn.Module,
        parents: Sequence[nn.Module],
        weights: Sequence[float],
        couplings: Couplings,
        run: Callable[[nn.Module, Any], Any],
        batches: Sequence,
    ) -> None:
        self.fused, self.parents, self.weights, self.run, self.batches = fused, list(parents), weights, run, batches
        norms = layers_of(couplings.graph)
        self._calls = visits(fused, run, batches[0], norms)
        self._norms = {name: norms[name] for name in self._calls}
        self._tables = {}
        for group in couplings.groups:
            table = couplings.tables.get(group.table)
            if table is not None and not group.reason and not group.rigid and (maker := _only_maker(table)):
                self._tables[maker.name] = table

    @torch.no_grad()
    def refit_(self, progress: bool = True) -> None:
        """Refit the fused network, in the order of its forward pass, all networks side by side.

        Raises ValueError if an activation is not finite.
        """
        tables = list(self._tables.values())
        self._surveys = [
            Survey(parent, self.run, self.batches, self._norms, self._calls, tables) for parent in self.parents
        ]
        self._walk = walk = Walk((*self.parents, self.fused), self.run, self.batches, self._norms, self._calls)
        hidden = None if progress else True
        with tqdm(total=len(self._norms), desc="refit", unit="layer", delay=2, leave=False, disable=hidden) as bar:
            try:
                while (name := walk.advance()) is not None:
                    self._refit_(name)
                    walk.changed(rejoin=self._calls[name] > 1)
                    bar.update()
            finally:
                walk.close()

    def _refit_(self, name: str) -> None:
        layer, bn = self._of(self.fused, name)
        rows = self._rows(name) if can_refit(layer) else None
        apart = rows is not None
        rows = rows or RowMap.identity(outputs(layer))
        sights = [self._together(each, name, apart) for each in self._walk.sights()]
        if not sights or self._is_close(*sights[0], rows, filters_of(layer).channel_axis):
            return
        if can_refit(layer):
            refit_(layer, bn, SimpleNamespace(weight=self._wide(name, apart)), None, sights, rows)
        elif bn is not None:
            match_statistics_(layer, bn, sights, rows)

    def _of(self, network: nn.Module, name: str) -> tuple[Any, Any]:
        """A layer and its batch-norm."""
        norm = self._norms.get(name)
        return network.get_submodule(name), network.get_submodule(norm) if norm else None

    def _wide(self, name: str, apart: bool) -> Tensor:
        """A layer's folded weight in the wide network; its outputs stay apart, [k n, k m, ...], or are their mean."""
        folded = [folded_weight(*self._of(parent, name)) for parent in self.parents]
        if not apart:
            return torch.cat([weight * own for weight, own in zip(folded, self.weights, strict=True)], dim=1)
        n, m = folded[0].shape[:2]
        wide = folded[0].new_zeros(len(folded) * n, len(folded) * m, *folded[0].shape[2:])
        for number, weight in enumerate(folded):
            wide[number * n : (number + 1) * n, number * m : (number + 1) * m] = weight
        return wide

    def _rows(self, name: str) -> RowMap | None:
        """What the channels that a layer makes become of its parents' channels; None for their mean."""
        table = self._tables.get(name)
        if table is None:
            return None
        readers = self._samples(table)
        if not readers:
            return None
        average = torch.cat([own * torch.eye(table.n, dtype=torch.float64) for own in self.weights], dim=1)
        rows, shift = best_rows(average, readers, may_shift=shift_carrier(table) is not None)
        return RowMap(rows.cpu(), shift.cpu())

    def _samples(self, table: GroupTable) -> list[Samples]:
        """What every reader of a group that is understood sees in all parents, side by side."""
        each = [survey.readings(table) for survey in self._surveys]
        found = []
        for views in zip(*each, strict=True):
            if all(view.understood for view in views):
                reads = [own * view.reads for own, view in zip(self.weights, views, strict=True)]
                z, h = (torch.cat([getattr(view, side) for view in views], dim=1) for side in ("z", "h"))
                found.append(samples(z, h, views[0].calls, torch.cat(reads)))
        return found

    def _together(self, each: Sequence[Sight], name: str, apart: bool) -> tuple[Sight, Sight]:
        """(the parents side by side, fused) views of a layer on one batch; outputs are apart or their mean."""
        axis = filters_of(self.fused.get_submodule(name)).channel_axis
        *before, now = each
        others = [sight.other for sight in before if sight.other is not None]
        made = [sight.output for sight in before]
        wide = Sight(
            inputs=torch.cat([sight.inputs for sight in before], dim=axis),
            output=torch.cat(made, dim=axis) if apart else self._mean(made),
            other=self._mean(others) if len(others) == len(before) else None,
        )
        return wide, now

    def _mean(self, values: Sequence[Tensor]) -> Tensor:
        return torch.stack([own * value for own, value in zip(self.weights, values, strict=True)]).sum(dim=0)

    @staticmethod
    def _is_close(wide: Sight, now: Sight, rows: RowMap, axis: int) -> bool:
        target = rows(wide.output, axis)
        if rows.is_identity and wide.other is not None and now.other is not None:
            target = target + wide.other - now.other if wide.other.shape == now.other.shape else target
        return bool((target - now.output).norm() <= _CLOSE * target.norm())


def _only_maker(table: GroupTable) -> Slot | None:
    """The layer that makes a group's channels, if it is alone and nothing but whole layers read them."""
    makers = [slot for slot in table.slots if slot.produces]
    plain = all((slot.produces or slot.reads or slot.is_batchnorm) and slot.chunks == 1 for slot in table.slots)
    return makers[0] if plain and len(makers) == 1 and len(table.classes.unique()) == 1 else None
