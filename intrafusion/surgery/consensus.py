"""Refit an average of aligned networks, layer by layer, so that every layer gives what its parents give on average.

The parents' pre-activations are averaged, not only their weights: layer l of the fused network is the ridge regression
from what it really reads there to

    y_l = Σ_i w_i f_l,i(x)        f_l,i: layer l of parent i, with its batch-norm, in the common order of the channels

so that what the average of two filters loses is regained before the next layer reads it. RegMean (Jin et al. 2023) is
the case in which every layer reads its parents' inputs; here it reads the fused network's, errors included.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from intrafusion.surgery.observe import Sight, call_order, evaluating, look
from intrafusion.surgery.refit import RowMap, can_refit, match_statistics_, outputs, refit_

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
_CLOSE = 1e-4
"""A layer that is nearer to its target than this part of it stays as it is: copies of one network are not touched."""


def refit_to_mean_(
    fused: nn.Module,
    parents: Sequence[nn.Module],
    weights: Sequence[float],
    norms: Mapping[str, str],
    run: Callable[[nn.Module, Any], Any],
    batches: Sequence,
    progress: bool = True,
) -> None:
    """Refit `fused`, the average of `parents`, in the order of its forward pass.

    parents: in eval mode, with the tensors and the order of channels of `fused`. weights: theirs; sum to 1. norms: the
    batch-norm that belongs to a layer, by name. run: calls a network on one batch of inputs. batches: the inputs.

    Raises ValueError if an activation is not finite.
    """
    average = copy.deepcopy(fused)
    with evaluating(fused, *parents):
        order = call_order(lambda: run(fused, batches[0]), fused, _LAYERS)
        hidden = None if progress else True
        for name in tqdm(order, desc="refit", unit="layer", delay=2, leave=False, disable=hidden):
            layer, norm = fused.get_submodule(name), norms.get(name)
            bn = fused.get_submodule(norm) if norm else None
            sights = partial(_sights, fused, parents, weights, name, norm, run)
            rows = RowMap.identity(outputs(layer))
            if _is_close(*next(sights(batches[:1]))):
                continue
            if can_refit(layer):
                start_bn = average.get_submodule(norm) if norm else None
                refit_(layer, bn, average.get_submodule(name), start_bn, sights(batches), rows)
            elif bn is not None:
                match_statistics_(layer, bn, sights(batches), rows)


def _sights(
    fused: nn.Module, parents: Sequence[nn.Module], weights: Sequence[float], name: str, norm: str | None,
    run: Callable[[nn.Module, Any], Any], batches: Sequence,
) -> Iterator[tuple[Sight, Sight]]:  # fmt: skip
    """(the parents' mean, fused) views of a layer, batch by batch."""
    for batch in batches:
        seen = [
            look(partial(run, model, batch), model.get_submodule(name), model.get_submodule(norm) if norm else None)
            for model in (*parents, fused)
        ]
        *before, now = seen
        others = [sight.other for sight in before if sight.other is not None]
        mean = Sight(
            inputs=_mean([sight.inputs for sight in before], weights),
            before=before[0].before,
            chain=(),
            output=_mean([sight.output for sight in before], weights),
            other=_mean(others, weights) if len(others) == len(before) else None,
        )
        yield mean, now


def _mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(values[0])
    for value, weight in zip(values, weights, strict=True):
        total += weight * value
    return total


def _is_close(mean: Sight, now: Sight) -> bool:
    error = mean.output - now.output
    if mean.other is not None and now.other is not None and mean.other.shape == now.other.shape:
        error = error + mean.other - now.other
    return bool(error.norm() <= _CLOSE * mean.output.norm())
