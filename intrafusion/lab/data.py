"""Data sets in memory: scikit-learn's digits (the default, no download) and folders of images.

A data set has three splits. ``validation`` is held out of the training images and is the only one anything may be
chosen on; ``test`` is for the final number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from intrafusion.lab.errors import LabError
from intrafusion.lab.images import class_names, locate, read_split

SPLITS = ("train", "validation", "test")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_DIGITS = ((0.3,), (0.37,))
_TEST_SHUFFLE = 0


@dataclass(frozen=True)
class Split:
    """Images and labels of one split: uint8 ``[N, C, H, W]`` and int64 ``[N]``; ``skipped`` names unreadable files."""

    images: Tensor
    labels: Tensor
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Split:
        """The examples at ``indices`` (int64 ``[M]``), in that order."""
        return Split(self.images[indices], self.labels[indices], self.skipped)


@dataclass(frozen=True)
class Dataset:
    """A named data set whose splits are read when they are first asked for.

    Attributes:
        name: as in the recipe.
        classes: one name per label.
        shape: of one image, ``(C, H, W)``.
        mean, std: per channel, of pixels scaled to [0, 1].
    """

    name: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    _load: Callable[[str], Split] = field(repr=False, compare=False)
    _read: dict[str, Split] = field(default_factory=dict, repr=False, compare=False)

    def split(self, name: str) -> Split:
        """One of ``train``, ``validation``, ``test``.

        Raises:
            LabError: an image cannot be read, or the validation split would be empty.
        """
        if name not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {name!r}")
        if name not in self._read:
            self._read[name] = self._load(name)
        return self._read[name]

    def digest(self, name: str) -> str:
        """Sixteen hexadecimal digits of a split's pixels, labels and normalisation."""
        split = self.split(name)
        total = hashlib.sha256(f"{self.mean}{self.std}{tuple(split.images.shape)}".encode())
        total.update(np.ascontiguousarray(split.images.numpy()).data)
        total.update(split.labels.numpy().tobytes())
        return total.hexdigest()[:16]

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 ``[N, C, H, W]`` to float32 of the same shape: ``(pixel / 255 - mean) / std``."""
        mean = torch.tensor(self.mean, device=images.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(1, -1, 1, 1)
        return images.float().div_(255).sub_(mean).div_(std)

    def batches(
        self, name: str, batch_size: int, *, generator: torch.Generator | None = None,
        device: torch.device | str = "cpu", augment: Callable[[Tensor], Tensor] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
        """Normalised images ``[B, C, H, W]`` and labels ``[B]``; shuffled if a ``generator`` is given.

        augment: changes uint8 images ``[B, C, H, W]`` on the device, before they are normalised.
        """
        split = self.split(name)
        order = None if generator is None else torch.randperm(len(split), generator=generator)
        for start in range(0, len(split), batch_size):
            stop = start + batch_size
            part = slice(start, stop) if order is None else order[start:stop]
            images = split.images[part].to(device)
            yield self.normalise(augment(images) if augment else images), split.labels[part].to(device)

    def draw(self, name: str, count: int, *, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """A random ``count`` of a split's images (all, if it has fewer), in batches of at most 250.

        Normalised images ``[B, C, H, W]`` and labels ``[B]``; a smaller count is the start of a larger one.
        """
        split = self.split(name)
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
        for part in order[:count].split(250):
            yield self.normalise(split.images[part]), split.labels[part]


def digits(*, validation: float = 0.1, seed: int = 0, test_images: int | None = None,
           mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None) -> Dataset:  # fmt: skip
    """scikit-learn's 1,797 grey 8x8 digits: 30 % test (539, fixed and stratified), the rest train and validation.

    Args:
        validation: share of the training images that is held out, in (0, 1).
        seed: which ones.
        test_images: evaluate on this many test images of a fixed shuffle; ``None`` for all.
        mean, std: of pixels scaled to [0, 1]; ``None`` for 0.3 and 0.37.
    """
    from sklearn.datasets import load_digits

    pixels, target = load_digits(return_X_y=True)
    images = torch.from_numpy(np.rint(pixels * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    everything = Split(images, torch.from_numpy(target.astype(np.int64)))
    rest, test = stratified(everything.labels, 0.3, seed=0)

    def load(name: str) -> Split:
        if name == "test":
            return _limit(everything.take(test), test_images)
        return _hold_out(everything.take(rest), name, validation, seed)

    classes = tuple(str(digit) for digit in range(10))
    return Dataset("digits", classes, (1, 8, 8), *_statistics(mean, std, _DIGITS, 1), _load=load)


def image_folder(
    root: Path, *, validation: float = 0.1, seed: int = 0, test_images: int | None = None,
    mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None,
    on_corrupt: str = "error", progress: bool = True, size: int | None = None, train_images: int | None = None,
) -> Dataset:  # fmt: skip
    """``root/train/<class>/*.jpg`` and ``root/test/<class>/*.jpg``, or an archive of such folders.

    A folder without ``test/`` may have ``val/`` instead.

    Args:
        root: the folder, a folder that holds one tar archive of it, or the archive.
        size: side of the square images that come out, in pixels: the shorter side is brought to 8/7 of it (256 for
            224) and the centre is cut out; images of exactly this size stay as they are. ``None``: as in the files,
            which must then agree.
        train_images: read only this many files of a fixed shuffle of ``train/``; ``None`` for all.
        on_corrupt: ``"error"`` or ``"skip"`` for images that cannot be read.
        mean, std: of pixels scaled to [0, 1]; ``None`` for ImageNet's. The rest as in :func:`digits`.

    Raises:
        LabError: the folders are not as described, an image cannot be read, images differ in size.
    """
    folder = locate(root, progress=progress)
    classes = class_names(folder / "train")
    held = "test" if (folder / "test").is_dir() else "val"
    if other := set(classes) ^ set(class_names(folder / held)):
        raise LabError(f"{folder}: train/ and {held}/ hold different classes: {', '.join(sorted(other))} in only one")

    def load(name: str) -> Split:
        half, limit = (held, None) if name == "test" else ("train", train_images)
        array = read_split(folder / half, on_corrupt=on_corrupt, progress=progress, size=size, limit=limit)
        split = Split(torch.from_numpy(array.images), torch.from_numpy(array.labels), array.skipped)
        return _limit(split, test_images) if half == held else _hold_out(split, name, validation, seed)

    test = load("test")
    channels, height, width = test.images.shape[1:]
    statistics = _statistics(mean, std, IMAGENET, channels)
    shape = (channels, height, width)
    return Dataset("image_folder", classes, shape, *statistics, _load=load, _read={"test": test})


def stratified(labels: Tensor, share: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """Split indices of ``labels`` (int64 ``[N]``) into two sorted parts, the second with ``share`` of every class.

    The number taken of a class is rounded; it depends on nothing but the labels, the share and the seed.
    """
    generator = np.random.default_rng(seed)
    taken = np.zeros(len(labels), dtype=bool)
    values = labels.numpy()
    for value in np.unique(values):
        members = np.flatnonzero(values == value)
        taken[generator.permutation(members)[: round(share * len(members))]] = True
    return torch.from_numpy(np.flatnonzero(~taken)), torch.from_numpy(np.flatnonzero(taken))


def _hold_out(split: Split, name: str, share: float, seed: int) -> Split:
    rest, held = stratified(split.labels, share, seed=seed)
    chosen = held if name == "validation" else rest
    if len(chosen) == 0:
        raise LabError(
            f"a validation share of {share} leaves no {name} images of the {len(split)} training images; "
            "change data.validation"
        )
    return split.take(chosen)


def _limit(split: Split, count: int | None) -> Split:
    if count is None or count >= len(split):
        return split
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(_TEST_SHUFFLE))
    return split.take(order[:count])


def _statistics(
    mean: tuple[float, ...] | None, std: tuple[float, ...] | None,
    default: tuple[tuple[float, ...], tuple[float, ...]], channels: int,
) -> tuple[tuple[float, ...], tuple[float, ...]]:  # fmt: skip
    chosen = (mean or default[0], std or default[1])
    for name, values in zip(("mean", "std"), chosen, strict=True):
        if len(values) not in (1, channels):
            raise LabError(f"data.{name} has {len(values)} values; the images have {channels} channels")
    return chosen[0], chosen[1]
