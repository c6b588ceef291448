"""Which channels to keep so that least squares rebuilds the others best: a greedy choice, as a pivoted Cholesky.

One reader of a group multiplies the channels h by a matrix V; with M = VᵀV and D the covariance of what is left of h
after the best affine prediction from the channels chosen so far, its expected squared error is tr(M D). Choosing
channel j turns D into D - D_:j D_j: / D_jj, and so removes (D M D)_jj / D_jj of the error. The largest goes first
(orthogonal least squares; Chen, Billings & Luo 1989; for M = 1 the column subset selection of Farahat et al. 2011).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_EXHAUSTED = 1e-9
"""A channel with less than this share of its variance left is a combination of the chosen ones, up to rounding."""
_STRICT = 1e-12


def reconstruction_scores(covariances: Sequence[Tensor], metrics: Sequence[Tensor]) -> Tensor:
    """[n] float64 scores; the k best channels are the first k picks of the greedy choice, for every k.

    covariances, metrics: [n, n] of each reader of the group, at least one, both positive semi-definite; one choice is
    made for all readers, each rebuilds its own view of the channels. The score of a pick is the share of the readers'
    error, sum tr(M D), that it removes. Where a pick removes more than an earlier one, as two channels can that are of
    use only together, the picks share what they remove; scores so fall with every pick, and sum to 1. A channel that
    the picks before explain gets next to nothing (at most n·1e-12: enough to keep all scores different).

    Raises ValueError for covariances or metrics that are not finite.
    """
    left, metric = torch.stack(list(covariances)).double(), torch.stack(list(metrics)).double()
    if not (torch.isfinite(left).all() and torch.isfinite(metric).all()):
        raise ValueError("the covariance of the channels, or the weights that read them, are not finite")
    order, removed = _greedy(left, metric)
    total = (left * metric).sum().clamp(min=1e-300)
    shares = _falling((removed / total).tolist())
    n = len(order)
    scores = torch.zeros(n, dtype=torch.float64, device=left.device)
    ramp = _STRICT * torch.arange(n, 0, -1, dtype=torch.float64, device=left.device)
    scores[order] = torch.tensor(shares, dtype=torch.float64, device=left.device) + ramp
    return scores


def _greedy(left: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """Pick order [n] and what each pick removes [n]. left, metric: [readers, n, n]."""
    n = left.shape[1]
    variance = left.diagonal(dim1=1, dim2=2).clamp(min=0)
    floor = _EXHAUSTED * variance
    energy = ((left @ metric) * left).sum(dim=2)  # (D M D)_jj, kept up to date
    left, variance, energy = left.clone(), variance.clone(), energy.clone()
    open_ = torch.ones(n, dtype=torch.bool, device=left.device)
    order, removed = [], []

    def gains() -> Tensor:
        alive = variance > floor
        return torch.where(alive, energy / torch.where(alive, variance, 1.0), 0.0).clamp(min=0).sum(dim=0)

    first = gains()
    for _ in range(n):
        gain = torch.where(open_, gains(), -1.0)
        j = int(gain.argmax())
        if gain[j] <= 0:
            break
        order.append(j)
        removed.append(gain[j])
        open_[j] = False
        column, pivot = left[:, :, j].clone(), variance[:, j]
        inverse = torch.where(pivot > floor[:, j], 1.0 / torch.where(pivot > 0, pivot, 1.0), 0.0)[:, None]
        read = (metric @ column[:, :, None])[:, :, 0]
        seen = (left @ read[:, :, None])[:, :, 0]
        within = (column * read).sum(dim=1, keepdim=True)
        energy += (column * inverse).square() * within - 2 * column * seen * inverse
        left.baddbmm_((column * inverse)[:, :, None], column[:, None, :], alpha=-1)
        variance -= column.square() * inverse
    rest = open_.nonzero().flatten()
    rest = rest[torch.sort(first[rest], descending=True, stable=True).indices]
    picked = torch.tensor(order, dtype=torch.long, device=left.device)
    amounts = torch.stack(removed) if removed else first[:0]
    return torch.cat([picked, rest]), torch.cat([amounts, torch.zeros_like(first[: len(rest)])])


def _falling(shares: list[float]) -> list[float]:
    """The same sum, never rising: neighbours that rise are averaged (pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []  # (sum, length)
    for share in shares:
        block = (share, 1)
        while blocks and blocks[-1][0] * block[1] < block[0] * blocks[-1][1]:
            block = (blocks[-1][0] + block[0], blocks[-1][1] + block[1])
            blocks.pop()
        blocks.append(block)
    return [total / length for total, length in blocks for _ in range(length)]
