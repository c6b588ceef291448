"""Which channels to keep so that least squares rebuilds the others best: a greedy choice, from none or from all.

One reader of a group multiplies the channels h by a matrix V; with M = VᵀV and D the covariance of what is left of h
after the best affine prediction from the channels chosen so far, its expected squared error is tr(M D).

Forward, from no channel (a pivoted Cholesky): choosing channel j turns D into D - D_:j D_j: / D_jj, and so removes
(D M D)_jj / D_jj of the error. The largest goes first (orthogonal least squares; Chen, Billings & Luo 1989; for M = 1
the column subset selection of Farahat et al. 2011).

Backward, from all channels (OSSCAR, Meng et al., ICML 2024; optimal brain surgery with columns for weights): with H the
ridged covariance of the channels that are left, P = H⁻¹ and W [n, outputs] what the reader multiplies them by after the
refit, dropping j costs G_jj / P_jj, where G = W Wᵀ, and refits to

    W ← W - q W_j:,    P ← P - q P_j:,    G ← G - q g̃ᵀ - g̃ qᵀ,        q = P_:j / P_jj,    g̃ = G_:j - G_jj q / 2.

The cheapest goes first. Only [n, n] matrices are needed, and only single columns of them between two matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from intrafusion.ot.blocks import backward, forward

_EXHAUSTED = 1e-9
"""A channel with less than this share of its variance left is a combination of the chosen ones, up to rounding."""
_STRICT = 1e-12
_PANEL = 64
"""So many channels are dropped between two updates of whole matrices."""
SEARCHES = ("forward", "backward")
RIDGE, RIDGE_LEAST = 1e-2, 1e-10


def reconstruction_scores(
    covariances: Sequence[Tensor],
    metrics: Sequence[Tensor],
    search: str = "forward",
    ridge: float = RIDGE,
    blocks: int | None = None,
) -> Tensor:
    """[n] float64 scores; the k best channels are the first k picks of the greedy choice, for every k.

    covariances, metrics: [n, n] of each reader of the group, at least one, both positive semi-definite; one choice is
    made for all readers, each rebuilds its own view of the channels. (A covariance that is given several times, as the
    same object, costs what one costs.) search: `forward` picks the best channel first, `backward` drops the worst
    first: its picks are the drops, last one first. ridge: of `backward`, what is added to the variance of every
    channel, as a share of it. blocks: so many blocks of n / blocks channels each are chosen whole (see `ot.blocks`),
    and the channels of one share its score.

    The score of a pick is the share of the readers' error, sum tr(M D), that it removes. Where a pick removes more than
    an earlier one, as two channels can that are of use only together, the picks share what they remove; scores so fall
    with every pick, and sum to 1. A channel that the picks before explain gets next to nothing (at most n·1e-12: enough
    to keep all scores different; `backward`: and its part of the ridge).

    Raises ValueError for covariances or metrics that are not finite, another search, a ridge that is no positive
    number, or blocks that are not of one size.
    """
    if search not in SEARCHES:
        raise ValueError(f"search is {search!r}: it must be one of {', '.join(SEARCHES)}")
    if not RIDGE_LEAST <= ridge < float("inf"):
        raise ValueError(f"ridge is {ridge!r}: it must be a number from {RIDGE_LEAST} on")
    left, metric = _by_covariance(covariances, metrics)
    if blocks is not None and (blocks < 1 or left.shape[1] % blocks):
        raise ValueError(f"{left.shape[1]} channels are not {blocks} blocks of one size")
    if not (torch.isfinite(left).all() and torch.isfinite(metric).all()):
        raise ValueError("the covariance of the channels, or the weights that read them, are not finite")
    total = (left * metric).sum()
    if search == "backward":
        hessian, metric = _standardised(left, metric, ridge)
        if blocks is None:
            order, removed = _backward(hessian, metric, ridge)
        else:
            order, removed = backward(_inverse(hessian), metric, blocks)
        total = removed.sum()
    else:
        order, removed = _greedy(left, metric) if blocks is None else forward(left, metric, blocks)
    shares = _falling((removed / total.clamp(min=1e-300)).tolist())
    n = len(order)
    scores = torch.zeros(n, dtype=torch.float64, device=left.device)
    ramp = _STRICT * torch.arange(n, 0, -1, dtype=torch.float64, device=left.device)
    scores[order] = torch.tensor(shares, dtype=torch.float64, device=left.device) + ramp
    size = left.shape[1] // n
    return (scores / size).repeat_interleave(size)


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


def _by_covariance(covariances: Sequence[Tensor], metrics: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """[readers, n, n] float64 each; readers that see the very same are one, whose outputs are those of all of them."""
    sums: dict[int, Tensor] = {}
    for cov, metric in zip(covariances, metrics, strict=True):
        sums[id(cov)] = sums[id(cov)] + metric.double() if id(cov) in sums else metric.double()
    different = {id(cov): cov.double() for cov in covariances}
    return torch.stack(list(different.values())), torch.stack([sums[one] for one in different])


def _standardised(cov: Tensor, metric: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """H and G [readers, n, n] with channels in units of their spread, so that the ridge is the same share of each."""
    spread = cov.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    inverse = torch.where(spread > 0, 1.0 / torch.where(spread > 0, spread, 1.0), 0.0)
    hessian = cov * inverse[:, :, None] * inverse[:, None, :]
    hessian.diagonal(dim1=1, dim2=2).fill_(1.0 + ridge)  # of a constant too: it costs nothing, as nobody reads it
    return hessian, metric * spread[:, :, None] * spread[:, None, :]


def _backward(hessian: Tensor, metric: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Pick order [n], the last drop first, and what each drop costs [n]. hessian, metric: [readers, n, n]."""
    dropped, costs = [], []
    left = torch.arange(hessian.shape[1], device=hessian.device)
    while len(left):
        state = _refitted(hessian, metric, left)
        least = len(left) // 2 if len(left) > _PANEL else 0  # afresh at every halving: rounding does not pile up
        while len(left) > least:
            at, cost, state = _panel(*state, min(_PANEL, len(left) - least), 1.0 / (1.0 + ridge))
            dropped.append(left[at])
            costs.append(cost)
            left = left[_others(at, len(left))]
    return torch.cat(dropped).flip(0), torch.cat(costs).flip(0)


def _refitted(hessian: Tensor, metric: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """P and G of the channels that are left, after the refit of all of them at once."""
    if len(left) == hessian.shape[1]:
        return _inverse(hessian), metric
    rows = hessian[:, left]
    inverse = _inverse(rows[:, :, left])
    read = inverse @ rows
    return inverse, read @ metric @ read.mT


def _inverse(matrix: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix))


def _panel(inverse: Tensor, gram: Tensor, count: int, least: float) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Drop `count` channels one by one: which [count], their costs [count], and P and G of the others.

    inverse, gram: [readers, k, k]; least: what the diagonal of P cannot fall below. The matrices stay as they are until
    the end; what the drops so far have changed is taken off each column when it is needed.
    """
    readers, k, _ = inverse.shape
    p, e = inverse.diagonal(dim1=1, dim2=2).clone(), gram.diagonal(dim1=1, dim2=2).clone()
    roots, q, h = (inverse.new_zeros(readers, k, count) for _ in range(3))
    gone = torch.zeros(k, dtype=torch.bool, device=inverse.device)
    at, costs = [], []
    for i in range(count):
        cost = (
            (e.clamp(min=0) / p.clamp(min=0.5)).sum(dim=0).masked_fill(gone, torch.inf)
        )  # p is 1 / (1 + ridge) or more
        j = int(cost.argmin())
        at.append(j)
        costs.append(cost[j])
        gone[j] = True
        column = inverse[:, j] - (roots[:, :, :i] @ roots[:, j, :i, None])[..., 0]
        seen = gram[:, j] - (q[:, :, :i] @ h[:, j, :i, None] + h[:, :, :i] @ q[:, j, :i, None])[..., 0]
        pivot = column[:, j, None].clamp(min=least)
        roots[:, :, i] = column / pivot.sqrt()
        q[:, :, i] = column / pivot
        h[:, :, i] = seen - seen[:, j, None] / 2 * q[:, :, i]
        p -= roots[:, :, i].square()
        e -= 2 * q[:, :, i] * h[:, :, i]
    index = torch.tensor(at, device=inverse.device)
    others = _others(index, k)
    inverse, gram = inverse[:, others][:, :, others], gram[:, others][:, :, others]
    roots, q, h = roots[:, others], q[:, others], h[:, others]
    change = q @ h.mT
    return index, torch.stack(costs), (inverse - roots @ roots.mT, gram - change - change.mT)


def _others(at: Tensor, n: int) -> Tensor:
    """The numbers below n that are not in `at`, in order."""
    there = torch.ones(n, dtype=torch.bool, device=at.device)
    there[at] = False
    return there.nonzero().flatten()


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
