"""What it costs to move a channel onto another one."""

from __future__ import annotations

import torch
from torch import Tensor

COSTS = ("l1", "l2", "cosine")
"""Distances that :func:`pairwise_cost` knows; `l1` is the published one."""


def normalise_rows(features: Tensor) -> Tensor:
    """Divide every row by its Euclidean norm; a zero row stays zero (no NaN).

    >>> normalise_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6, 0.8], [0.0, 0.0]]

    features: [n, d]. Returns [n, d]. Rows are rescaled by their largest entry first, so that neither a
    tiny nor a huge row under- or overflows when it is squared.
    """
    if features.shape[1] == 0:
        return features
    largest = features.abs().amax(dim=1, keepdim=True)
    scaled = features / torch.where(largest > 0, largest, 1.0)
    norm = scaled.norm(dim=1, keepdim=True)
    return scaled / torch.where(norm > 0, norm, 1.0)


def pairwise_cost(x: Tensor, y: Tensor, kind: str = "l1") -> Tensor:
    """Distance of every row of `x` to every row of `y`.

    x: [n, d], y: [k, d], both on one device. Returns [n, k] in float64, all entries >= 0.
    kind: `l1` (sum of absolute differences, as published), `l2` (Euclidean), `cosine` (1 - cosine similarity;
    two zero rows are at distance 0, a zero row is at distance 1 from any other).

    Raises ValueError for an unknown kind or for features that are not finite.
    """
    if kind not in COSTS:
        raise ValueError(f"unknown cost {kind!r}: choose one of {', '.join(COSTS)}")
    x, y = x.double(), y.double()
    for name, rows in (("channel", x), ("target", y)):
        bad = (~torch.isfinite(rows).all(dim=1)).nonzero().flatten()
        if len(bad):
            raise ValueError(f"the features of {name} {bad[0].item()} are not finite")
    if kind == "l1":
        return torch.cdist(x, y, p=1)
    if kind == "l2":
        return torch.cdist(x, y, p=2, compute_mode="donot_use_mm_for_euclid_dist")
    x, y = normalise_rows(x), normalise_rows(y)
    both_zero = (x == 0).all(dim=1)[:, None] & (y == 0).all(dim=1)[None, :]
    return (1.0 - x @ y.T).clamp(min=0.0).masked_fill(both_zero, 0.0)
