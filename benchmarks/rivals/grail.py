"""GRAIL (Tang et al., CPAL 2026, arXiv 2602.23795): each consumer reads the removed activations off the kept ones.

    B = G_HP (G_PP + lambda I)^-1        V' = V B        lambda = 1e-3 · mean(diag G_PP)

G is the second moment of what the consumer reads, on unlabelled images; the producer keeps its selected rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.rivals.base import reestimate_, same_class
from intrafusion import Method, Pair, Plan, method
from intrafusion.groups.layout import by_channel
from intrafusion.groups.table import GroupTable, Slot
from intrafusion.methods.view import View
from intrafusion.ot import selection_pair

RIDGE = 1e-3


def reconstruct(gram: Tensor, kept: Tensor, ridge: float = RIDGE) -> Tensor:
    """B [n, k] from the second moments G [n, n] of all channels."""
    system = gram[kept][:, kept].clone()
    system.diagonal().add_(ridge * system.diagonal().mean() + 1e-12)
    return torch.linalg.solve(system, gram[kept]).T.contiguous()


@method("GRAIL")
class Grail(Method):
    """Selection, then the ridge regression of all channels on the kept ones.

    The moments are the dense network's, as in the authors' vision code; taken layer by layer on the network as it is
    by then they did no better (ResNet-20 and VGG11-BN at 50 %).
    """

    inputs = "calibration"
    plan = False

    def __init__(self) -> None:
        self._moments: dict[str, list[_Moments]] = {}

    def begin(self, view: View, tables: Sequence[GroupTable]) -> None:
        """The second moments of all groups, in one pass over the images."""
        watched: dict[str, list[_Moments]] = {}
        for table in tables:
            slots = [slot for slot in table.slots if slot.reads and not table.unsupported]
            self._moments[table.name] = [_Moments(slot) for slot in slots]
            for moments in self._moments[table.name]:
                watched.setdefault(moments.slot.name, []).append(moments)
        view.watch({name: partial(_tell, [moments.see for moments in found]) for name, found in watched.items()})

    def pair(self, table: GroupTable, plan: Plan, view: View) -> Pair:
        chosen = selection_pair(plan.kept, table.n)
        seen = [moments.gram for moments in self._moments[table.name] if moments.count]
        if not seen:  # nobody reads the group
            return chosen
        gram = torch.stack(seen).sum(dim=0).cpu()
        columns = torch.where(same_class(table, plan.kept), reconstruct(gram, plan.kept.cpu()), 0.0)
        return Pair(chosen.rows, columns, plan.kept)


@method("GRAIL + batch-norm")
class GrailReestimated(Grail):
    """The same, then the statistics of every batch-norm from the images."""

    def end_(self, view: View) -> None:
        reestimate_(view.model, view.run, view.batches)


class _Moments:
    """Running second moments of a group's channels, as one of its readers reads them."""

    def __init__(self, slot: Slot) -> None:
        self.slot, self.count, self.sum = slot, 0, torch.zeros((), dtype=torch.float64)

    def see(self, inputs: Tensor) -> None:
        seen = by_channel(inputs, self.slot.kind.channel_axis).double()
        local = self.slot.local.to(seen.device)
        copies = torch.where(local >= 0, seen[:, local.clamp(min=0)], 0.0).movedim(2, 1).flatten(0, 1)
        self.sum = copies.T @ copies + self.sum.to(copies)
        self.count += len(copies)

    @property
    def gram(self) -> Tensor:
        """[n, n]"""
        return self.sum / self.count


def _tell(each: Sequence[Callable[[Tensor], None]], inputs: Tensor) -> None:
    for see in each:
        see(inputs)
