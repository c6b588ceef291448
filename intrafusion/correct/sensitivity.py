"""How much an error at one place of a layer's output moves what the network gives: the size of the gradient there.

A regression that counts every place alike is exact where it does not matter, and wrong where it does. A language model
reads few places far more than all others (the values of the first token, which attention rests on: their gradient has
480 times the mean square in layer 15 of SmolLM2-135M), and a place where a norm divides by much counts little.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from tqdm import tqdm

from intrafusion.correct.tape import Layers, Tape, Visit
from intrafusion.groups.kinds.base import kind_of
from intrafusion.groups.kinds.filters import Filters
from intrafusion.running import evaluating, map_tensors, recordable, size_of, tensors_in, trainable

_VALUES = 2**26
"""So many values of all layers' outputs, and of their gradients, are held at a time (256 MB each in float32)."""
_EFFECTIVE = 4
"""One of so many places counts at least: the effective number of N is (sum of weights)^2 / (sum of their squares)."""


def sensitivities(
    network: nn.Module,
    run: Callable[[nn.Module, Any], Any],
    batches: Sequence,
    layers: dict[str, str],
    shapes: Mapping[str, Sequence[int]],
    *,
    progress: bool = False,
) -> dict[str, list[Tensor]]:
    """How much every place of a layer's output counts, 1 on average: [inputs, *places] of each batch, by layer.

    With random numbers v of the shape of what the network gives, y, it is the norm over the channels of d(v . y) / dz
    at an output z: its square is, up to a factor, the mean square change of y for a random error there. (A regression
    is weighted by the norm itself: one v says its square too roughly.) Where few places have nearly all of it, so much
    is given to all alike that a quarter of them counts.

    layers: each with the name of its batch-norm, or ''. shapes: of the outputs, for the first batch, of those that are
    called once. Found are linear layers that read sequences, and that a gradient comes to; none where the network, or a
    part of a batch, does not run with gradients. (On images, ResNet-20 at 50 %, weights change nothing: no place stands
    out.) One pass forward and backward.
    """
    names = [name for name in shapes if _reads_sequences(network.get_submodule(name), shapes[name])]
    if not names:
        return {}
    weights: list[Any] = [network.get_submodule(name).weight for name in names]
    known, generator = Layers(network, layers), torch.Generator().manual_seed(0)
    each = max(1, _VALUES * size_of(batches[0]) // max(1, sum(map(math.prod, shapes.values()))))
    hidden = None if progress else True
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    with evaluating(network), trainable(weights):
        for batch in tqdm(batches, desc="gradients", delay=2, leave=False, disable=hidden):
            try:
                pieces = [
                    _gradients(known, partial(run, network, piece), names, generator) for piece in _pieces(batch, each)
                ]
            except Exception:  # whatever it is, it is no reason not to prune: all places count alike
                return {}
            for name in list(found):
                sizes = [piece.get(name) for piece in pieces]
                if _complete(sizes, batch, shapes[name], each):
                    found[name].append(torch.cat(sizes))  # type: ignore[arg-type]
                else:
                    del found[name]
    weighed = {name: _weights(sizes) for name, sizes in found.items()}
    return {name: weights for name, weights in weighed.items() if weights is not None}


def _reads_sequences(layer: nn.Module, shape: Sequence[int]) -> bool:
    kind = kind_of(layer)
    return isinstance(kind, Filters) and kind.channel_axis == -1 and len(shape) > 2


def _complete(sizes: Sequence[Tensor | None], batch: Any, shape: Sequence[int], each: int) -> bool:
    """Are there sizes of all pieces, and do they make those of the whole batch, one after the other?"""
    if any(size is None or not size.isfinite().all() for size in sizes):
        return False
    whole = size_of(batch) <= each
    return whole or all(len(size) <= each and size.shape[1:] == tuple(shape[1:-1]) for size in sizes)  # type: ignore


def _weights(sizes: Sequence[Tensor]) -> list[Tensor] | None:
    """1 on average, and not on few places alone; None where nothing counts."""
    every = torch.cat([size.flatten() for size in sizes]).double()
    mean = float(every.mean()) if len(every) else 0.0
    if not mean > 0:
        return None
    spread = float((every / mean).square().mean()) - 1
    own = min(1.0, math.sqrt((_EFFECTIVE - 1) / max(spread, 1e-12)))
    return [(own * size.double() / mean + (1 - own)).float() for size in sizes]


def _gradients(
    known: Layers, forward: Callable[[], Any], names: Sequence[str], generator: torch.Generator
) -> dict[str, Tensor]:
    """The norm of the gradient at every place of the layers' outputs in one pass."""
    edges: dict[str, GradientEdge] = {}

    def read(visit: Visit) -> None:
        if visit.name in names and visit.output.requires_grad:
            edges[visit.name] = get_gradient_edge(visit.output)

    tape = Tape(known, read=read)
    with torch.enable_grad():
        with tape:
            given = [y for y in tensors_in(forward()) if y.requires_grad]
        tape.finish()
    if not edges or not given:
        return {}
    drawn = [torch.randn(y.shape, generator=generator).to(y) for y in given]
    found = torch.autograd.grad(given, list(edges.values()), drawn, allow_unused=True)
    return {
        name: gradient.double().norm(dim=-1)
        for name, gradient in zip(edges, found, strict=True)
        if gradient is not None
    }


def _pieces(batch: Any, each: int) -> Iterator[Any]:
    """A batch in parts of so many inputs, where it can be parted, made of tensors that may be part of a graph."""
    size = size_of(batch)
    for start in range(0, max(1, size), each):
        piece = batch if size <= each else map_tensors(batch, lambda t, start=start: t[start : start + each])
        yield recordable(piece)
