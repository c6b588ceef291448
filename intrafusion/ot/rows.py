"""How far each kept row moves towards the channels that the plan gives it, so that the group is rebuilt best.

With z the group's pre-activations, f the calls between them and the next layer, h = f(z) in the dense network and M
what the next layer makes of an error in h, find the new rows and their shift

    min over R, r, S, s   E (h - S h' - s)^T M (h - S h' - s),      h' = f(R z + r)

S and s are eliminated by least squares at every outer step, R and r take L-BFGS steps from the plan's barycentre; the
step is chosen, and the descent stopped, on samples that it does not see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_OUTER, _INNER = 5, 5
_RIDGE = 1e-3
_WEAK_RIDGES = (1e-6, 1e-9)
"""Tried as well where rows are read back for good: channels that are copies of each other are then read exactly."""
_COPY = 1e-10
"""A channel is another's copy if it differs by no more than this share of its power."""
_SOLVED = 1e-4
"""A start that leaves less than this share of what the readers read is not changed: its channels are duplicates."""
_FAR = 3.0
"""Standard deviations beyond which a piecewise linear function of a channel is linear for practically all inputs."""
_WORK = 2**36
"""About so many multiplications may the descent take; very wide groups get fewer steps, never none."""


@dataclass(frozen=True)
class Samples:
    """What one reader of a group sees.

    z: [P, n, ...] pre-activations of the pruned network, h: [P, n] what the dense network's reader reads, f: from
    [P, k, ...] to [P, k], metric M: [n, n] positive semi-definite, held_out: [P] bool, the samples that only judge.
    movable: z is mixed as the group's rows are; if not, only rows that are left in place are known to give it.
    """

    z: Tensor
    h: Tensor
    f: Callable[[Tensor], Tensor]
    metric: Tensor
    held_out: Tensor
    movable: bool = True


def best_rows(
    start: Tensor,
    readers: Sequence[Samples],
    *,
    may_shift: bool,
    selection: Tensor | None = None,
    columns: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows [k, n] and shift [k], in float64: from `start` [k, n], at matched spread, to where the readers rebuild best.

    may_shift: whether something can carry the shift; otherwise it is 0. selection: rows [k, n] that leave the kept
    channels as they are; they are taken where no other rows are better, and at once where columns [n, k] read the
    others from them already: duplicates stay exact. Raises ValueError for activations that are not finite.
    """
    channels = torch.cat([reader.z.movedim(1, -1).flatten(0, -2) for reader in readers]).double()
    if not torch.isfinite(channels).all():
        raise ValueError("the calibration inputs give activations that are not finite")
    mean, cov = channels.mean(dim=0), torch.cov(channels.T)
    rows, shift = match_spread(start.to(cov), mean, cov)
    given = rows, shift if may_shift else torch.zeros_like(shift)
    rows, shift = optimise_rows(*given, readers, selection, columns)
    if may_shift:
        shift = bound_means(rows, shift, given, mean.to(rows), cov.to(rows))
    return rows, shift


@torch.no_grad()
def read_copies(columns: Tensor, kept: Tensor, readers: Sequence[Samples]) -> Tensor:
    """columns [n, k], where channels that all readers see as copies of a kept one ([k]) are read from that one alone.

    A plan knows channels by their weights, and may have taken others for their copies. Where it has not, and for
    channels that nobody sees anything of, it stays as it is.
    """
    if not readers:
        return columns
    columns, kept = columns.clone(), kept.cpu()
    h = torch.cat([reader.h.double().cpu() for reader in readers])
    own = h.square().sum(dim=0)

    def same_as(chosen: Tensor) -> Tensor:
        return (h - h[:, kept[chosen]]).square().sum(dim=0) <= _COPY * own

    near = (own[kept] - 2 * h.T @ h[:, kept]).argmin(dim=1)
    mistaken = same_as(near) & ~same_as(columns.argmax(dim=1)) & (own > 0)
    columns[mistaken] = torch.eye(len(kept)).to(columns)[near[mistaken]]
    return columns


def match_spread(rows: Tensor, mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
    """Rescale averaged rows [k, n] so that each new channel is as spread out as its members, about their mean.

    mean: [n], cov: [n, n] of the channels. Returns (rows [k, n], shift [k]). A row without variance is left alone.
    """
    want = rows.abs() @ cov.diagonal().clamp(min=0).sqrt()
    have = ((rows @ cov) * rows).sum(dim=1).clamp(min=0).sqrt()
    factor = torch.where(have > 1e-9 * want, want / torch.where(have > 0, have, 1.0), torch.ones_like(want))
    factor = factor.clamp(max=1e3)
    scaled = factor[:, None] * rows
    return scaled, (rows - scaled) @ mean


def bound_means(rows: Tensor, shift: Tensor, start: tuple[Tensor, Tensor], mean: Tensor, cov: Tensor) -> Tensor:
    """The shift [k] with which no new channel lies farther from 0 than it has to.

    Where a channel is best kept linear, the descent may put its mean as far from the kink as it likes: what reads it
    takes the constant away again. A mean of many standard deviations is a bad start for training, though: the least
    change of a reader's weights moves its mean by as many, and running statistics lag behind. So each mean is brought
    back to 3 standard deviations, or to where the start (rows [k, n], shift [k]) had it, or to where it is without any
    shift, if that was farther.
    """

    def centre_and_spread(r: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return r @ mean + s, ((r @ cov) * r).sum(dim=1).clamp(min=0).sqrt()

    centre, spread = centre_and_spread(rows, shift)
    before, spread_before = centre_and_spread(*start)
    far = torch.where(spread_before > 0, before.abs() / spread_before, torch.inf).clamp(min=_FAR)
    limit = torch.where(spread > 0, far * spread, torch.inf).maximum((rows @ mean).abs())
    return shift + centre.clamp(-limit, limit) - centre


def optimise_rows(
    rows: Tensor,
    shift: Tensor,
    readers: Sequence[Samples],
    selection: Tensor | None = None,
    columns: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Improve rows [k, n] and shift [k] for all readers of a group at once. Returns them in float64.

    The result is never worse than the start, or than a selection, on the held-out samples; without samples, or with far
    fewer than rows, it is the start.
    """
    views = [_View(reader) for reader in readers if 2 * int((~reader.held_out).sum()) >= len(rows)]
    if not views:
        return rows, shift
    spread = _spread(views[0].samples.z)  # R is conditioned by what it multiplies
    z_dtype = views[0].samples.z.dtype
    scaled = (rows.to(z_dtype) * spread).contiguous().requires_grad_(True)
    offset = shift.to(z_dtype).clone().requires_grad_(True)
    optimiser = torch.optim.LBFGS(
        [scaled, offset], lr=1.0, max_iter=_INNER, history_size=10, line_search_fn="strong_wolfe"
    )
    best = (float("inf"), rows, shift)
    if selection is not None:
        best = _without_descent(selection.to(rows), torch.zeros_like(shift), views)
    work = sum(view.samples.z.numel() for view in views) * len(rows) * (_INNER + 1)
    enough = _SOLVED * sum(view.power for view in views)
    if columns is not None and sum(view.held_out_error(best[1], best[2], columns) for view in views) < enough:
        return best[1], best[2]
    steps = max(1, min(_OUTER, _WORK // max(1, work)))

    def closure() -> Tensor:
        optimiser.zero_grad()
        with torch.enable_grad():
            moved = scaled / spread
            loss = torch.stack([view.loss(moved, offset) for view in views]).sum()
            loss.backward()
        return loss

    last = float("inf")
    for step in range(steps + 1 if best[0] >= enough else 0):
        present = _without_descent((scaled / spread).detach(), offset.detach(), views)
        if not present[0] < last:
            break
        best, last = min(best, present, key=lambda one: one[0]), present[0]
        if step == steps or last < enough:
            break
        optimiser.step(closure)
    return best[1], best[2]


def _without_descent(rows: Tensor, shift: Tensor, views: Sequence[_View]) -> tuple[float, Tensor, Tensor]:
    """(held-out error, rows, shift), the latter in float64 and not those that descend on."""
    error = sum(view.held_out_error(rows, shift) for view in views)
    return error, rows.double().clone(), shift.double().clone()


@torch.no_grad()
def read_back(rows: Tensor, shift: Tensor, readers: Sequence[Samples], given: Tensor | None = None) -> Tensor:
    """S: [n, k] float64, by which the new channels of rows [k, n], shift [k] give the old ones best, least squares.

    given: [n, k] another one, that is taken if it does no worse: one that is exact, where least squares need a ridge.
    Raises ValueError for activations that are not finite.
    """
    new = torch.cat([_forward(r, rows.to(r.z), shift.to(r.z), r.z) for r in readers]).double()
    target = torch.cat([reader.h for reader in readers]).double()
    if not (torch.isfinite(new).all() and torch.isfinite(target).all()):
        raise ValueError("the calibration inputs give activations that are not finite")
    judges = torch.cat([reader.held_out for reader in readers])
    means = [value[~judges].mean(dim=0) for value in (new, target)]
    new, target = (value - mean for value, mean in zip((new, target), means, strict=True))
    fitted = new[~judges]
    gram, cross = fitted.T @ fitted, fitted.T @ target[~judges]
    reads = [] if given is None else [given.to(new)]
    reads += [_solved(gram, cross, ridge) for ridge in (_RIDGE, *_WEAK_RIDGES)]
    if not judges.any():
        return reads[-len(_WEAK_RIDGES) - 1]
    return min(reads, key=lambda read: float((target[judges] - new[judges] @ read.T).square().sum()))


class _View:
    """One reader's samples, in two parts: those that are fitted and those that judge.

    With C the covariances of the new channels h' and of what the reader should read, h, both about their means, the
    error that the best S leaves under the metric M is

        tr M (C_hh - S C_h'h - C_hh' S^T + S C_h'h' S^T)

    and its gradient with respect to h', S being at its optimum, is -2 (h M S - h' S^T M S) / P: no sample is ever
    multiplied by M itself, which is as wide as the group.
    """

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        fitted, judged = ~samples.held_out, samples.held_out
        self._z = samples.z[fitted], samples.z[judged]
        self._mean = samples.h[fitted].mean(dim=0)
        self._h = samples.h[fitted] - self._mean, samples.h[judged] - self._mean
        self._metric = samples.metric.to(samples.h)
        self._own = [float(_weighted(self._metric, h)) for h in self._h]
        judged_h = self._h[1] - self._h[1].mean(dim=0)
        self.power = float(_weighted(self._metric, judged_h)) if len(judged_h) else 0.0
        """The error on the held-out samples of reading nothing but the mean."""

    def loss(self, rows: Tensor, shift: Tensor) -> Tensor:
        """The error on the samples that are fitted, differentiable in rows [k, n] and shift [k]."""
        return _Error.apply(_forward(self.samples, rows, shift, self._z[0]), self._h[0], self._metric, self._own[0])  # type: ignore[return-value]

    @torch.no_grad()
    def held_out_error(self, rows: Tensor, shift: Tensor, read: Tensor | None = None) -> float:
        """The error on the held-out samples, with the means of the others; read: [n, k] S, theirs if not given."""
        rows, shift = rows.to(self.samples.z), shift.to(self.samples.z)
        fitted = _forward(self.samples, rows, shift, self._z[0])
        mean = fitted.mean(dim=0)
        read = _read_back(fitted - mean, self._h[0]) if read is None else read
        judged = _forward(self.samples, rows, shift, self._z[1]) - mean
        return float(_left(judged, self._h[1], read.to(judged), self._metric, self._own[1]))


class _Error(torch.autograd.Function):
    """The error that the best affine reading of h' [P, k] leaves of h [P, n], which has mean 0: see `_View`."""

    @staticmethod
    def forward(ctx: Any, new: Tensor, h: Tensor, metric: Tensor, own: float) -> Tensor:
        new = new - new.mean(dim=0)
        read = _read_back(new, h).to(new)
        seen = metric @ read
        gradient = h @ seen - new @ (read.T @ seen)
        ctx.save_for_backward((-2.0 / max(1, len(h))) * (gradient - gradient.mean(dim=0)))
        return _left(new, h, read, metric, own)

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return given[0] * gradient, None, None, None


def _left(new: Tensor, h: Tensor, read: Tensor, metric: Tensor, own: float) -> Tensor:
    """The mean error of reading h [P, n] from new [P, k] by read [n, k] under the metric; own: of reading nothing."""
    seen = metric @ read
    cross = ((new.T @ h) * seen.T).sum()
    square = ((new.T @ new) * (read.T @ seen)).sum()
    return own + (square - 2 * cross) / max(1, len(h))


def _forward(reader: Samples, rows: Tensor, shift: Tensor, z: Tensor) -> Tensor:
    """h' = f(R z + r): [p, k]."""
    mixed = torch.einsum("kn,pn...->pk...", rows, z)
    return reader.f(mixed + shift.reshape(1, -1, *[1] * (mixed.dim() - 2)))


def _read_back(new: Tensor, h: Tensor, ridge: float = _RIDGE) -> Tensor:
    """S [n, k] float64 by which new [p, k] gives h [p, n] best, least squares; both have mean 0."""
    return _solved((new.T @ new).double(), (new.T @ h).double(), ridge)


def _solved(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    system = gram.clone()
    system.diagonal().add_(ridge * gram.diagonal().mean() + 1e-12)
    return torch.linalg.solve(system, cross).T


def _weighted(metric: Tensor, error: Tensor) -> Tensor:
    return ((error @ metric) * error).sum() / max(1, len(error))


def _spread(z: Tensor) -> Tensor:
    deviation = z.movedim(1, 0).flatten(1).std(dim=1)
    return deviation.clamp(min=1e-6 * float(deviation.max().clamp(min=1e-12)))
