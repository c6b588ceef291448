"""First and second moments of a group's channels: expected from the weights alone, or measured on inputs.

Expected: the network is followed from the layers that produce the channels to those that read them, and every step
maps a Gaussian to a Gaussian with the same moments. A layer's output has the correlation of its filters (its inputs are
taken as white, with mean 0 and variance 1), a batch-norm sets the mean and variance that it remembers, activations are
exact for Gaussian inputs (`intrafusion.ot.moments`), sums and products are of independent terms, and what follows a
concat or an operation that is not known is the average of what goes in. Poolings, reshapes and dropouts pass everything
on: for rebuilding channels from each other, a common scale does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

from intrafusion.groups.batchnorm import bias_of, read
from intrafusion.groups.layout import by_channel, channel_axis, gather, to_channels
from intrafusion.groups.table import GroupTable, Role, Slot
from intrafusion.ot.moments import activation_moments
from intrafusion.running import evaluating

_ACTIVATIONS: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    "Relu": lambda call: torch.relu,
    "Hardtanh": lambda call: lambda z: z.clamp(call._saved_min_val, call._saved_max_val),
    "LeakyRelu": lambda call: lambda z: F.leaky_relu(z, call._saved_negative_slope),
    "Gelu": lambda call: lambda z: F.gelu(z, approximate=call._saved_approximate),
    "Elu": lambda call: lambda z: call._saved_scale * F.elu(call._saved_input_scale * z, call._saved_alpha),
    "Celu": lambda call: lambda z: F.celu(z, call._saved_alpha),
    "Softplus": lambda call: lambda z: F.softplus(z, call._saved_beta, call._saved_threshold),
    "Clamp": lambda call: lambda z: z.clamp(call._saved_min, call._saved_max),
    "Silu": lambda call: F.silu,
    "Mish": lambda call: F.mish,
    "Hardswish": lambda call: F.hardswish,
    "Hardsigmoid": lambda call: F.hardsigmoid,
    "Sigmoid": lambda call: torch.sigmoid,
    "Tanh": lambda call: torch.tanh,
}
"""By the name of the autograd node, which holds the activation's settings."""


def activation_of(node: Any) -> Callable[[Tensor], Tensor] | None:
    """The pointwise function that a node of the dependency graph applies, None if it is no activation."""
    name = str(getattr(node.module, "_grad_fn", ""))
    make = _ACTIVATIONS.get(name.split("Backward")[0])
    return make(node.grad_fn) if make is not None else None


@dataclass(frozen=True)
class Gaussian:
    """mean [n] and covariance [n, n] of a group's channels at one place of the network, float64."""

    mean: Tensor
    cov: Tensor

    @property
    def std(self) -> Tensor:
        return self.cov.diagonal().clamp(min=0).sqrt()

    @property
    def correlation(self) -> Tensor:
        """1 on the diagonal; channels that do not vary are correlated with no other."""
        std = self.std
        inverse = torch.where(std > 0, 1.0 / torch.where(std > 0, std, 1.0), 0.0)
        rho = (inverse[:, None] * self.cov * inverse).clamp(-1, 1)
        return rho.fill_diagonal_(1.0)

    def through(self, f: Callable[[Tensor], Tensor]) -> Gaussian:
        return Gaussian(*activation_moments(self.mean, self.std, self.correlation, f))

    def __add__(self, other: Gaussian) -> Gaussian:
        """The sum of independent terms."""
        return Gaussian(self.mean + other.mean, self.cov + other.cov)

    def __mul__(self, other: Gaussian) -> Gaussian:
        """The product of independent factors."""
        a, b = torch.outer(self.mean, self.mean), torch.outer(other.mean, other.mean)
        return Gaussian(self.mean * other.mean, self.cov * other.cov + a * other.cov + b * self.cov)


def expected_covariances(graph: tp.DependencyGraph, table: GroupTable, readers: Sequence[Slot]) -> list[Tensor]:
    """[n, n] covariance of the group's channels as each reader reads them, from the weights and the batch-norms.

    Without readers, one covariance: of what the group's layers give. Where nothing is known, channels are independent.
    """
    follow = _Follower(table)
    unknown = Gaussian(torch.zeros(table.n, dtype=torch.float64), torch.eye(table.n, dtype=torch.float64))
    produced = follow.produced(graph) or unknown
    return [(follow.into(graph.module2node[reader.owner]) or produced).cov for reader in readers] or [produced.cov]


class _Follower:
    """Follows the moments of one group through the network, backwards from where they are asked for."""

    def __init__(self, table: GroupTable) -> None:
        self._inside = {owner for owner, _ in table.removable}
        self._slots = {slot.owner: slot for slot in table.slots if slot.role is not Role.CONSUMER}
        self._known: dict[Any, Gaussian | None] = {}

    def produced(self, graph: tp.DependencyGraph) -> Gaussian | None:
        """What the layers of the group give, each behind its batch-norm; the average if there are several."""
        layers = [
            slot.partner or slot.owner for slot in self._slots.values() if slot.role in (Role.PRODUCER, Role.SHIFT)
        ]
        found = [self._after(graph.module2node[layer]) for layer in layers]
        return _average([one for one in found if one is not None])

    def into(self, node: Any) -> Gaussian | None:
        """What a node gets from within the group; the average if there are several."""
        return _average(self._sources(node))

    def _sources(self, node: Any) -> list[Gaussian]:
        found = [self._after(source) for source in node.inputs if source.module in self._inside]
        return [one for one in found if one is not None]

    def _after(self, node: Any) -> Gaussian | None:
        if node not in self._known:
            self._known[node] = None  # a layer that is called again, with its own output: the first call counts
            self._known[node] = self._output(node)
        return self._known[node]

    def _output(self, node: Any) -> Gaussian | None:
        slot = self._slots.get(node.module)
        if slot is not None and slot.role is Role.PRODUCER:
            return _filtered(slot, None)
        if slot is not None and slot.role in (Role.SHIFT, Role.GAIN) and not isinstance(slot.owner, nn.PReLU):
            return _parameter(slot)
        sources = self._sources(node)
        value = _average(sources)
        if slot is not None and slot.role is Role.DEPTHWISE:
            return _filtered(slot, value)
        if value is None:
            return None
        if slot is not None and slot.role is Role.BATCHNORM:
            return _normalised(slot, value)
        if slot is not None and slot.role is Role.NORM:
            return _standardised(slot, value)
        if isinstance(node.module, nn.PReLU):
            slope = node.module.weight.detach().double()
            slope = gather(slope[:, None], slot.local[:, :1]) if slot is not None else slope
            return value.through(lambda z: torch.where(z > 0, z, slope * z))
        f = activation_of(node)
        if f is not None:
            return value.through(f)
        name = str(getattr(node.module, "_grad_fn", ""))
        if name.startswith("AddBackward"):
            return sum(sources[1:], start=sources[0])
        if name.startswith("MulBackward"):
            product = sources[0]
            for factor in sources[1:]:
                product = product * factor
            return product
        return value


def _average(values: Sequence[Gaussian]) -> Gaussian | None:
    if len(values) < 2:
        return values[0] if values else None
    count = len(values)
    return Gaussian(sum(v.mean for v in values) / count, sum(v.cov for v in values) / count)  # pyright: ignore


def _filtered(slot: Slot, inputs: Gaussian | None) -> Gaussian:
    """A layer's output, without its batch-norm: of white inputs, or, depthwise, of inputs that are white in space."""
    rows = to_channels(slot.owner.weight.detach().double(), slot.axis, slot.chunks)
    filters = gather(rows, slot.local)
    bias = gather(bias_of(slot.owner, slot.size)[:, None], slot.local[:, :1])[:, 0]
    if inputs is None:
        return Gaussian(bias, filters @ filters.T)
    return Gaussian(bias + inputs.mean * filters.sum(dim=1), inputs.cov * (filters @ filters.T))


def _normalised(slot: Slot, value: Gaussian) -> Gaussian:
    """Behind a batch-norm: its mean and variance, the correlation of its input with the sign of its gain."""
    bn = read(slot.owner).at(slot.local[:, 0].to(slot.owner.running_mean.device))
    std = bn.gamma * (bn.var / (bn.var + bn.eps)).sqrt()
    return Gaussian(bn.beta, std[:, None] * value.correlation * std)


def _standardised(slot: Slot, value: Gaussian) -> Gaussian:
    """Behind a layer-norm, and others that know no statistics: mean 0 and variance 1 over all the channels."""
    centred = value.mean - value.mean.mean()
    power = (value.cov.diagonal() + centred.square()).mean().clamp(min=1e-300)
    mean, cov = centred / power.sqrt(), value.cov / power
    if slot.owner.weight is None:
        return Gaussian(mean, cov)
    gain = _vector(slot.owner.weight, slot)
    shift = torch.zeros_like(gain) if slot.owner.bias is None else _vector(slot.owner.bias, slot)
    return Gaussian(gain * mean + shift, gain[:, None] * cov * gain)


def _parameter(slot: Slot) -> Gaussian:
    """A free parameter or an embedding: each channel's values, all of them equally likely."""
    weight = slot.owner if isinstance(slot.owner, nn.Parameter) else slot.owner.weight
    values = gather(to_channels(weight.detach().double(), slot.axis), slot.local[:, :1])
    return Gaussian(values.mean(dim=1), torch.cov(values, correction=0).reshape(len(values), len(values)))


def _vector(weight: Tensor, slot: Slot) -> Tensor:
    values = to_channels(weight.detach().double(), slot.axis)
    return gather(values, slot.local[:, :1]).mean(dim=1)


@torch.no_grad()
def measured_covariances(
    model: nn.Module, run: Callable[[Any], Any], batches: Iterable, table: GroupTable, readers: Sequence[Slot]
) -> list[Tensor]:
    """[n, n] covariance of the group's channels as each reader reads them on the given inputs, one pass for all.

    run: calls the network on one batch. Where a reader has several copies of a channel (behind a flatten, say), each
    copy has its own mean and their covariances are averaged.

    Raises ValueError, naming the layer, if an activation is not finite or a layer is never reached.
    """
    totals = {reader.name: _Total(reader) for reader in readers}
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for reader in readers:
            hook = reader.owner.register_forward_pre_hook(lambda _, args, total=totals[reader.name]: total.add(args[0]))
            stack.callback(hook.remove)
        for batch in batches:
            run(batch)
    return [totals[reader.name].covariance() for reader in readers]


class _Total:
    """Running sums of what one layer reads."""

    def __init__(self, slot: Slot) -> None:
        self.slot, self.count = slot, 0
        self.sums: Tensor | None = None
        self.gram: Tensor | None = None

    def add(self, inputs: Tensor) -> None:
        values = by_channel(inputs, channel_axis(self.slot.owner)).double()
        if not torch.isfinite(values).all():
            raise ValueError(f"layer {self.slot.name!r} reads activations that are not finite")
        local = self.slot.local.to(values.device)
        copies = values[:, local.clamp(min=0)] * (local >= 0)  # [samples, n, m]
        sums = copies.sum(dim=0)
        gram = torch.einsum("snm,skm->nk", copies, copies)
        self.count += len(values)
        self.sums = sums if self.sums is None else self.sums + sums
        self.gram = gram if self.gram is None else self.gram + gram

    def covariance(self) -> Tensor:
        if self.sums is None or self.gram is None:
            raise ValueError(f"the inputs do not reach layer {self.slot.name!r}")
        cov = (self.gram - self.sums @ self.sums.T / self.count) / self.count
        still = cov.diagonal() <= 1e-12 * self.gram.diagonal() / self.count  # constant up to rounding
        cov[still] = 0
        cov[:, still] = 0
        return cov
