"""Refit one layer of a pruned network so that its output is the dense network's, in closed form.

The regression runs on the layer's real inputs in the pruned network, errors of the layers before included, and aims at
what the layer gives in the dense network for the same inputs: the compounding of errors stops at every layer. Where the
output is added to a residual stream, the target also takes up what the stream has lost so far.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.correct.walk import Sight
from intrafusion.groups.batchnorm import read
from intrafusion.groups.kinds.base import kind_of
from intrafusion.groups.kinds.filters import filters_of
from intrafusion.groups.layout import by_channel, from_channels
from intrafusion.ot.regression import Fit, Moments, ridge

_FOLDS = 2
_PATCH_VALUES = 2**25
"""As many values of unfolded inputs are held at once (256 MB in float64)."""


@dataclass(frozen=True)
class RowMap:
    """What a layer's present outputs are, in terms of the dense network's: weights [k, L] and shift [k], float64."""

    weights: Tensor
    shift: Tensor

    @classmethod
    def identity(cls, size: int) -> RowMap:
        return cls(torch.eye(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64))

    @property
    def is_identity(self) -> bool:
        size = self.weights.shape[1]
        return len(self.weights) == size and torch.equal(self.weights, torch.eye(size).to(self.weights))

    def __call__(self, output: Tensor, axis: int) -> Tensor:
        """Apply to an activation whose channels are on `axis`."""
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
def refit_(layer: Any, bn: Any, dense: Any, dense_bn: Any, sights: Iterable[tuple[Sight, Sight]], rows: RowMap) -> bool:
    """Give a layer (and its batch-norm) new weights; False, and nothing changed, if its inputs are the dense ones.

    dense, dense_bn: the same layer of the dense network. sights: (dense, pruned), one pair per batch. rows: what the
    present outputs stand for. The prior of the ridge is the dense weight, read from the present channels as well as
    they allow; that of a grouped convolution is its present weight.

    Raises ValueError if an activation is not finite.
    """
    fits, reads, changed, narrow = _Folds(), _Folds(), False, False
    axis, groups = filters_of(layer).channel_axis, filters_of(layer).groups(layer)
    for before, now in sights:
        narrow = before.inputs.shape[axis] != now.inputs.shape[axis]
        target = rows(before.output, axis)
        if rows.is_identity and before.other is not None and now.other is not None:
            lost = before.other - now.other if before.other.shape == now.other.shape else None
            changed = changed or (lost is not None and bool(lost.any()))
            target = target if lost is None else target + lost
        changed = changed or narrow or not torch.equal(before.inputs, now.inputs)
        if not changed:  # what is the same for one batch is the same for all
            return False
        if not (torch.isfinite(target).all() and torch.isfinite(now.inputs).all()):
            raise ValueError("the calibration inputs give activations that are not finite")
        each = len(now.inputs) * filters_of(layer).patch_values(layer, now.inputs[0], target[0])
        for fold, chosen in fits.share(len(target), target.device, pieces=-(-each // _PATCH_VALUES)):
            patches, wanted = filters_of(layer).patches(layer, now.inputs[chosen]), by_channel(target[chosen], axis)
            fits.add(fold, _by_group(patches, groups), _by_group(wanted, groups))
            if narrow and groups == 1:
                reads.add(fold, by_channel(now.inputs[chosen], axis), by_channel(before.inputs[chosen], axis))
    if groups > 1:
        prior = folded_weight(layer, bn)
    else:
        weight = filters_of(layer).folded_weight(dense, dense_bn)
        if narrow:
            read_from = ridge(reads.sums, torch.zeros_like(reads.sums[0].xy.mT)).weight
            weight = torch.einsum("mn...,nk->mk...", weight, read_from)
        prior = torch.einsum("lm,m...->l...", rows.weights.to(weight), weight)
    _write_(layer, bn, ridge(fits.sums, prior.flatten(1).unflatten(0, (groups, -1))))
    return True


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
    _set(bn, "weight", bn.weight.detach().double() * factor)
    _set(bn, "bias", (bn.bias.detach().double() - have[0]) * factor + want[0])


class _Folds:
    """Running sums in two folds; images alternate between them, however they are batched."""

    def __init__(self) -> None:
        self._sums: list[Moments | None] = [None] * _FOLDS
        self._seen = 0

    def share(self, count: int, device: torch.device, pieces: int = 1) -> Iterator[tuple[int, Tensor]]:
        """(fold, images of the batch that belong to it), in at least that many pieces if there are enough images."""
        numbers = torch.arange(count, device=device)
        for fold in range(_FOLDS):
            members = numbers[(numbers + self._seen) % _FOLDS == fold]
            for chosen in members.tensor_split(max(1, min(len(members), -(-pieces // _FOLDS)))):
                if len(chosen):
                    yield fold, chosen
        self._seen += count

    def add(self, fold: int, x: Tensor, y: Tensor) -> None:
        more, total = Moments.of(x, y), self._sums[fold]
        self._sums[fold] = more if total is None else total + more

    @property
    def sums(self) -> list[Moments]:
        return [total for total in self._sums if total is not None]


def _by_group(values: Tensor, groups: int) -> Tensor:
    """[samples, groups * d] -> [groups, samples, d]"""
    return values.unflatten(1, (groups, -1)).movedim(1, 0)


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
        _set(bn, "running_mean", own - (bias - beta) / scale)
        _set(bn, "running_var", var)
        if bn.affine:
            _set(bn, "weight", gamma)
            _set(bn, "bias", beta)
    elif layer.bias is not None:
        _set(layer, "bias", bias)
    else:
        layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
    _set(layer, "weight", from_channels(weight, layer.weight))


def _set(owner: nn.Module, name: str, value: Tensor) -> None:
    old = getattr(owner, name)
    if name in owner._buffers:
        setattr(owner, name, value.to(old.dtype))
        return
    parameter = nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad)
    parameter.grad = old.grad
    setattr(owner, name, parameter)
