"""Which channels of one network are those of another: costs from what they respond to on a few inputs.

Channels are compared by the correlation of their activations, as the layers of a group read them (Li et al. 2016,
"Convergent learning"; Jordan et al. 2023, REPAIR). A channel's response does not depend on the order of the others, so
every group is solved at once and once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.average.couplings import Couplings
from intrafusion.groups.kinds.base import Place, kind_of
from intrafusion.groups.layout import by_channel
from intrafusion.running import evaluating

_SAMPLES = 2048
"""At most so many places of a batch's feature maps are looked at, evenly spaced."""


@torch.no_grad()
def responses(
    model: nn.Module, run: Callable[[nn.Module, Any], Any], batches: Iterable, couplings: Couplings
) -> dict[str, Tensor]:
    """[n, d] standardised activations per group name: rows have mean 0 and length 1 for each layer that reads them.

    Groups that no hook can see (the channels inside the heads of nn.MultiheadAttention) are left out. Raises
    ValueError, naming the layer, for an activation that is not finite.
    """
    watched = {
        group.name: [(place.reader, place) for place in group.places if place.reader]
        for group in couplings.groups
        if not group.reason
    }
    seen: dict[str, list[Tensor]] = {name: [] for readers in watched.values() for name, _ in readers}
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for name, values in seen.items():
            layer: Any = model.get_submodule(name)
            kind = kind_of(layer)
            assert kind is not None  # a place says that it reads
            hook = layer.register_forward_pre_hook(_watch(name, values, kind.channel_axis))
            stack.callback(hook.remove)
        for batch in batches:
            run(model, batch)
    return {
        group: torch.cat([_standardised(torch.cat(seen[name]), place) for name, place in readers], dim=1)
        for group, readers in watched.items()
        if readers and all(seen[name] for name, _ in readers)
    }


def _watch(name: str, values: list[Tensor], axis: int) -> Callable:
    def hook(_: nn.Module, args: tuple) -> None:
        if not args:  # called by keywords: the group is left to its weights
            return
        found = by_channel(args[0].detach(), axis)
        found = found[:: -(-len(found) // _SAMPLES)].double().cpu()
        if not torch.isfinite(found).all():
            raise ValueError(f"layer {name!r} reads activations that are not finite")
        values.append(found)

    return hook


def _standardised(values: Tensor, place: Place) -> Tensor:
    """[n, m·samples] each channel's activations with mean 0 and length 1 (a channel that is constant stays zero)."""
    there = place.local >= 0
    rows = (values.T[place.local.clamp(min=0)] * there[:, :, None]).flatten(1)
    rows = rows - rows.mean(dim=1, keepdim=True)
    length = rows.norm(dim=1, keepdim=True)
    still = length <= 1e-9 * values.abs().max()
    return torch.where(still, 0.0, rows / torch.where(still, 1.0, length))
