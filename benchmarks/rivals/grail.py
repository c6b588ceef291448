"""GRAIL (Tang et al., CPAL 2026, arXiv 2602.23795): each consumer reads the removed activations off the kept ones.

    B = G_HP (G_PP + lambda I)^-1        V' = V B        lambda = 1e-3 · mean(diag G_PP)

G is the second moment of what the consumer reads, on unlabelled images; the producer keeps its selected rows.
"""

from __future__ import annotations

from typing import Any

import torch
from intrafusion.correct.observe import look
from torch import Tensor

from benchmarks.rivals.base import Rival, reestimate_, same_class
from intrafusion.groups.layout import by_channel, channel_axis
from intrafusion.groups.table import GroupTable
from intrafusion.ot import Pair, Plan, selection_pair
from intrafusion.running import evaluating

RIDGE = 1e-3


def reconstruct(gram: Tensor, kept: Tensor, ridge: float = RIDGE) -> Tensor:
    """B [n, k] from the second moments G [n, n] of all channels."""
    system = gram[kept][:, kept].clone()
    system.diagonal().add_(ridge * system.diagonal().mean() + 1e-12)
    return torch.linalg.solve(system, gram[kept]).T.contiguous()


class Grail(Rival):
    """Selection, then the ridge regression of all channels on the kept ones.

    The moments are the dense network's, as in the authors' vision code; taken layer by layer on the network as it is
    by then they did no better (ResNet-20 and VGG11-BN at 50 %).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._grams: dict[str, Tensor | None] = {}

    def position(self, table: GroupTable) -> int:
        self._grams[table.name] = None if table.unsupported else self.gram(table)
        return super().position(table)

    def pair(self, table: GroupTable, plan: Plan) -> Pair:
        chosen = selection_pair(plan.kept, table.n)
        gram = self._grams[table.name]
        if gram is None:
            return chosen
        columns = torch.where(same_class(table, plan.kept), reconstruct(gram.cpu(), plan.kept.cpu()), 0.0)
        return Pair(chosen.rows, columns, plan.kept)

    def gram(self, table: GroupTable) -> Tensor | None:
        """[n, n] second moments of a group's channels, summed over the consumers that read them; None if unread."""
        readers = [slot for slot in table.slots if slot.reads and slot.name in self.order]
        total = None
        with evaluating(self.model):
            for slot in readers:
                summed, count = torch.zeros((), dtype=torch.float64), 0
                for batch in self.images:
                    inputs = look(lambda b=batch: self.run(self.model, b), slot.owner, None, add=False).inputs
                    seen = by_channel(inputs, channel_axis(slot.owner)).double()
                    local = slot.local.to(seen.device)
                    copies = torch.where(local >= 0, seen[:, local.clamp(min=0)], 0.0).movedim(2, 1).flatten(0, 1)
                    summed, count = copies.T @ copies + summed.to(copies), count + len(copies)
                total = summed / count if total is None else total + summed / count
        return total


class GrailReestimated(Grail):
    """The same, then the statistics of every batch-norm from the images."""

    def finish(self) -> None:
        reestimate_(self.model, self.run, self.images)
