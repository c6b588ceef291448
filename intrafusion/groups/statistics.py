"""First and second moments of a group's channels as they are expected from the weights alone (measured: `readings`).

The network is followed from the layers that produce the channels to those that read them, and every step
maps a Gaussian to a Gaussian with the same moments. A layer's output has the correlation of its filters (its inputs are
taken as white, with mean 0 and variance 1), a batch-norm sets the mean and variance that it remembers, activations are
exact for Gaussian inputs (`intrafusion.ot.moments`), sums and products are of independent terms, and what follows a
concat or an operation that is not known is the average of what goes in. Poolings, reshapes and dropouts pass everything
on: for rebuilding channels from each other, a common scale does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor
from torch.nn import functional as F

from intrafusion.groups.gaussian import Gaussian, average
from intrafusion.groups.kinds.base import Slot, kind_of
from intrafusion.groups.table import GroupTable

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
        self._inside = {owner for owner, _ in table.reach}
        self._slots = {slot.owner: slot for slot in table.slots if not slot.reads}
        self._known: dict[Any, Gaussian | None] = {}

    def produced(self, graph: tp.DependencyGraph) -> Gaussian | None:
        """What the layers of the group give, each behind its batch-norm; the average if there are several."""
        layers = [slot.partner or slot.owner for slot in self._slots.values() if slot.makes_channels]
        found = [self._after(graph.module2node[layer]) for layer in layers]
        return average([one for one in found if one is not None])

    def into(self, node: Any) -> Gaussian | None:
        """What a node gets from within the group; the average if there are several."""
        return average(self._sources(node.inputs))

    def _sources(self, nodes: Sequence[Any]) -> list[Gaussian]:
        found = [self._after(source) for source in nodes if source.module in self._inside]
        return [one for one in found if one is not None]

    def _after(self, node: Any) -> Gaussian | None:
        if node not in self._known:
            self._known[node] = None  # a layer that is called again, with its own output: the first call counts
            self._known[node] = self._output(node)
        return self._known[node]

    def _output(self, node: Any) -> Gaussian | None:
        slot = self._slots.get(node.module)
        if slot is not None and slot.makes_channels:
            return slot.kind.moments(slot, None)
        composite = slot is not None and slot.kind.is_composite
        sources = self._sources(_entrance(node) if composite else node.inputs)
        value = average(sources)
        if slot is not None:
            return slot.kind.moments(slot, value)
        if value is None:
            return None
        kind = kind_of(node.module)
        f = activation_of(node) if kind is None else kind.pointwise(node.module)
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


def _entrance(node: Any) -> Sequence[Any]:
    """What goes into a norm that is several operations: the node where its paths meet again, going backwards.

    (x · rsqrt(mean(x²)) is a product of x and of something made of x, but the layer reads x.)
    """
    ahead, parted = {node: None}, False
    while len(ahead) > 1 or not parted:
        last = max(ahead, key=lambda one: one.grad_fn._sequence_nr())  # the one that was computed last
        at_a_layer = last is not node and kind_of(last.module) is not None
        if at_a_layer or not last.inputs:
            return [last] if len(ahead) == 1 else node.inputs
        if "norm" in last.grad_fn.name().lower() and not parted:  # one operation does it all
            return last.inputs
        del ahead[last]
        ahead.update(dict.fromkeys(last.inputs))
        parted = parted or len(ahead) > 1
    return list(ahead)
