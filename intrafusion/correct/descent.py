"""After the last refit: all layers together, down the gradient towards what the dense network gives.

A refit puts one layer right for what was cut before it. What is left after the last one no layer can make good alone;
here all of them move together on the same inputs, yours or synthetic ones, by Adam, so that the outputs are near the
dense network's, and what is read of every channel width that was not cut:

    min over all weights   |y - y_dense|^2 / |y_dense|^2  +  mean over those readers  |x - x_dense|^2 / |x_dense|^2

Batch-norms keep their statistics and nothing is dropped. What is wanted of an image the dense network says of any
other as well: so each step sees images that are mirrored, moved and mixed (`augmentation`), hardly any of them twice.
An eighth of the user's own inputs, or of the synthetic ones where there are no others, judges as it is; the weights
that did best there stay, the refitted ones if none did better. Where the steps lead far above the least error so far,
the next ones start from the best weights again and are smaller. (By blocks: Li et al., BRECQ, ICLR 2021.)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from intrafusion.correct.augmentation import augmented
from intrafusion.correct.survey import Run
from intrafusion.running import evaluating, map_tensors, recordable, size_of, tensors_in

_EACH, _SHARE, _CHECKS = 32, 8, 10
"""Inputs a step; one of so many judges; so often they are asked."""
_RATE = 6e-3
"""Adam's, at the start; it falls to 0 by half a cosine. In units of each tensor's root mean square."""
_FAR = 1.5
"""Steps that lead to so many times the least error that the judges have seen are too large,"""
_SLOWER = 0.2
"""and become so many times as large."""


def descend_(
    network: nn.Module,
    dense: nn.Module,
    run: Run,
    own: Sequence,
    drawn: Sequence,
    steps: int,
    *,
    order: Sequence[str],
    seed: int,
    progress: bool,
) -> None:
    """Move those weights of the pruned network that may be trained; a warning says so where there is nothing to move.

    run: calls a network on a batch. own, drawn: batches that the user gave, and synthetic ones; the former judge too,
    or the latter where there are none. seed: of the augmentation.
    order: layers by name, in the order of the forward pass.
    """
    fitted, judges = _parted(own, drawn)
    names = _behind_the_first_cut(network, dense, order)
    weights = [p for p in network.parameters() if p.requires_grad and p.is_floating_point()]
    coarse = {str(p.dtype) for p in weights if torch.finfo(p.dtype).bits < 32}
    if coarse or not weights:
        what = f"the weights are {', '.join(sorted(coarse))}" if coarse else "no weights may be trained"
        warnings.warn(f"{what}: descent has left them as the refit did", stacklevel=2)
        return
    gradients = [weight.grad for weight in weights]
    for weight in weights:  # who remembers the network holds the old tensors
        weight.data, weight.grad = weight.data.clone(), None

    def seen(model: nn.Module, batch: Any) -> tuple[list[Tensor], list[Tensor]]:
        with _inputs_of(model, names) as found:
            outputs = list(tensors_in(run(model, batch)))
        return outputs, [found[name] for name in names if name in found]

    def loss(batch: Any) -> Tensor:
        with torch.no_grad():
            wanted = seen(dense, batch)
        outputs, inputs = (list(_errors(*sides)) for sides in zip(seen(network, batch), wanted, strict=True))
        zero = torch.zeros((), device=weights[0].device)
        return sum(outputs, zero) / max(1, len(outputs)) + sum(inputs, zero) / max(1, len(inputs))

    @torch.no_grad()
    def judged() -> float:
        return sum(float(loss(batch)) for batch in judges) / len(judges)

    with evaluating(network), evaluating(dense), torch.enable_grad():
        found = _Descent(weights, judged())
        every = max(1, steps // _CHECKS)
        hidden, generator = None if progress else True, torch.Generator().manual_seed(seed)
        for step in tqdm(range(steps), desc="descent", unit="step", delay=2, leave=False, disable=hidden):
            now = loss(augmented(fitted[step % len(fitted)], generator))
            if not now.requires_grad:
                warnings.warn("no output has a gradient: descent has left the weights as the refit did", stacklevel=2)
                break
            found.take_step_(now, 0.5 * (1 + math.cos(math.pi * step / steps)))
            if (step + 1) % every == 0 or step + 1 == steps:
                found.see_(judged())
        else:
            if not found.is_better:
                warnings.warn("descent has found nothing better than the refit, on the inputs that judge", stacklevel=2)
    for weight, value, gradient in zip(weights, found.best, gradients, strict=True):
        weight.data, weight.grad = value, gradient


class _Descent:
    """Adam, and the weights that the judges have found best so far.

    Where it leads far above their error it goes back to them, and on in smaller steps.
    """

    def __init__(self, weights: Sequence[nn.Parameter], error: float) -> None:
        self._weights, self._before, self._least = weights, error, error
        self._sizes = [float(weight.detach().square().mean().sqrt().clamp(min=1e-4)) for weight in weights]
        self._optimizer = torch.optim.Adam([{"params": [weight]} for weight in weights])
        self._rate = _RATE
        self.best = [weight.data.clone() for weight in weights]

    @property
    def is_better(self) -> bool:
        return self._least < self._before

    def take_step_(self, loss: Tensor, share: float) -> None:
        """share: of the rate."""
        for group, size in zip(self._optimizer.param_groups, self._sizes, strict=True):
            group["lr"] = self._rate * share * size
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()

    def see_(self, error: float) -> None:
        """What the judges say of the weights as they are."""
        if error < self._least:
            self._least, self.best = error, [weight.data.clone() for weight in self._weights]
        elif not error <= _FAR * self._least:
            self._rate *= _SLOWER
            self._optimizer.state.clear()
            for weight, value in zip(self._weights, self.best, strict=True):
                weight.data.copy_(value)


def _errors(given: Sequence[Tensor], wanted: Sequence[Tensor]) -> Iterator[Tensor]:
    """The squared relative error of every tensor that has kept its shape, where the wanted one is finite."""
    for now, before in zip(given, wanted, strict=True):
        if now.shape == before.shape and now.is_floating_point() and now.numel():
            known = before.isfinite()
            difference, power = (torch.where(known, v, 0.0).square().sum() for v in (now - before, before))
            yield difference / power.clamp(min=1e-12)


def _behind_the_first_cut(network: nn.Module, dense: nn.Module, order: Sequence[str]) -> list[str]:
    """Layers that may read something else than before, by name."""
    shapes = [(network.get_submodule(name).weight.shape, dense.get_submodule(name).weight.shape) for name in order]
    first = next((number for number, (now, before) in enumerate(shapes) if now != before), len(order))
    return [name for name in order[first + 1 :] if not isinstance(network.get_submodule(name), nn.Embedding)]


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


def _parted(own: Sequence, drawn: Sequence) -> tuple[list[Any], list[Any]]:
    """(batches of at most `_EACH` inputs to learn from, those that judge), without graphs behind them.

    An eighth of every batch judges, or of small ones every eighth; what there is judges itself where that is less.
    Synthetic batches beside one's own stay whole: in parts they would have as many more of the steps.
    """
    own, drawn = ([map_tensors(recordable(batch), Tensor.detach) for batch in batches] for batches in (own, drawn))
    own, drawn = (own, drawn) if own else (drawn, [])
    fitted: list[Any] = []
    judges: list[Any] = []
    for number, batch in enumerate(own):
        count = size_of(batch)
        held = count // _SHARE
        if held:
            judges += _pieces(batch, count - held, count)
            fitted += _pieces(batch, 0, count - held)
        else:
            (judges if number % _SHARE == _SHARE - 1 else fitted).append(batch)
    return [*fitted, *drawn], judges or fitted


def _pieces(batch: Any, start: int, end: int) -> list[Any]:
    """Inputs from `start` to `end` of a batch, at most `_EACH` at a time."""
    ranges = [(a, min(a + _EACH, end)) for a in range(start, end, _EACH)]
    return [map_tensors(batch, lambda value, a=a, b=b: value[a:b]) for a, b in ranges]
