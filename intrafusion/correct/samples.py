"""What a reader of a group of channels sees, at positions spread over all batches: what rows are chosen on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from intrafusion.correct.observe import Sight
from intrafusion.groups.layout import by_channel, channel_axis, gather, to_channels
from intrafusion.groups.table import Slot
from intrafusion.ot.rows import Samples

_POSITIONS, _PRODUCTS = 16000, 2**32
"""On how many positions of an activation the rows of n channels are chosen: at most `_POSITIONS`, fewer where positions
times n^2 would be more than `_PRODUCTS`, but at least 2 n."""

Blocks = tuple[Tensor, Tensor, Sequence[Callable]]
"""z [P, n, ...], h [P, n] and the calls from one to the other."""


def collect(blocks: Iterable[Blocks | None], batches: int, reads: Tensor) -> Samples | None:
    """One reader's samples of a group of n channels; None if one of the blocks is.

    blocks: one for each of so many batches. reads: [n, d] the reader's weights for each channel.
    """
    zs, hs = [], []
    calls: Sequence[Callable] = ()
    n = len(reads)
    share = max(1, min(_POSITIONS, max(2 * n, _PRODUCTS // n**2)) // batches)
    generator = torch.Generator().manual_seed(0)
    for block in blocks:
        if block is None:
            return None
        z, h, calls = block
        chosen = torch.randperm(len(z), generator=generator)[:share].to(z.device)
        zs.append(z[chosen])
        hs.append(h[chosen])
    z, h = torch.cat(zs), torch.cat(hs)
    precise = torch.promote_types(z.dtype, torch.float32)
    z, h = z.to(precise), h.to(precise)
    reads = reads.to(z)
    held_out = torch.arange(len(z), device=z.device) % 4 == 3
    return Samples(z, h, _chain(calls), reads @ reads.T / n, held_out)


def reads_of(layer: nn.Module, slot: Slot) -> Tensor:
    """[n, d] float64: a reader's weights for each channel of a group."""
    weight: Tensor = layer.weight.detach()  # type: ignore[assignment]
    return gather(to_channels(weight, slot.axis).double(), slot.local.to(weight.device))


def blocks_of(pruned: Sight, dense: Sight, slot: Slot, n: int) -> Blocks | None:
    """What a reader of a group sees, position by position; None if that is not understood."""
    z, h, calls = pruned.before, dense.inputs, pruned.chain
    axis = channel_axis(slot.owner)
    copies = slot.local.shape[1]
    plain = torch.equal(slot.local, torch.arange(n * copies).reshape(n, copies)) and slot.size == n * copies
    if not plain or dense.inputs.shape != pruned.inputs.shape:
        return None
    sides = [call.block for call in calls]
    where = axis % z.dim() if z.dim() == h.dim() else 1
    if z.dim() < 2 or z.shape[where] != n:
        return None
    if z.shape == h.shape and copies == 1 and all(side == 1 for side in sides):
        return by_channel(z, where), by_channel(h, where), calls
    if where != 1:
        return None
    if z.dim() == 4 and h.dim() == 4 and all(side is not None for side in sides):
        side = 1
        for one in sides:
            side *= one or 1
        rows, columns = h.shape[2:]
        if z.shape[2] // side != rows or z.shape[3] // side != columns:
            return None
        z = z[:, :, : rows * side, : columns * side]
        z = z.unflatten(3, (columns, side)).unflatten(2, (rows, side)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        return z, h.movedim(1, -1).flatten(0, 2), calls
    if h.dim() == 2 and copies == 1:
        return z, h, calls
    return None


def _chain(calls: Sequence[Callable]) -> Callable[[Tensor], Tensor]:
    def f(value: Tensor) -> Tensor:
        for call in calls:
            value = call(value)
        return value.flatten(1)

    return f
