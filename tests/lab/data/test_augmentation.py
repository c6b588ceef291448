"""Augmentation moves pixels and makes none up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from intrafusion.lab.data.augmentation import augmentation, crop, crop_flip, flip
from intrafusion.lab.data.sources import digits

NAMES = ("flip", "crop_flip", "randaugment")


def images(count: int = 40, side: int = 16, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (count, channels, side, side), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("name", NAMES)
def test_shape_and_type_stay_and_the_seed_decides(name: str) -> None:
    change = augmentation(name)
    assert change is not None
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(change(images()))
    assert found[0].shape == images().shape
    assert found[0].dtype == torch.uint8
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[0], images())


def test_none_is_none() -> None:
    assert augmentation("none") is None


def test_each_image_is_flipped_as_a_whole_or_not_at_all() -> None:
    given, found = images(), flip(images())
    same = (found == given).flatten(1).all(1)
    mirrored = (found == given.flip(3)).flatten(1).all(1)
    assert bool((same ^ mirrored).all())
    assert same.any()
    assert mirrored.any()


def test_each_image_is_shifted_by_at_most_an_eighth_and_its_mirror_image_comes_in() -> None:
    given, found = images(), crop(images())
    shifts = set()
    for before, after in zip(given, found, strict=True):
        padded = torch.from_numpy(np.pad(before.numpy(), ((0, 0), (2, 2), (2, 2)), mode="reflect"))
        windows = {(y, x): padded[:, y : y + 16, x : x + 16] for y in range(5) for x in range(5)}
        fits = [place for place, window in windows.items() if torch.equal(window, after)]
        assert len(fits) == 1
        shifts.add(fits[0])
    assert len(shifts) > 10


def test_images_too_small_to_shift_are_only_flipped() -> None:
    assert torch.equal(crop(images(side=7)), images(side=7))


def test_grey_images_and_batches_of_one() -> None:
    assert crop_flip(images(1, 8, channels=1)).shape == (1, 1, 8, 8)


def test_batches_are_changed_before_they_are_normalised() -> None:
    data = digits()
    (inverted, _), (plain, _) = (
        next(data.batches("train", 10, augment=change)) for change in (lambda pixels: 255 - pixels, None)
    )
    assert torch.allclose(inverted, (1 - 2 * 0.3) / 0.37 - plain, atol=1e-5)
