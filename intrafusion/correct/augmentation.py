"""Other inputs like given ones, for layers that learn from what the dense network gives: it has an answer to all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from intrafusion.running import map_tensors, shares_first_axis, tensors_in

_PART = 8
"""Images are moved by up to such a part of their size."""


def augmented(batch: Any, generator: torch.Generator) -> Any:
    """Images [N, C, H, W], each mirrored by chance, moved, and every second laid over another; all else as it is.

    What lies outside of a moved image is mirrored in. Two images are mixed in random shares ("mixup", Zhang et al.
    2018; with a teacher that sees the same inputs: Beyer et al., "Knowledge distillation: a good teacher is patient and
    consistent", CVPR 2022); both are of this batch. Several tensors of images are changed alike.
    """
    images = list(tensors_in(batch))
    if not shares_first_axis(batch) or not all(map(_are_images, images)):
        return batch
    count, device = len(images[0]), images[0].device
    draw = torch.rand(count, 5, generator=generator)
    other = torch.randperm(count, generator=generator).to(device)
    down, right = (2 * draw[:, :2] - 1).unbind(dim=1)
    mirrored = (draw[:, 2] < 0.5)[:, None].to(device)
    mixes, share = (draw[:, 3] < 0.5).to(device), draw[:, 4].to(device)

    def change(value: Tensor) -> Tensor:
        rows, columns = (
            _moved(size, move).to(device) for size, move in zip(value.shape[2:], (down, right), strict=True)
        )
        columns = torch.where(mirrored, columns.flip(1), columns)
        value = value[torch.arange(count, device=device)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        value = value.movedim(-1, 1)
        shares = share.to(torch.promote_types(value.dtype, torch.float16))[:, None, None, None]
        mixed = shares * value + (1 - shares) * value[other]
        mixed = mixed if value.is_floating_point() else mixed.round()
        return torch.where(mixes[:, None, None, None], mixed.to(value.dtype), value)

    return map_tensors(batch, change)


def _are_images(value: Tensor) -> bool:
    return value.dim() == 4 and (value.is_floating_point() or value.dtype == torch.uint8)


def _moved(size: int, move: Tensor) -> Tensor:
    """[N, size] which place of an axis is seen at each place, mirrored at the ends; move: [N], of -1 to 1."""
    places = torch.arange(size) + (move * (size // _PART)).round().long()[:, None]
    return (size - 1) - ((size - 1) - places.abs()).abs()
