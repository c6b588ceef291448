"""From a plan to a pair (R, S): what each kept producer row is made of, and from what each old channel is read.

    W' = R W        R [k, n]    producer rows, biases
    V' = V S        S [n, k]    consumer columns

Discarding is R = S^T = selection. (`intrafusion.methods` registers these rules, and others.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from intrafusion.ot.plan import Plan, PlanStatus


@dataclass(frozen=True)
class Pair:
    """rows R: [k, n] and columns S: [n, k], float64; kept: [k] the channels whose places the new ones take.

    shift: [k] is added to what the new rows produce (None: nothing). read: [n, k] how the old channels come from the
    new ones where the readers will be refitted to that (None: by the columns); gradients travel by it.
    """

    rows: Tensor
    columns: Tensor
    kept: Tensor
    shift: Tensor | None = None
    read: Tensor | None = None

    @property
    def rows_stay(self) -> bool:
        """True if the kept channels are what they were, whatever their readers make of them."""
        return torch.equal(self.rows, selection_pair(self.kept, self.rows.shape[1]).rows.to(self.rows))

    @property
    def is_selection(self) -> bool:
        """True if nothing is merged: the kept channels stay bit for bit what they were."""
        chosen = selection_pair(self.kept, self.rows.shape[1])
        return self.rows_stay and torch.equal(self.columns, chosen.columns.to(self.columns))


def selection_pair(kept: Tensor, n: int) -> Pair:
    """The pair that keeps channels `kept` of `n` and drops the rest, as torch-pruning does."""
    rows = torch.zeros(len(kept), n, dtype=torch.float64, device=kept.device)
    rows[torch.arange(len(kept)), kept] = 1.0
    return Pair(rows, rows.T.clone(), kept)


def kept_only(kept: Tensor, n: int) -> Plan:
    """A plan that transports nothing: it says which of n channels are kept [k], and costs nothing to make."""
    kept = kept.cpu()
    coupling = torch.zeros(n, len(kept), dtype=torch.float64)
    coupling[kept, torch.arange(len(kept))] = 1.0 / max(1, len(kept))
    stranded = torch.ones(n, dtype=torch.bool)
    stranded[kept] = False
    return Plan(coupling, 0.0, kept, PlanStatus.PARTIAL, stranded)


def selection(plan: Plan) -> Pair:
    """Discard: the plan is ignored."""
    return selection_pair(plan.kept, len(plan.coupling))


def paper(plan: Plan) -> Pair:
    """Published Intra-Fusion: each source's coefficients sum to 1, the same map on both sides (sum / sum)."""
    if plan.is_identity:
        return selection(plan)
    columns = _divide(plan.coupling, plan.source[:, None])
    return Pair(columns.T.clone(), columns, plan.kept)


def barycentre(plan: Plan) -> Pair:
    """Rows averaged, columns summed (mean / sum): exact when the merged channels are duplicates."""
    if plan.is_identity:
        return selection(plan)
    rows = _divide(plan.coupling, plan.target[None, :]).T.clone()
    empty = rows.sum(dim=1) == 0
    rows[empty, plan.kept.to(rows.device)[empty]] = 1.0
    return Pair(rows, _divide(plan.coupling, plan.source[:, None]), plan.kept)


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Elementwise quotient, 0 where nothing is there to share out."""
    return numerator / torch.where(denominator > 0, denominator, 1.0)
