"""The cheapest fusion that looks at inputs: channels that stay do, and those that go are read from them.

Each reader's weights become W S, with S by least squares on what the readers see in the dense network (CORP, GRAIL):

    min over S   E |h - S h_kept|^2 + ridge |S|^2

Nothing behind it is put right. It is what widths are tried with: see `prune.allocation`.
"""

from __future__ import annotations

import torch

from intrafusion.groups.table import GroupTable
from intrafusion.methods.method import Method
from intrafusion.methods.view import View
from intrafusion.ot import Pair, Plan, selection_pair

_RIDGE = 1e-3
"""In units of the kept channels' mean power."""


class ReadBack(Method):
    """inputs: what it is shown, `synthetic` or `calibration`."""

    samples = True
    sources = plan = False

    def __init__(self, inputs: str) -> None:
        self.inputs = inputs

    def pair(self, table: GroupTable, plan: Plan, view: View) -> Pair:
        chosen = selection_pair(plan.kept, table.n)
        seen = [reader.h.double() for reader in view.samples(table)]
        if not seen:
            return chosen
        seen = [h / h.square().mean().sqrt().clamp(min=1e-300) for h in seen]  # every reader counts the same
        gram = sum((h.T @ h for h in seen), torch.zeros((), dtype=torch.float64, device=seen[0].device))
        kept = plan.kept.to(gram.device)
        among = gram[kept][:, kept]
        among.diagonal().add_(_RIDGE * float(among.diagonal().mean().clamp(min=1e-12)))
        columns = torch.linalg.solve(among, gram[kept]).T.cpu()
        same = table.classes[:, None] == table.classes[plan.kept.cpu()][None, :]
        return Pair(chosen.rows, torch.where(same, columns, 0.0), plan.kept)
