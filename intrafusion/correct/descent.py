"""After the last refit: all layers together, down the gradient towards what the dense network gives.

A refit puts one layer right for what was cut before it. What is left after the last one no layer can make good alone;
here all of them move together on the same unlabelled inputs, by Adam, so that the outputs are near the dense
network's, and what is read of every channel width that was not cut:

    min over all weights   |y - y_dense|^2 / |y_dense|^2  +  mean over those readers  |x - x_dense|^2 / |x_dense|^2

Batch-norms keep their statistics and nothing is dropped. An eighth of the inputs judges; the weights that did best
there stay, the refitted ones if none did better. (Reconstruction by blocks: Li et al., BRECQ, ICLR 2021.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from intrafusion.correct.survey import Run
from intrafusion.running import evaluating, map_tensors, tensors_in

_EACH, _SHARE, _CHECKS = 32, 8, 10
"""Inputs a step; one of so many judges; so often they are asked."""
_RATE = 3e-3
"""Adam's, at the start; it falls to 0 by half a cosine. In units of each tensor's root mean square."""


def descend_(
    network: nn.Module,
    dense: nn.Module,
    run: Run,
    batches: Sequence,
    steps: int,
    *,
    order: Sequence[str],
    progress: bool,
) -> None:
    """Move those weights of the pruned network that may be trained.

    run: calls a network on one of the batches. order: layers by name, in the order of the forward pass.
    """
    fitted, judges = _parted(batches)
    names = _boundaries(network, dense, order)
    weights = [p for p in network.parameters() if p.requires_grad and p.is_floating_point()]
    gradients = [weight.grad for weight in weights]
    for weight in weights:  # who remembers the network holds the old tensors
        weight.data, weight.grad = weight.data.clone(), None

    def seen(model: nn.Module, batch: Any) -> list[Tensor]:
        with _inputs_of(model, names) as found:
            outputs = list(tensors_in(run(model, batch)))
        outputs = [value for value in outputs if value.is_floating_point()]
        return [torch.cat([value.flatten() for value in outputs]), *(found[name] for name in names if name in found)]

    def loss(batch: Any) -> Tensor:
        with torch.no_grad():
            wanted = seen(dense, batch)
        errors = [_relative(a, b) for a, b in zip(seen(network, batch), wanted, strict=True)]
        return errors[0] + (sum(errors[1:], errors[0] * 0) / max(1, len(errors) - 1))

    @torch.no_grad()
    def judged() -> float:
        return sum(float(loss(batch)) for batch in judges) / len(judges)

    with evaluating(network), evaluating(dense), torch.enable_grad():
        best, kept = judged(), [weight.data.clone() for weight in weights]
        groups = [
            {"params": [w], "lr": _RATE * float(w.detach().square().mean().sqrt().clamp(min=1e-4))} for w in weights
        ]
        optimizer = torch.optim.Adam(groups)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        every = max(1, steps // _CHECKS)
        hidden = None if progress else True
        for step in tqdm(range(steps), desc="descent", unit="step", delay=2, leave=False, disable=hidden):
            optimizer.zero_grad()
            loss(fitted[step % len(fitted)]).backward()
            optimizer.step()
            schedule.step()
            if (step + 1) % every == 0 or step + 1 == steps:
                now = judged()
                if now < best:
                    best, kept = now, [weight.data.clone() for weight in weights]
    for weight, value, gradient in zip(weights, kept, gradients, strict=True):
        weight.data, weight.grad = value, gradient


def _relative(given: Tensor, wanted: Tensor) -> Tensor:
    return (given - wanted).square().sum() / wanted.square().sum().clamp(min=1e-12)


def _boundaries(network: nn.Module, dense: nn.Module, order: Sequence[str]) -> list[str]:
    """Layers behind the first cut that read as many channels as before, by name."""
    changed, found = False, []
    for name in order:
        now, before = network.get_submodule(name), dense.get_submodule(name)
        same = now.weight.shape[1:] == before.weight.shape[1:]  # type: ignore[union-attr]
        if changed and same and not isinstance(now, nn.Embedding):
            found.append(name)
        changed |= now.weight.shape != before.weight.shape  # type: ignore[union-attr]
    return found


@contextmanager
def _inputs_of(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What the layers are given while the context is open, the last call of each."""
    found: dict[str, Tensor] = {}

    def note(name: str, _layer: Any, args: Any, kwargs: Any) -> None:
        found[name] = args[0] if args else next(iter(kwargs.values()))

    with ExitStack() as stack:
        for name in names:
            layer = model.get_submodule(name)
            hook = layer.register_forward_pre_hook(lambda *given, name=name: note(name, *given), with_kwargs=True)
            stack.callback(hook.remove)
        yield found


def _parted(batches: Sequence) -> tuple[list[Any], list[Any]]:
    """(batches of at most `_EACH` inputs to learn from, those that judge). Of a single input both are that one."""
    parts: list[Any] = []
    for batch in batches:
        sizes = {len(value) for value in tensors_in(batch) if value.dim()}
        count = sizes.pop() if len(sizes) == 1 else 1
        starts = range(0, count, _EACH)
        parts += (
            [map_tensors(batch, lambda v, a=a: v[a : a + _EACH] if v.dim() else v) for a in starts]
            if count > 1
            else [batch]
        )
    judges = parts[_SHARE - 1 :: _SHARE] or parts[-1:]
    fitted = [part for i, part in enumerate(parts) if i % _SHARE != _SHARE - 1]
    return (fitted if len(fitted) < len(parts) else fitted[:-1] or parts), judges
