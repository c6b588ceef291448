"""Refit an average of aligned networks, layer by layer, so that the network gives what its parents give on average.

Side by side, k aligned parents are one wide network: k n channels in a group of n, and every layer's output is the mean
of theirs,

    y_l = Σ_i w_i f_l,i(x)        f_l,i: layer l of parent i, with its batch-norm, in the common order of the channels.

It is brought back to n channels as pruning does it (`correct.sequential`). For a group that one layer makes, the rows
R [n, k n] start at the average, [w_1 I .. w_k I], and move to where the readers' inputs are rebuilt best. Every layer,
in forward order, then becomes the ridge regression from what it really reads in the fused network to R f_l(x), or y_l:
what the average of two filters loses is regained before the next layer reads it. RegMean (Jin et al. 2023) is this
without rows, and with the parents' inputs in the place of the fused network's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from intrafusion.average.couplings import Couplings
from intrafusion.correct.memo import Memo, Room
from intrafusion.correct.observe import Sight, look
from intrafusion.correct.refit import RowMap, can_refit, folded_weight, match_statistics_, outputs, refit_
from intrafusion.correct.samples import Blocks, blocks_of, collect, reads_of
from intrafusion.groups.apply import shift_carrier
from intrafusion.groups.layout import channel_axis
from intrafusion.groups.table import GroupTable, Slot
from intrafusion.ot.rows import best_rows
from intrafusion.running import call_order, evaluating

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
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
        self.fused, self.parents, self.weights, self.run, self.batches = fused, parents, weights, run, batches
        room = Room()
        self._memos = [{id(network): Memo(room) for network in (fused, *parents)} for _ in batches]
        self._norms = {fold.layer: fold.norm for fold in couplings.folds}
        self._tables = {}
        for group in couplings.groups:
            table = couplings.tables.get(group.table)
            if table is not None and not group.reason and not group.rigid and (maker := _only_maker(table)):
                self._tables[maker.name] = table

    def refit_(self, progress: bool = True) -> None:
        """Refit the fused network, in the order of its forward pass.

        Raises ValueError if an activation is not finite.
        """
        with evaluating(self.fused, *self.parents):
            order = call_order(lambda: self.run(self.fused, self.batches[0]), self.fused, _LAYERS)
            hidden = None if progress else True
            for name in tqdm(order, desc="refit", unit="layer", delay=2, leave=False, disable=hidden):
                self._refit_(name)

    def _refit_(self, name: str) -> None:
        layer, bn = self._of(self.fused, name)
        rows = self._rows(name) if can_refit(layer) else None
        apart = rows is not None
        rows = rows or RowMap.identity(outputs(layer))
        if self._is_close(*next(self._sights(name, apart)), rows, channel_axis(layer)):
            return
        sights = self._sights(name, apart)
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
        readers = [slot for slot in table.slots if slot.reads]
        samples = [collect(self._blocks(slot, table.n), len(self.batches), self._reads(slot)) for slot in readers]
        samples = [sample for sample in samples if sample is not None]
        if not samples:
            return None
        average = torch.cat([own * torch.eye(table.n, dtype=torch.float64) for own in self.weights], dim=1)
        rows, shift = best_rows(average, samples, may_shift=shift_carrier(table) is not None)
        return RowMap(rows.cpu(), shift.cpu())

    def _reads(self, slot: Slot) -> Tensor:
        each = [reads_of(parent.get_submodule(slot.name), slot) for parent in self.parents]
        return torch.cat([own * reads for own, reads in zip(self.weights, each, strict=True)])

    def _blocks(self, slot: Slot, n: int) -> Iterator[Blocks | None]:
        """What a reader of a group sees in all parents, batch by batch."""
        for number in range(len(self.batches)):
            each = [blocks_of(s, s, slot, n) for s in self._look(slot.name, self.parents, number, add=False)]
            known = [block for block in each if block is not None]
            if len(known) < len(each):
                yield None
            else:
                z, h, calls = zip(*known, strict=True)
                yield torch.cat(z, dim=1), torch.cat(h, dim=1), calls[0]

    def _look(self, name: str, networks: Sequence[nn.Module], number: int, *, add: bool = True) -> list[Sight]:
        """Views of a layer in several networks on one batch."""
        batch, memos = self.batches[number], self._memos[number]
        return [
            look(partial(self.run, network, batch), *self._of(network, name), add=add, memo=memos[id(network)])
            for network in networks
        ]

    def _sights(self, name: str, apart: bool) -> Iterator[tuple[Sight, Sight]]:
        """(the parents side by side, fused) views of a layer, batch by batch; outputs are apart or their mean."""
        axis = channel_axis(self.fused.get_submodule(name))
        for number in range(len(self.batches)):
            *before, now = self._look(name, (*self.parents, self.fused), number)
            others = [sight.other for sight in before if sight.other is not None]
            made = [sight.output for sight in before]
            wide = Sight(
                inputs=torch.cat([sight.inputs for sight in before], dim=axis),
                before=before[0].before,
                chain=(),
                output=torch.cat(made, dim=axis) if apart else self._mean(made),
                other=self._mean(others) if len(others) == len(before) else None,
            )
            yield wide, now

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
