"""How much an error at one place of a layer's output moves what the network gives: the size of the gradient there.

A regression that counts every place alike is exact where it does not matter, and wrong where it does. A language model
reads few places far more than all others (the keys of the first token, which attention rests on, 400 times as much in
SmolLM2-135M), and a place where a norm divides by much counts little.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from tqdm import tqdm

from intrafusion.correct.tape import Layers, Tape, Visit
from intrafusion.groups.kinds.base import kind_of
from intrafusion.groups.kinds.filters import Filters
from intrafusion.running import evaluating, map_tensors, size_of, tensors_in

_VALUES = 2**26
"""So many values of all layers' outputs, and of their gradients, are held at a time (256 MB each in float32)."""


def sensitivities(
    network: nn.Module,
    run: Callable[[nn.Module, Any], Any],
    batches: Sequence,
    layers: dict[str, str],
    *,
    progress: bool = False,
) -> dict[str, list[Tensor]]:
    """How much every place of a layer's output counts, 1 on average: [inputs, *places] of each batch, by layer.

    With random numbers v of the shape of what the network gives, y, it is the norm over the channels of d(v . y) / dz
    at an output z, batch-norm included: its square is, up to a factor, the mean square change of y for a random error
    there. (The norm itself is what a regression is weighted by: one v says its square too roughly.)

    layers: each with the name of its batch-norm, or ''. Found are linear layers that read sequences, that are called
    once, and that a gradient comes to. (On images, ResNet-20 at 50 %, weights change nothing: no place stands out.)
    One pass forward and backward.
    """
    known, generator = Layers(network, layers), torch.Generator().manual_seed(0)
    hidden = None if progress else True
    found: dict[str, list[Tensor]] = {}
    with evaluating(network), _differentiable(network):
        one = _Seen(known, partial(run, network, next(_pieces(batches[0], 1))))
        if not one.any:
            return {}
        each = max(1, _VALUES // max(1, one.values))
        for batch in tqdm(batches, desc="gradients", delay=2, leave=False, disable=hidden):
            pieces = [_Seen(known, partial(run, network, piece)).sizes(generator) for piece in _pieces(batch, each)]
            for name in pieces[0]:
                if all(name in sizes for sizes in pieces):
                    found.setdefault(name, []).append(torch.cat([sizes[name] for sizes in pieces]))
    means = {name: float(torch.cat([size.flatten() for size in sizes]).mean()) for name, sizes in found.items()}
    return {
        name: [size / means[name] for size in sizes]
        for name, sizes in found.items()
        if len(sizes) == len(batches) and means[name] > 0
    }


class _Seen:
    """One pass: what it gives, and where every layer's output stands in the graph of its gradients."""

    def __init__(self, known: Layers, forward: Callable[[], Any]) -> None:
        self._edges: dict[str, GradientEdge] = {}
        self._calls: Counter[str] = Counter()
        self.values = 0
        self._known = known
        tape = Tape(known, read=self._read)
        with torch.enable_grad():
            with tape:
                given = list(tensors_in(forward()))
            tape.finish()
        self._given = [y for y in given if y.requires_grad]

    def _read(self, visit: Visit) -> None:
        kind, output = kind_of(self._known.of(visit.name)[0]), visit.output
        self._calls[visit.name] += 1
        self.values += output.numel()
        if isinstance(kind, Filters) and kind.channel_axis == -1 and output.dim() > 2 and output.requires_grad:
            self._edges[visit.name] = get_gradient_edge(output)

    @property
    def any(self) -> bool:
        return bool(self._edges and self._given)

    def sizes(self, generator: torch.Generator) -> dict[str, Tensor]:
        names = [name for name in self._edges if self._calls[name] == 1]
        if not names or not self._given:
            return {}
        drawn = [torch.randn(y.shape, generator=generator).to(y) for y in self._given]
        try:
            found = torch.autograd.grad(self._given, [self._edges[name] for name in names], drawn, allow_unused=True)
        except RuntimeError:  # something on the way has no gradient
            return {}
        return {
            name: gradient.norm(dim=-1).float()
            for name, gradient in zip(names, found, strict=True)
            if gradient is not None and gradient.isfinite().all()
        }


def _pieces(batch: Any, each: int) -> Iterator[Any]:
    """A batch in parts of so many inputs, where it can be parted."""
    size = size_of(batch)
    for start in range(0, size, each):
        yield batch if size <= each else map_tensors(batch, lambda t, start=start: t[start : start + each])


@contextmanager
def _differentiable(network: nn.Module) -> Iterator[None]:
    """Gradients can come to every layer's output, for as long as it lasts."""
    frozen = [p for p in network.parameters() if not p.requires_grad and p.is_floating_point()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
