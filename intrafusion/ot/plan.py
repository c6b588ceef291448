"""The transport plan from all channels of a group to the kept ones.

    P = argmin <C, P>   subject to   P 1 = a,   P^T 1 = b,   P >= 0        (Theus et al. 2024, section 3)

solved exactly by network simplex (POT), or, where the target masses are not prescribed, channel by channel: `free`
relaxes P^T 1 = b; `partial` relaxes P 1 = a as well, by one more target that is the zero channel. What is nearer to
nothing than to any kept channel is then transported nowhere: no kept channel has to absorb what it cannot stand for.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from torch import Tensor

from intrafusion.ot.cost import normalise_rows, pairwise_cost
from intrafusion.ot.targets import TARGETS, representatives

MASSES = ("uniform", "importance")
"""How much each channel weighs."""

TARGET_MASSES = (*MASSES, "free", "partial")
"""How much each target takes up. `free`: every channel goes to its nearest target. `partial`: or nowhere."""

_SMALLEST_MASS = 1e-6
"""A channel of importance zero still weighs this fraction of the mean, or it could not be transported at all."""


class PlanStatus(Enum):
    """How a plan came about; the value is the sentence a user reads."""

    IDENTITY = "every channel is kept, so each one stays where it is"
    EXACT = "optimal (network simplex)"
    NEAREST = "every channel goes whole to its nearest target (target masses left free)"
    PARTIAL = "every channel goes whole to its nearest target, or nowhere if nothing is nearer (partial transport)"


@dataclass(frozen=True)
class Plan:
    """A coupling of `n` channels with `k` kept ones.

    coupling: [n, k] float64, entries >= 0, summing to 1. cost: <C, coupling>. kept: [k] int64, which of the n
    channels the targets stand for. stranded: [n] bool, channels that share no coupling class with any kept one,
    or that a partial plan leaves out, and so carry no mass.
    """

    coupling: Tensor
    cost: float
    kept: Tensor
    status: PlanStatus
    stranded: Tensor

    @property
    def source(self) -> Tensor:
        """[n] the mass of every channel (P 1)."""
        return self.coupling.sum(dim=1)

    @property
    def target(self) -> Tensor:
        """[k] the mass of every kept channel (P^T 1)."""
        return self.coupling.sum(dim=0)

    @property
    def main_targets(self) -> tuple[tuple[int, float], ...]:
        """For each channel the kept channel that takes most of it, and that part of its mass; (-1, 0.0) for none."""
        mass, (most, target) = self.source, self.coupling.max(dim=1)
        share = torch.where(mass > 0, most / mass, 0.0).tolist()
        chosen = torch.where(mass.cpu() > 0, self.kept[target.cpu()], -1).tolist()
        return tuple((channel, round(part, 4)) for channel, part in zip(chosen, share, strict=True))

    @property
    def is_identity(self) -> bool:
        return self.status is PlanStatus.IDENTITY


def solve(cost: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, float]:
    """Exact optimal transport for one cost matrix.

    cost: [n, k], source: [n], target: [k], masses >= 0. Both masses are scaled to sum to 1.
    Returns the coupling [n, k] in float64 on the device of `cost`, and <cost, coupling>.

    Raises ValueError for a cost or masses that are not finite, negative masses or masses that are all zero;
    RuntimeError if the solver does not reach the optimum (POT itself would only warn, or return garbage).
    """
    import ot

    if not torch.isfinite(cost).all():
        raise ValueError("the transport cost is not finite")
    a, b = (_as_distribution(mass, name) for mass, name in ((source, "source"), (target, "target")))
    c = np.ascontiguousarray(cost.detach().cpu().double().numpy())
    coupling, log = ot.emd(a, b, c, numItermax=max(1_000_000, 100 * c.size), log=True)
    if log["result_code"] != 1:
        raise RuntimeError(f"the transport solver stopped early: {log['warning']}")
    if max(np.abs(coupling.sum(1) - a).max(), np.abs(coupling.sum(0) - b).max()) > 1e-9:
        raise RuntimeError("the transport solver returned a plan that loses mass; please report this cost matrix")
    return torch.from_numpy(coupling).to(cost.device), float(log["cost"])


def transport_plan(
    features: Tensor,
    kept: Tensor,
    *,
    classes: Tensor | None = None,
    importance: Tensor | None = None,
    cost: str = "l1",
    source_mass: str = "uniform",
    target_mass: str = "uniform",
    targets: str = "kept",
    seed: int = 0,
) -> Plan:
    """Plan from all channels of a group to the kept ones, class by class.

    features: [n, d], one row per channel; kept: [k] increasing channel numbers; classes: [n] labels (channels of
    different classes never mix; default: one class); importance: [n], needed for `importance` masses.
    Rows are normalised before they are compared. Within a class, sources share the class's part of the mass
    uniformly or by importance; so do the targets.

    Raises ValueError for unknown settings, missing or negative importance, or features that are not finite.
    """
    _check_choice("source mass", source_mass, MASSES)
    _check_choice("target mass", target_mass, TARGET_MASSES)
    _check_choice("targets", targets, TARGETS)
    features = normalise_rows(features.double())
    n, k = len(features), len(kept)
    classes = torch.zeros(n, dtype=torch.long) if classes is None else classes.cpu()
    kept = kept.cpu()
    weight = {kind: _mass(kind, importance, n) for kind in {source_mass, target_mass} & set(MASSES)}

    coupling = features.new_zeros(n, k)
    stranded = torch.zeros(n, dtype=torch.bool)
    total, solved = 0.0, False
    for label in classes.unique():
        members = (classes == label).nonzero().flatten()
        columns = (classes[kept] == label).nonzero().flatten()
        if len(columns) == 0:
            stranded[members] = True
            continue
        share = weight[source_mass][members]
        if len(columns) == len(members):
            block, paid = torch.diag(share).to(features), 0.0
        else:
            solved = True
            home = torch.searchsorted(members, kept[columns])
            means = representatives(features[members], home, targets, seed=seed)
            c = pairwise_cost(features[members], means, cost)
            if target_mass in ("free", "partial"):
                block, paid = _nearest(c, share.to(c), home)
                if target_mass == "partial":
                    nothing = pairwise_cost(features[members], torch.zeros_like(means[:1]), cost)[:, 0]
                    left_out = nothing <= c.amin(dim=1)
                    left_out[home] = False
                    stranded[members] = left_out.cpu()
                    block[left_out] = 0.0
                    paid = float((block * c).sum())
            else:
                block, paid = solve(c, share, weight[target_mass][kept[columns]])
                block, paid = block * share.sum().to(block), paid * float(share.sum())
        coupling[members[:, None], columns[None, :]] = block
        total += paid
    mass = coupling.sum()
    if mass > 0:
        coupling, total = coupling / mass, total / float(mass)
    relaxed = {"free": PlanStatus.NEAREST, "partial": PlanStatus.PARTIAL}
    status = relaxed.get(target_mass, PlanStatus.EXACT) if solved else PlanStatus.IDENTITY
    return Plan(coupling, total, kept, status, stranded)


def _nearest(cost: Tensor, share: Tensor, home: Tensor) -> tuple[Tensor, float]:
    """Semi-relaxed transport: the target masses are whatever arrives. A kept channel always stays at home."""
    choice = cost.argmin(dim=1)
    choice[home] = torch.arange(len(home), device=choice.device)
    block = torch.zeros_like(cost)
    block[torch.arange(len(cost)), choice] = share
    return block, float((block * cost).sum())


def _mass(kind: str, importance: Tensor | None, n: int) -> Tensor:
    if kind == "uniform":
        return torch.full((n,), 1.0 / n, dtype=torch.float64)
    if importance is None:
        raise ValueError("importance masses need the importance of every channel, and the metric gave none")
    if len(importance) != n:
        raise ValueError(f"importance has {len(importance)} entries for {n} channels")
    return torch.from_numpy(_as_distribution(importance, "importance", floor=_SMALLEST_MASS))


def _as_distribution(mass: Tensor, name: str, floor: float = 0.0) -> np.ndarray:
    values = mass.detach().cpu().double().numpy()
    if not np.isfinite(values).all():
        raise ValueError(f"{name} masses are not finite")
    if (values < 0).any():
        raise ValueError(f"{name} masses are negative ({values.min():.3g}): masses must be >= 0")
    total = values.sum()
    if total <= 0:
        raise ValueError(f"{name} masses are all zero")
    if floor:
        values = np.maximum(values, floor * total / len(values))
    return values / values.sum()


def _check_choice(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {what} {value!r}: choose one of {', '.join(allowed)}")
