"""Refit one layer of a pruned network so that its output is the dense network's, in closed form.

The regression runs on the layer's real inputs in the pruned network, errors of the layers before included, and aims at
what the layer gives in the dense network for the same inputs: the compounding of errors stops at every layer. Where the
output is added to a residual stream, the target also takes up what the stream has lost so far.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.correct.walk import Sight
from intrafusion.groups.batchnorm import read
from intrafusion.groups.kinds.base import kind_of
from intrafusion.groups.kinds.filters import filters_of
from intrafusion.groups.layout import by_channel, from_channels
from intrafusion.ot.regression import Fit, Moments, Prior, ridge

_FOLDS = 2
_PATCH_VALUES = 2**24
"""As many values of unfolded inputs are held at once (64 MB in float32)."""
_TO_READ = 2
"""The dense inputs are read from d present ones by regression where there are `_TO_READ` d places or more."""
_PER_VALUE, _PER_PIXEL, _FEWEST = 128, 32, 16384
"""A layer whose outputs read d values is fitted on at most `_PER_VALUE` d places (`_PER_PIXEL` d of a map, where there
are many and neighbours alike), or `_FEWEST` if that is more."""


@dataclass(frozen=True)
class RowMap:
    """What a layer's present outputs are, in terms of the dense network's: weights [k, L] and shift [k], float64."""

    weights: Tensor
    shift: Tensor

    @classmethod
    def identity(cls, size: int) -> RowMap:
        return cls(torch.eye(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64))

    @cached_property
    def is_identity(self) -> bool:
        """Is every output the dense network's, but for the shift?"""
        size = self.weights.shape[1]
        return len(self.weights) == size and torch.equal(self.weights, torch.eye(size).to(self.weights))

    def then(self, maps: Tensor, moved: Tensor | float = 0.0) -> RowMap:
        """These outputs [k], mapped once more, by maps [j, k], and moved by [j]."""
        weights = maps if self.is_identity else maps @ self.weights
        return RowMap(weights, maps @ self.shift + moved)

    def __call__(self, output: Tensor, axis: int) -> Tensor:
        """Apply to an activation whose channels are on `axis`."""
        if self.is_identity and not self.shift.any():
            return output
        mapped = output.movedim(axis, -1) @ self.weights.T.to(output) + self.shift.to(output)
        return mapped.movedim(-1, axis)


def outputs(layer: Any) -> int:
    """How many channels a linear layer or a convolution gives."""
    return filters_of(layer).outputs(layer)


def can_refit(layer: Any) -> bool:
    """Linear layers and 1d and 2d convolutions, grouped ones too, of bearable width."""
    kind = kind_of(layer)
    return kind is not None and kind.can_refit(layer)


@torch.no_grad()
def refit_(
    layer: Any,
    bn: Any,
    dense: Any,
    dense_bn: Any,
    sights: Sequence[tuple[Sight, Sight]],
    rows: RowMap,
    *,
    kept: Tensor | None = None,
    may_have_bias: bool = True,
    sensitivity: Sequence[Tensor] | None = None,
) -> bool:
    """Give a layer (and its batch-norm) new weights; False, and nothing changed, if its inputs are the dense ones.

    dense, dense_bn: the same layer of the dense network. sights: (dense, pruned), one pair per batch. rows: what the
    present outputs stand for. kept: [k] which of the dense inputs are still there, if these are all there are.
    may_have_bias: if the layer has none, it gets one, or is fitted without. sensitivity: how much each place of each
    batch counts, [inputs, *places]; alike, if that is not told.

    The ridge pulls towards the present weight, which the pair has mixed, or towards the dense one, read as well as a
    regression can from the present channels, or from the same ones in the dense network: to what predicts held-out
    images best.

    Raises ValueError if an activation is not finite.
    """
    kind = filters_of(layer)
    axis, groups = kind.channel_axis, kind.groups(layer)
    compensates = rows.is_identity and all(_other(before, now) is not None for before, now in sights)
    narrow = any(before.inputs.shape[axis] != now.inputs.shape[axis] for before, now in sights)
    if not narrow and not any(_differ(before, now, compensates) for before, now in sights):
        return False
    width = sights[0][1].inputs.shape[axis]
    kept = kept if kept is not None and len(kept) == width else None  # somebody else may have cut what is read
    reading = narrow and groups == 1 and sum(now.inputs.numel() for _, now in sights) >= _TO_READ * width**2
    affine = may_have_bias or bn is not None or layer.bias is not None
    fits, reads, among = _Folds(groups, affine=affine), _Folds(), _Folds()
    per_image, each = layer.weight[0].numel(), _PER_VALUE if axis == -1 else _PER_PIXEL
    given = sum(before.output.numel() for before, _ in sights) // sights[0][0].output.shape[axis]
    taken = sum(now.inputs.numel() for _, now in sights) // width
    for number, (before, now) in enumerate(sights):
        windows = kind.windows(layer, now.inputs, now.geometry)
        dense_output = before.output.movedim(axis, -1)
        lost = _other(before, now) if compensates else None
        lost = None if lost is None else lost.movedim(axis, -1)
        weights = None if sensitivity is None else sensitivity[number]
        for fold, at in fits.places(dense_output.shape[:-1], per_image, each, given, now.inputs.device):
            target = rows(dense_output[at], -1)
            target = target if lost is None else target + lost[at]
            fits.add(fold, windows[at].flatten(1), target, None if weights is None else weights[at])
        if reading:
            now_inputs, dense_inputs = now.inputs.movedim(axis, -1), before.inputs.movedim(axis, -1)
            for fold, at in reads.places(now_inputs.shape[:-1], width, each, taken, now.inputs.device):
                reads.add(fold, now_inputs[at], dense_inputs[at])
                if kept is not None:
                    among.add(fold, dense_inputs[at][:, kept], dense_inputs[at])
    priors = [Prior(folded_weight(layer, bn).flatten(1).unflatten(0, (groups, -1)))]
    if groups == 1 and (reading or not narrow):
        weight = kind.folded_weight(dense, dense_bn)
        weight = torch.einsum("lm,m...->l...", rows.weights.to(weight), weight)
        readings = [reads] if kept is None else [reads, among]
        priors += [_through(read.fit(), weight) for read in readings] if narrow else [Prior(weight.flatten(1)[None])]
    _write_(layer, bn, fits.fit(*priors))
    return True


def _through(reading: Fit, weight: Tensor) -> Prior:
    """A weight [l, n, ...] for dense inputs as one for the present ones, of which `reading` makes them."""

    def of(read: Tensor) -> Tensor:
        return torch.einsum("ln...,nk->lk...", weight, read[0]).flatten(1)[None]

    return Prior(of(reading.weight), tuple(map(of, reading.without)))


def _other(before: Sight, now: Sight) -> Tensor | None:
    """What the stream that the output is added to has lost, if it is added to one in both networks."""
    if before.other is None or now.other is None or before.other.shape != now.other.shape:
        return None
    return before.other - now.other


def _differ(before: Sight, now: Sight, compensates: bool) -> bool:
    return not torch.equal(before.inputs, now.inputs) or (compensates and not torch.equal(before.other, now.other))  # type: ignore[arg-type]


@torch.no_grad()
def match_statistics_(layer: Any, bn: Any, sights: Iterable[tuple[Sight, Sight]], rows: RowMap) -> None:
    """Set a batch-norm so that its output has the mean and spread that it should: for layers that are not refitted."""
    axis = filters_of(layer).channel_axis
    totals: list[Moments | None] = [None, None]
    for before, now in sights:
        for i, value in enumerate((rows(before.output, axis), now.output)):
            sample = by_channel(value, axis)
            sums = Moments.of(sample[:, :0], sample)
            totals[i] = sums if totals[i] is None else totals[i] + sums  # pyright: ignore
    if totals[0] is None or totals[1] is None or not bn.affine:
        return
    want, have = ((t.y / t.n, (t.centred()[2] / t.n).sqrt()) for t in totals if t is not None)
    factor = torch.where(have[1] > 1e-6, want[1] / have[1].clamp(min=1e-6), 1.0).clamp(max=1e2)
    set_tensor_(bn, "weight", bn.weight.detach().double() * factor)
    set_tensor_(bn, "bias", (bn.bias.detach().double() - have[0]) * factor + want[0])


class _Folds:
    """Running sums in two folds; images alternate between them, however they are batched.

    Sums are taken about the first piece's mean: features whose mean is far above their spread do not cancel. For a map
    without a shift (affine=False) they are taken about zero.
    """

    def __init__(self, groups: int = 1, *, affine: bool = True) -> None:
        self._groups, self._affine = groups, affine
        self._sums: list[Moments | None] = [None] * _FOLDS
        self._about: tuple[Tensor, Tensor] | None = None
        self._seen = 0
        self._generator = torch.Generator().manual_seed(0)

    def places(
        self, shape: Sequence[int], values: int, each: int, total: int, device: torch.device
    ) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """(fold, index of some places of an activation), in pieces of a bearable size.

        shape: of the places of one batch, images first. values: how many are read at each. total: places of all
        batches. The same share of each batch is taken, `each` places for every value at most.
        """
        count = math.prod(shape)
        wanted = max(1, max(_FEWEST, each * values) * count // total)
        chosen = torch.arange(count)
        if count > wanted:
            chosen = torch.randperm(count, generator=self._generator)[:wanted]
        image = torch.div(chosen, max(1, count // shape[0]), rounding_mode="floor")
        for fold in range(_FOLDS):
            members = chosen[(image + self._seen) % _FOLDS == fold]
            for piece in members.split(max(1, _PATCH_VALUES // values)):
                if len(piece):
                    yield fold, torch.unravel_index(piece.to(device), tuple(shape))
        self._seen += shape[0]

    def add(self, fold: int, x: Tensor, y: Tensor, weights: Tensor | None = None) -> None:
        """x: [samples, groups * d], y: [samples, groups * m], weights: [samples] how much each counts"""
        x, y = (value.to(torch.promote_types(value.dtype, torch.float32)) for value in (x, y))
        if self._about is None:
            means = x.mean(dim=0), y.mean(dim=0)
            self._about = means if self._affine else (torch.zeros_like(means[0]), torch.zeros_like(means[1]))
        x, y = (
            (value - mean).unflatten(1, (self._groups, -1)).movedim(1, 0)
            for value, mean in zip((x, y), self._about, strict=True)
        )
        more, total = Moments.of(x, y, weights, affine=self._affine), self._sums[fold]
        self._sums[fold] = more if total is None else total + more

    def fit(self, *priors: Prior) -> Fit:
        """The regression; priors: [groups, m, d], zeros if none. Raises ValueError for what is not finite."""
        sums = [total for total in self._sums if total is not None]
        if not all(torch.isfinite(part.xx.sum() + part.xy.sum() + part.yy.sum()) for part in sums):
            raise ValueError("the calibration inputs give activations that are not finite")
        fit = ridge(sums, *(priors or [Prior(torch.zeros_like(sums[0].xy.mT))]))
        assert self._about is not None
        x, y = (mean.double().unflatten(0, (self._groups, -1)) for mean in self._about)
        bias = fit.bias + y - (fit.weight @ x[..., None])[..., 0]
        return replace(fit, bias=bias, mean=fit.mean + y)


def folded_weight(layer: Any, bn: Any) -> Tensor:
    """The weight in float64, with the scale of its batch-norm (or None)."""
    return filters_of(layer).folded_weight(layer, bn)


def _write_(layer: Any, bn: Any, fit: Fit) -> None:
    """Put a fitted affine map into a layer and its batch-norm, whose statistics become those of the fitted output."""
    weight, bias, mean, std = (value.flatten(0, 1) for value in (fit.weight, fit.bias, fit.mean, fit.std))
    if bn is not None:
        var = read(bn).var if bn.affine else torch.full_like(std, 1.0 - bn.eps)
        gamma = std.clamp(min=1e-6 * float(std.max().clamp(min=1e-12))) if bn.affine else torch.ones_like(std)
        beta = mean if bn.affine else torch.zeros_like(mean)
        scale = gamma / (var + bn.eps).sqrt()
        weight = weight / scale[:, None]
        own = torch.zeros_like(bias) if layer.bias is None else layer.bias.detach().double()
        set_tensor_(bn, "running_mean", own - (bias - beta) / scale)
        set_tensor_(bn, "running_var", var)
        if bn.affine:
            set_tensor_(bn, "weight", gamma)
            set_tensor_(bn, "bias", beta)
    elif layer.bias is not None:
        set_tensor_(layer, "bias", bias)
    elif fit.affine:
        layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
    set_tensor_(layer, "weight", from_channels(weight, layer.weight))


def set_tensor_(owner: nn.Module, name: str, value: Tensor) -> None:
    """Give a module a new parameter or buffer in the place of an old one, of its precision."""
    old = getattr(owner, name)
    if name in owner._buffers:
        setattr(owner, name, value.to(old.dtype))
        return
    parameter = nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad)
    parameter.grad = old.grad
    setattr(owner, name, parameter)
