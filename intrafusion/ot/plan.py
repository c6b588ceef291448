"""The transport plan from all channels of a group to the kept ones.

    P = argmin <C, P>   subject to   P 1 = a,   P^T 1 = b,   P >= 0        (Theus et al. 2024, section 3)

solved exactly, by network simplex (POT) or as an assignment where half of a group of equal masses is kept; or, where
the target masses are not prescribed, channel by channel: `free` relaxes P^T 1 = b; `partial` relaxes P 1 = a as well,
by one more target that is the zero channel. What is nearer to nothing than to any kept channel is then transported
nowhere: no kept channel has to absorb what it cannot stand for.

Where the cost is a distance and the targets are the kept channels themselves, mass that can stay does: where channel i
sends some to j and takes as much from s, s may as well send it to j at once, for C(s, j) <= C(s, i) + C(i, j). So
min(a_i, b_i) stays at every kept channel i, at no cost, and only the other channels are compared with anything: half of
the distances when half of the channels go, and an optimum all the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from torch import Tensor

from intrafusion.ot.assignment import assign
from intrafusion.ot.cost import METRICS, pairwise_cost
from intrafusion.ot.parts import Features, Rows
from intrafusion.ot.targets import TARGETS, representatives

MASSES = ("uniform", "importance")
"""How much each channel weighs."""

TARGET_MASSES = (*MASSES, "free", "partial")
"""How much each target takes up. `free`: every channel goes to its nearest target. `partial`: or nowhere."""

_NOTHING = 1e-15
"""Mass that rounding leaves of what has stayed."""

_SMALLEST_MASS = 1e-6
"""A channel of importance zero still weighs this fraction of the mean, or it could not be transported at all."""


class PlanStatus(Enum):
    """How a plan came about; the value is the sentence a user reads."""

    IDENTITY = "every channel is kept, so each one stays where it is"
    EXACT = "optimal (network simplex or assignment)"
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
    if not torch.isfinite(cost).all():
        raise ValueError("the transport cost is not finite")
    a, b = (_as_distribution(mass, name) for mass, name in ((source, "source"), (target, "target")))
    if len(a) == len(b) and max(np.ptp(a), np.ptp(b)) < 1e-12 / len(a):
        return _one_to_one(cost)
    import ot  # takes longer to import than most groups take to solve

    c = np.ascontiguousarray(cost.detach().cpu().double().numpy())
    coupling, log = ot.emd(a, b, c, numItermax=max(1_000_000, 100 * c.size), log=True)
    if log["result_code"] != 1:
        raise RuntimeError(f"the transport solver stopped early: {log['warning']}")
    if max(np.abs(coupling.sum(1) - a).max(), np.abs(coupling.sum(0) - b).max()) > 1e-9:
        raise RuntimeError("the transport solver returned a plan that loses mass; please report this cost matrix")
    return torch.from_numpy(coupling).to(cost.device), float(log["cost"])


def _one_to_one(cost: Tensor) -> tuple[Tensor, float]:
    """As `solve` for as many targets as sources, all of one mass: some permutation is optimal (Birkhoff)."""
    order, mean = assign(cost)
    coupling = torch.zeros(cost.shape, dtype=torch.float64)
    coupling[order, torch.arange(len(order))] = 1.0 / len(order)
    return coupling.to(cost.device), mean


def transport_plan(
    features: Features,
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

    features: one row per channel, a matrix [n, d] or its parts [n, d_i] side by side, which are never put together:
    give the weights as they are, in the network's dtype; kept: [k] increasing channel numbers; classes: [n] labels
    (channels of different classes never mix; default: one class); importance: [n], needed for `importance` masses.
    Rows are normalised before they are compared. Within a class, sources share the class's part of the mass
    uniformly or by importance; so do the targets.

    Raises ValueError for unknown settings, missing or negative importance, or features that are not finite.
    """
    _check_choice("source mass", source_mass, MASSES)
    _check_choice("target mass", target_mass, TARGET_MASSES)
    _check_choice("targets", targets, TARGETS)
    rows = Rows.of(features).normalised()
    n, k = len(rows), len(kept)
    classes = torch.zeros(n, dtype=torch.long) if classes is None else classes.cpu()
    kept = kept.cpu()
    weight = {kind: _mass(kind, importance, n) for kind in {source_mass, target_mass} & set(MASSES)}

    coupling = torch.zeros(n, k, dtype=torch.float64, device=rows.device)
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
            block, paid = torch.diag(share).to(coupling), 0.0
        else:
            solved = True
            home = torch.searchsorted(members, kept[columns])
            group = rows.take(members)
            means = representatives(group, home, targets, seed=seed)
            if target_mass in ("free", "partial"):
                block, paid, left_out = _relaxed(group, means, cost, share, home, targets, target_mass == "partial")
                stranded[members] = left_out.cpu()
            else:
                wanted = weight[target_mass][kept[columns]]
                wanted = wanted * (share.sum() / wanted.sum())
                block, paid = _prescribed(group, means, cost, share, wanted, home, targets)
        coupling[members[:, None], columns[None, :]] = block
        total += paid
    mass = coupling.sum()
    if mass > 0:
        coupling, total = coupling / mass, total / float(mass)
    relaxed = {"free": PlanStatus.NEAREST, "partial": PlanStatus.PARTIAL}
    status = relaxed.get(target_mass, PlanStatus.EXACT) if solved else PlanStatus.IDENTITY
    return Plan(coupling, total, kept, status, stranded)


def _prescribed(
    group: Rows, means: Rows, cost: str, share: Tensor, wanted: Tensor, home: Tensor, targets: str
) -> tuple[Tensor, float]:
    """Transport with both masses given: share [n], wanted [k], of one sum. The block [n, k] and what it costs."""
    block = torch.zeros(len(group), len(means), dtype=torch.float64, device=group.device)
    if cost in METRICS and targets == "kept":
        stays = torch.minimum(share[home], wanted)
        block[home, torch.arange(len(home))] = stays.to(block)
        share, wanted = share.index_add(0, home, stays, alpha=-1), wanted - stays
    away, open_ = (share > _NOTHING).nonzero().flatten(), (wanted > _NOTHING).nonzero().flatten()
    if len(away) == 0 or len(open_) == 0:
        return block, 0.0
    c = pairwise_cost(group.take(away), means.take(open_), cost)
    moved, paid = solve(c, share[away], wanted[open_])
    mass = float(share[away].sum())
    block[away[:, None], open_[None, :]] += moved * mass
    return block, paid * mass


def _relaxed(
    group: Rows, means: Rows, cost: str, share: Tensor, home: Tensor, targets: str, partial: bool
) -> tuple[Tensor, float, Tensor]:
    """Semi-relaxed transport: the target masses are whatever arrives. A kept channel always stays at home.

    partial: what is nearer to zero than to any target stays out. The block [n, k], its cost, and [n] what stays out.
    """
    n, k = len(group), len(means)
    others = torch.ones(n, dtype=torch.bool)
    others[home] = False
    others = others.nonzero().flatten()
    c = pairwise_cost(group.take(others), means, cost)
    choice, paid = torch.empty(n, dtype=torch.long), torch.zeros(n, dtype=torch.float64)
    choice[home], choice[others] = torch.arange(k), c.argmin(dim=1).cpu()
    paid[others] = c.amin(dim=1).cpu()
    if targets != "kept":
        paid[home] = pairwise_cost(group.take(home), means, cost).diagonal().cpu()
    left_out = torch.zeros(n, dtype=torch.bool)
    if partial:
        zero = Rows.of([part.new_zeros(1, part.shape[1]) for part in means.parts])
        left_out[others] = pairwise_cost(group.take(others), zero, cost)[:, 0].cpu() <= paid[others]
    mass = share.masked_fill(left_out, 0.0)
    block = torch.zeros(n, k, dtype=torch.float64)
    block[torch.arange(n), choice] = mass
    return block.to(group.device), float(mass @ paid), left_out


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
