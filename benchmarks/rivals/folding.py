"""Model Folding (Wang et al., ICLR 2025, arXiv 2502.10216): channels are clustered and every cluster becomes its mean.

    R = (M^T M)^-1 M^T      S = M        M [n, k] the membership of channels in clusters

The clusters are k-means clusters of [rows, columns]. Averaging unlike channels shrinks their deviation; `FoldAR` undoes
that from the weights, `FoldR` from images.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from benchmarks.rivals.base import WeightRival, mean_spread, reestimate_, set_spread_
from intrafusion import Pair, Plan, method
from intrafusion.groups.apply import shift_carrier
from intrafusion.groups.batchnorm import bias_of, read
from intrafusion.groups.table import GroupTable
from intrafusion.methods.view import View
from intrafusion.ot import pairwise_cost, selection_pair

_RESTARTS = 10


def cluster(features: Tensor, kept: Tensor, classes: Tensor, seed: int = 0) -> Tensor:
    """Membership M [n, k] of channels in k-means clusters, one cluster for every kept channel.

    features: [n, d]; kept: [k] increasing; classes: [n], channels of different classes share no cluster. Each class is
    clustered from its kept channels and from random starts, and the tightest result stays. Which cluster takes which
    kept place is settled by the smallest total distance; it does not change what the network computes.
    """
    points = features.detach().cpu().double()
    kept, classes = kept.cpu(), classes.cpu()
    membership = torch.zeros(len(points), len(kept), dtype=torch.float64)
    for label in classes.unique():
        members = (classes == label).nonzero().flatten()
        places = (classes[kept] == label).nonzero().flatten()
        if len(places) == 0:
            continue
        inside = _coordinates(points[members])
        start = inside[torch.searchsorted(members, kept[places])]
        labels, centres = _kmeans(inside.numpy(), start.numpy(), seed)
        distance = pairwise_cost(torch.from_numpy(centres), start, "l2").numpy()
        place = places[torch.from_numpy(linear_sum_assignment(distance)[1])]
        membership[members, place[torch.from_numpy(labels).long()]] = 1.0
    return membership


def _coordinates(points: Tensor) -> Tensor:
    """The same points [n, d], up to a rotation, with at most n coordinates."""
    if points.shape[1] <= len(points):
        return points
    values, vectors = torch.linalg.eigh(points @ points.T)
    return vectors * values.clamp(min=0).sqrt()


def _kmeans(points: np.ndarray, start: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels [n] and centres [k, d] of the tightest of several runs."""
    k_means: Any = KMeans  # scikit-learn's defaults mislead the type checker
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # duplicates: fewer distinct points than clusters
        runs = [
            k_means(len(start), init=start, n_init=1).fit(points),
            k_means(len(start), n_init=_RESTARTS, random_state=seed).fit(points),
        ]
    best = min(runs, key=lambda run: run.inertia_)
    return best.labels_, best.cluster_centers_


def mean_pair(membership: Tensor, kept: Tensor) -> Pair:
    """Rows averaged, columns summed; a place whose cluster is empty keeps its row and is read by nobody.

    membership: [n, k].
    """
    size = membership.sum(dim=0)
    rows = (membership / size.clamp(min=1)).T.clone()
    empty = size == 0
    rows[empty, kept.cpu()[empty]] = 1.0
    return Pair(rows, membership, kept)


def repair_factor(filters: Tensor, membership: Tensor) -> Tensor:
    """[k] sqrt(N / (1 + (N-1) c)) per cluster: N channels, c the mean cosine of two different ones (Fold-AR).

    filters: [n, d]; membership: [n, k]. With unit filters u the denominator is |sum u|^2 / N, so the factor is
    N / |sum u|; it is what the mean of N equally spread signals with correlation c has lost.
    """
    unit = filters / filters.norm(dim=1, keepdim=True).clamp(min=1e-300)
    size = membership.sum(dim=0)
    factor = size / (membership.T @ unit).norm(dim=1).clamp(min=1e-3)
    return torch.where(size > 1, factor, 1.0)


@method("Folding")
class Folding(WeightRival):
    """Folded, and left at that."""

    parts = ("filters", "readers")

    def pair(self, table: GroupTable, plan: Plan, view: View) -> Pair:
        """The pair of the clusters of [filters, readers], both sides scaled to the same total norm.

        (On training images this did as well as or better than the sides unscaled, with the biases, or filters alone.)
        """
        sides = [self.weights(table, part) for part in self.parts]
        sides = [side / side.norm() for side in sides if side.norm() > 0]
        if not sides:
            return selection_pair(plan.kept, table.n)
        features = torch.cat([side.to(sides[0]) for side in sides], dim=1)
        return mean_pair(cluster(features, plan.kept, table.classes, view.seed), plan.kept)


@method("Fold-AR")
class FoldAR(Folding):
    """Approximate repair: the deviation of every merged pre-activation is scaled, its mean stays."""

    def pair(self, table: GroupTable, plan: Plan, view: View) -> Pair:
        folded = super().pair(table, plan, view)
        factor = repair_factor(self.weights(table, "filters").cpu(), folded.columns)
        shift = None
        if shift_carrier(table) is not None:
            shift = (1 - factor) * (folded.rows @ means(table))
        return Pair(factor[:, None] * folded.rows, folded.columns, plan.kept, shift)


@method("Fold-R")
class FoldR(Folding):
    """Repair from images: merged batch-norms keep their members' mean weight and get new statistics.

    A network without batch-norm is only folded.
    """

    inputs = "calibration"

    def pair(self, table: GroupTable, plan: Plan, view: View) -> Pair:
        folded = super().pair(table, plan, view)
        self._spread = mean_spread(table, folded.rows)
        return folded

    def mixed_(self, table: GroupTable, pair: Pair, view: View) -> None:
        if not pair.is_selection:
            set_spread_(self._spread, pair.kept)

    def end_(self, view: View) -> None:
        reestimate_(view.model, view.run, view.batches)


def means(table: GroupTable) -> Tensor:
    """[n] mean of the pre-activations that a group's producers add up to: a batch-norm's bias, else the layer's own."""
    total = torch.zeros(table.n, dtype=torch.float64)
    for slot in table.slots:
        if slot.produces:
            bias = bias_of(slot.owner, slot.size) if slot.partner is None else read(slot.partner).beta
            total += bias.cpu()[slot.local[:, 0]]
    return total
