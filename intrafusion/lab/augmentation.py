"""Random changes of training images, a whole batch at once on its device, from torch's CPU generator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Augmentation = Callable[[Tensor], Tensor]
"""uint8 ``[B, C, H, W]`` to the same shape and type."""
_SHIFT = 8


def augmentation(name: str) -> Augmentation | None:
    """``"none"`` (``None``), ``"flip"``, ``"crop_flip"`` or ``"randaugment"``, as a recipe names them."""
    return {"none": None, "flip": flip, "crop_flip": crop_flip, "randaugment": randaugment}[name]


def flip(images: Tensor) -> Tensor:
    """Mirror each image from left to right with probability 1/2."""
    mirrored = (torch.rand(len(images)) < 0.5).to(images.device)
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def crop(images: Tensor) -> Tensor:
    """Shift each image by up to an eighth of its height and width (4 of 32 pixels); black comes in."""
    count, channels, height, width = images.shape
    most = height // _SHIFT, width // _SHIFT
    padded = F.pad(images, (most[1], most[1], most[0], most[0]))
    down, right = (torch.randint(2 * limit + 1, (count, 1)).to(images.device) for limit in most)
    rows = (down + torch.arange(height, device=images.device))[:, None, :, None]
    columns = (right + torch.arange(width, device=images.device))[:, None, None, :]
    which = torch.arange(count, device=images.device)[:, None, None, None]
    return padded[which, torch.arange(channels, device=images.device)[:, None, None], rows, columns]


def crop_flip(images: Tensor) -> Tensor:
    """Both: the usual augmentation of CIFAR (He et al., 2016, section 4.2)."""
    return flip(crop(images))


def randaugment(images: Tensor) -> Tensor:
    """:func:`crop_flip`, then torchvision's RandAugment of each image by itself: 0.2 ms (32x32) to 2.5 ms (224x224)."""
    from torchvision.transforms.v2 import RandAugment

    changed = RandAugment()
    return torch.stack([changed(image) for image in crop_flip(images)])
