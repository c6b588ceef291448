"""The average of aligned networks, and batch-norms that fit it.

Where the filters of a channel differ between the networks, their average responds less than each of them does: with
u_i the filter's direction and s_i the standard deviation of its response in network i, that of the average is

    s² = ‖ Σ_i w_i s_i u_i ‖²        (for white inputs)

which is less than (Σ w_i s_i)². A batch-norm with averaged statistics divides by too much, layer after layer ("variance
collapse", Jordan et al. 2023, REPAIR); with s² it gives the channel its mean β and standard deviation |γ| back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning import ops

from intrafusion.average.couplings import Couplings
from intrafusion.groups.layout import gather, to_channels
from intrafusion.groups.places import State
from intrafusion.running import evaluating

_SMALLEST = 1e-3
"""The variance of an averaged channel is at least this part of its parents' average: opposite filters cancel."""


def average_states(states: Sequence[State], weights: Sequence[float], couplings: Couplings, *, repair: bool) -> State:
    """Σ w_i state_i in float64, in the dtypes of the first; counters and other integers are the first's.

    weights: sum to 1. repair: batch-norm variances from the filters as above; otherwise averaged like the rest.
    """
    average = {key: _weighted([state[key] for state in states], weights) for key in states[0]}
    if repair:
        for fold in couplings.folds:
            key = f"{fold.norm}.running_var"
            filters = [to_channels(state[f"{fold.layer}.weight"].double(), fold.axis) for state in states]
            average[key] = _variance([state[key] for state in states], filters, weights).to(average[key].dtype)
        for norm, _ in couplings.alone:
            _repair_alone_(average, f"{norm}.running_var", states, weights, couplings)
    return average


def _weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    first = tensors[0]
    if not first.is_floating_point():
        return first.clone()
    total = torch.zeros_like(first, dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        total += weight * tensor.to(total)
    return total.to(first.dtype)


def _variance(variances: Sequence[Tensor], filters: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """[n] variance of the averaged filters' responses. variances: [n] and filters: [n, d] of each network, aligned."""
    device = filters[0].device
    plain = torch.stack([w * v.double().to(device) for w, v in zip(weights, variances, strict=True)]).sum(dim=0)
    response = torch.zeros_like(filters[0])
    for variance, rows, weight in zip(variances, filters, weights, strict=True):
        rows = rows.to(device)
        direction = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-300)
        response += weight * variance.double().to(device).sqrt()[:, None] * direction
    silent = torch.stack([rows.to(device).abs().amax(dim=1) == 0 for rows in filters]).any(dim=0)
    return torch.where(silent, plain, torch.maximum(response.square().sum(dim=1), _SMALLEST * plain))


def _repair_alone_(
    average: State, key: str, states: Sequence[State], weights: Sequence[float], couplings: Couplings
) -> None:
    """A batch-norm behind a concat or a sum: the directions are those of all filters that add to a channel."""
    for group in couplings.groups:
        makers = [p for p in group.places if p.is_filter]
        for place in group.places:
            if place.key != key or not makers:
                continue
            filters = [
                torch.cat(
                    [
                        gather(to_channels(state[p.key].double(), p.axis, p.chunks), p.local.to(state[p.key].device))
                        for p in makers
                    ],
                    dim=1,
                )
                for state in states
            ]
            for local in place.local.unbind(dim=1):
                there = local >= 0
                at = local[there]
                new = _variance([s[key][at] for s in states], [rows[there] for rows in filters], weights)
                average[key][at] = new.to(average[key])


@torch.no_grad()
def reestimate_(model: nn.Module, run: Callable[[nn.Module, Any], Any], batches: Iterable) -> None:
    """Set the mean and variance of every batch-norm to those of what it reads on the given inputs, in one pass.

    Each batch counts alike, and is normalised by its own statistics on the way (as in training), so use batches of
    some dozens of inputs. Everything but the batch-norms is in eval mode. If a batch cannot be run, the statistics are
    as before, and ValueError says so.
    """
    norms: list[Any] = [m for m in model.modules() if isinstance(m, ops.TORCH_BATCHNORM) and m.running_mean is not None]
    if not norms:
        return
    with evaluating(model), contextlib.ExitStack() as stack:
        for norm in norms:
            stack.callback(setattr, norm, "momentum", norm.momentum)
            norm.momentum = None
            norm.train()
        before = [[tensor.clone() for tensor in norm.buffers()] for norm in norms]
        try:
            for norm in norms:
                norm.reset_running_stats()
            for batch in batches:
                run(model, batch)
            if not all(torch.isfinite(tensor).all() for norm in norms for tensor in norm.buffers()):
                raise ValueError("a batch-norm reads activations that are not finite")
        except Exception as error:
            for norm, tensors in zip(norms, before, strict=True):
                for tensor, old in zip(norm.buffers(), tensors, strict=True):
                    tensor.copy_(old)
            raise ValueError(f"the batch-norm statistics cannot be re-estimated: {error}") from error
        for norm, tensors in zip(norms, before, strict=True):
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(tensors[-1])
