"""Batch-norm folded into the layer before it, and made real again.

A layer z = W x + b followed by a batch-norm is one affine map

    y = a (W x + b - mean) + beta,      a = gamma / sqrt(var + eps)

so its folded rows are a·W and its folded shift is a (b - mean) + beta. (The published Intra-Fusion code leaves `eps`
out; with it the folded network is the network.) Merged folded rows become a real batch-norm again with the mean and
variance that the merged channel has if every original channel follows its own statistics, so that training mode
starts from the same function.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from intrafusion.groups.coefficients import Coefficients
from intrafusion.groups.layout import from_channels, scaled, to_channels


@dataclass(frozen=True)
class Affine:
    """What a batch-norm says about its channels, in float64, all [L].

    scale a, shift beta - a·mean (without the layer's own bias), mean and std of the output (beta, |gamma| with gamma's
    sign), running mean and variance of the input.
    """

    scale: Tensor
    gamma: Tensor
    beta: Tensor
    mean: Tensor
    var: Tensor
    eps: float

    def at(self, local: Tensor) -> Affine:
        """The channels `local` [n], in that order; -1 (no such channel) gives one that does nothing."""
        there, index = local >= 0, local.clamp(min=0)
        fields = (self.scale, self.gamma, self.beta, self.mean)
        taken = (torch.where(there, values[index], 0.0) for values in fields)
        return Affine(*taken, var=torch.where(there, self.var[index], 1.0), eps=self.eps)


def read(bn: Any) -> Affine:
    """The statistics of a batch-norm; a non-affine one has gamma 1 and beta 0."""
    mean, var = bn.running_mean.double(), bn.running_var.double()
    gamma = bn.weight.detach().double() if bn.affine else torch.ones_like(mean)
    beta = bn.bias.detach().double() if bn.affine else torch.zeros_like(mean)
    return Affine(gamma / (var + bn.eps).sqrt(), gamma, beta, mean, var, bn.eps)


def bias_of(layer: Any, size: int) -> Tensor:
    """[size] the layer's bias in float64, zeros if it has none."""
    if layer.bias is None:
        return torch.zeros(size, dtype=torch.float64, device=layer.weight.device)
    return layer.bias.detach().double()


def correlation(rows: Tensor) -> Tensor:
    """[n, d] filters -> [n, n] correlation of their responses to white inputs: the cosine; 1 on the diagonal."""
    unit = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-300)
    rho = unit @ unit.T
    return rho.fill_diagonal_(1.0)


@dataclass(frozen=True)
class Merged:
    """New rows for c merged channels of a layer and its batch-norm: rows [c, d], the others [c]."""

    rows: Tensor
    bias: Tensor
    gamma: Tensor
    beta: Tensor
    mean: Tensor
    var: Tensor


def merge(rows: Tensor, bias: Tensor, bn: Affine, mix: Coefficients, *, affine: bool, averaged: bool = False) -> Merged:
    """Merge channels of a (layer, batch-norm) pair and split the result into the two again.

    rows: [n, d] raw filters of any precision, which the new ones have; the arithmetic is float64. bias: [n], bn:
    statistics [n], mix: [c, n], the coefficients of the folded channels. averaged: the filters are gains on channels
    that are mixed already.

    The eval output is exactly that of the merged folded channel. Its mean is mix @ beta; its variance is
    mix Cov mix^T with Cov_ij = gamma_i gamma_j cos(w_i, w_j), which is exact for white inputs. How the result is split
    between filter and batch-norm is free; the running variance is the average of the members', each with its share in
    the output. A nearly dead member may have a huge coefficient: were it counted by that, the filter would be as tiny
    as its own, and the first step of training as many times too large.
    """
    weights = _shares(mix, bn.gamma)
    folding = (mix.row_average() if averaged else mix).scaled(bn.scale)
    shift = mix @ (bn.scale * (bias - bn.mean) + bn.beta)
    beta, var, new_bias = mix @ bn.beta, weights @ bn.var, weights @ bias
    if not affine:
        one = torch.ones_like(beta)
        return Merged(folding.mixed(rows), new_bias, one, torch.zeros_like(beta), new_bias - shift, one - bn.eps)
    spread = _spread(rows, mix.scaled(bn.gamma))
    sign = torch.where(mix @ bn.scale < 0, -1.0, 1.0).to(spread)
    silent = spread == 0  # all members are constant: gamma 0 says so, whatever the filter
    gamma = sign * spread
    scale = torch.where(silent, 1.0, gamma / (var + bn.eps).sqrt())
    made = torch.where(silent[mix.row], weights.value, folding.value / scale[mix.row])
    mean = torch.where(silent, weights @ bn.mean, new_bias - (shift - beta) / scale)
    return Merged(mix.with_values(made).mixed(rows), new_bias, gamma, torch.where(silent, shift, beta), mean, var)


def _spread(rows: Tensor, signed: Coefficients) -> Tensor:
    """[c] standard deviation of merged channels: signed [c, n] mixes filters [n, d] whose outputs have deviation 1."""
    size = rows.norm(dim=1, dtype=torch.float64)
    unit = signed.scaled(1.0 / torch.where(size == 0, 1.0, size))
    square = signed.with_values(signed.value.square()) @ (size == 0).to(size)  # zeros correlate with themselves alone
    for _, together in unit.products(rows):
        square += together.square_().sum(dim=1)
    return torch.maximum(square.sqrt(), 1e-3 * signed.with_values(signed.value.abs()).row_sums())


def merge_alone(bn: Affine, mix: Tensor, rho: Tensor, *, affine: bool) -> Merged:
    """Merge the channels of a batch-norm that cannot be folded (behind a concat or a shared layer).

    Its input channels were mixed by `mix`: [c, n]; rho: [n, n] is the assumed correlation of its inputs. The gain is
    the members' average gain, which is exact where they agree.
    """
    weights = row_average(mix)
    scale, mean, beta = weights @ bn.scale, mix @ bn.mean, mix @ bn.beta
    spread = mix * bn.var.sqrt()
    var = ((spread @ rho) * spread).sum(dim=1).clamp(min=1e-3 * float(bn.var.min()), max=None)
    if not affine:
        var = (1.0 / scale.square().clamp(min=1e-300)) - bn.eps
    nothing = torch.zeros(len(mix), 0, dtype=mix.dtype, device=mix.device)
    return Merged(nothing, torch.zeros_like(mean), scale * (var + bn.eps).sqrt(), beta, mean, var)


def row_average(mix: Tensor) -> Tensor:
    """Magnitudes of the rows of `mix`, scaled to sum to 1: the map for gains, which must not be counted twice."""
    total = mix.abs().sum(dim=1, keepdim=True)
    return mix.abs() / torch.where(total == 0, 1.0, total)


def _shares(mix: Coefficients, gamma: Tensor) -> Coefficients:
    """Row averages in which each member counts as much as it moves the output; by `mix` alone where none does."""
    moved = mix.scaled(gamma)
    silent = moved.with_values(moved.value.abs()).row_sums() == 0
    return mix.with_values(torch.where(silent[mix.row], mix.value, moved.value)).row_average()


@contextmanager
def folded(pairs: Iterable[tuple[Any, Any, int]]) -> Iterator[None]:
    """For as long as it lasts, the (layer, batch-norm, output axis) pairs look batch-norm-folded.

    Layers hold the folded weights (gradients too: dL/d(aW) = dL/dW / a), the batch-norms say they are not affine, so
    that importance metrics pass over them. Afterwards every tensor is the very one it was before.
    """
    saved = []
    try:
        for layer, bn, axis in pairs:
            weight, bias = layer.weight, layer.bias
            saved.append((layer, bn, weight.data, weight.grad, bias, bn.affine))
            stats = read(bn)
            rows = to_channels(weight.data, axis)
            weight.data = from_channels(scaled(rows, stats.scale, weight.dtype), weight, axis)
            if saved[-1][3] is not None:
                inverse = torch.where(stats.scale == 0, 0.0, 1.0 / stats.scale)
                grad = scaled(to_channels(weight.grad, axis), inverse, weight.dtype)
                weight.grad = from_channels(grad, weight, axis)
            shift = stats.scale * (bias_of(layer, len(rows)) - stats.mean) + stats.beta
            layer.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=False)
            if bn.affine and bn.bias.grad is not None:
                layer.bias.grad = bn.bias.grad.clone()
            bn.affine = False
        yield
    finally:
        for layer, bn, data, grad, bias, affine in reversed(saved):
            layer.weight.data, layer.weight.grad = data, grad
            layer.bias, bn.affine = bias, affine


@torch.no_grad()
def recenter_batchnorms_(model: nn.Module, batches: Iterable[Any]) -> int:
    """Give batch-norms the statistics that images really have, without changing what the network computes in eval mode.

    With running mean and variance (m, v), weight and bias (g, b), and inputs of mean m' and variance v':

        m, v := m', v'      g := g sqrt(v' + eps) / sqrt(v + eps)      b := b + g (m' - m) / sqrt(v + eps)

    so that training mode, which normalises with the statistics of its batch, starts from the same function. It is worth
    doing where that function is better than what training mode computes now; after plain cutting it is worse. All
    statistics come from one pass in eval mode, which stays valid because eval outputs do not change.

    Args:
        model: every affine batch-norm in it that tracks statistics is changed; the others are left alone.
        batches: inputs, or ``(inputs, ...)`` tuples; a thousand images are plenty.

    Returns:
        How many batch-norms were changed.

    Raises:
        ValueError: there are no batches, or a batch-norm's input is not finite; the network is as it was.
    """
    norms: dict[Any, _Moments] = {
        m: _Moments() for m in model.modules() if isinstance(m, _BatchNorm) and m.affine and m.running_mean is not None
    }
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    hooks = [norm.register_forward_pre_hook(moments.see) for norm, moments in norms.items()]
    model.eval()
    count = 0
    try:
        for count, batch in enumerate(batches, start=1):  # noqa: B007
            inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
            model(inputs.to(device))
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    if count == 0:
        raise ValueError("recentring batch-norms needs at least one batch of inputs")
    seen = {norm: moments for norm, moments in norms.items() if moments.count}
    names = {module: name for name, module in model.named_modules()}
    for norm, moments in seen.items():
        if not bool(torch.isfinite(moments.mean).all() and torch.isfinite(moments.var).all()):
            raise ValueError(f"the input of batch-norm '{names[norm]}' is not finite on these batches")
    for norm, moments in seen.items():
        old = read(norm)
        norm.weight.copy_(old.scale * (moments.var + norm.eps).sqrt())
        norm.bias.copy_(old.beta + old.scale * (moments.mean - old.mean))
        norm.running_mean.copy_(moments.mean)
        norm.running_var.copy_(moments.var)
    return len(seen)


class _Moments:
    """Mean and variance per channel of everything a batch-norm has read, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.var = torch.zeros(())

    def see(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].detach().transpose(0, 1).flatten(1)
        var, mean = torch.var_mean(rows.double(), dim=1, correction=0)
        total = self.count + rows.shape[1]
        share = rows.shape[1] / total
        gap = mean - self.mean
        self.var = (1 - share) * self.var + share * var + share * (1 - share) * gap.square()
        self.mean = self.mean + share * gap
        self.count = total
