"""What a data set is, wherever its images come from.

It has three splits. ``validation`` is held out of the training images and is the only one anything may be chosen on;
``test`` is for the final number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from intrafusion import schedule
from intrafusion.lab.errors import LabError

SPLITS = ("train", "validation", "test")
_HASHED = 1000


@dataclass(frozen=True)
class Split:
    """Labelled images, perhaps more than fit in memory: :meth:`read` them part by part.

    Attributes:
        source: uint8 ``[M, C, H, W]``, in memory or mapped from disk.
        labels: int64 ``[N]``.
        skipped: unreadable files, with the reason.
        rows: int64 ``[N]``, which images of ``source`` these are; ``None`` for all of them in order.
        source_digest: of ``source``, where it is known without reading all of it.
    """

    source: Tensor
    labels: Tensor
    skipped: tuple[str, ...] = ()
    rows: Tensor | None = None
    source_digest: str | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(N, C, H, W)``."""
        return (len(self), *self.source.shape[1:])

    @cached_property
    def images(self) -> Tensor:
        """All images at once, uint8 ``[N, C, H, W]``: for small data sets only."""
        return self.source if self.rows is None else self.source[self.rows]

    def read(self, part: Tensor | slice) -> Tensor:
        """The images at some indices (int64 ``[B]``, or a slice), uint8 ``[B, C, H, W]``."""
        return self.source[part if self.rows is None else self.rows[part]]

    def take(self, indices: Tensor) -> Split:
        """The examples at ``indices`` (int64 ``[K]``), in that order; no image is copied."""
        rows = indices if self.rows is None else self.rows[indices]
        return replace(self, labels=self.labels[indices], rows=rows)

    def first(self, count: int | None, *, seed: int = 0) -> Split:
        """The first ``count`` examples of a fixed shuffle; all of them, in their own order, if there are no more."""
        if count is None or count >= len(self):
            return self
        return self.take(torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:count])


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
        total = hashlib.sha256(f"{self.mean}{self.std}{split.shape}".encode())
        if split.source_digest is None:
            for start in range(0, len(split), _HASHED):
                total.update(np.ascontiguousarray(split.read(slice(start, start + _HASHED)).numpy()).data)
        else:
            total.update(split.source_digest.encode())
            if split.rows is not None:
                total.update(split.rows.numpy().tobytes())
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
        turn: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
        """Normalised images ``[B, C, H, W]`` and labels ``[B]``; shuffled if a ``generator`` is given.

        augment: changes uint8 images ``[B, C, H, W]`` on the device, before they are normalised;
        turn: ``(i, n)`` leaves out all batches but every n-th, from the i-th on.
        """
        split = self.split(name)
        order = None if generator is None else torch.randperm(len(split), generator=generator)
        for start in range(0, len(split), batch_size)[turn[0] :: turn[1]]:
            stop = start + batch_size
            part = slice(start, stop) if order is None else order[start:stop]
            images = split.read(part).to(device)
            yield self.normalise(augment(images) if augment else images), split.labels[part].to(device)

    def draw(self, name: str, count: int, *, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """A random ``count`` of a split's images (all, if it has fewer), in batches of at most 250.

        Normalised images ``[B, C, H, W]`` and labels ``[B]``; a smaller count is the start of a larger one.
        """
        split = self.split(name)
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
        for part in order[:count].split(250):
            yield self.normalise(split.read(part)), split.labels[part]

    def parts(self, count: int, *, overlap: float = 0.0, seed: int) -> list[Dataset]:
        """The same data with ``count`` parts of the training images; see :func:`intrafusion.schedule.split`.

        Raises:
            LabError: a class has fewer training images than there are parts.
        """
        return [self._trained_on(rows) for rows in self._rows_of_parts(count, overlap, seed)]

    def together(self, count: int, *, overlap: float = 0.0, seed: int) -> Dataset:
        """The same data with the training images of all :meth:`parts`: one in several parts is there several times.

        Going through it once presents as many images, and the same ones, as going once through each part.
        """
        return self._trained_on(torch.cat(self._rows_of_parts(count, overlap, seed)).sort().values)

    def _rows_of_parts(self, count: int, overlap: float, seed: int) -> list[Tensor]:
        try:
            return schedule.split(self.split("train").labels, count, overlap=overlap, seed=seed)
        except ValueError as error:
            raise LabError(str(error)) from None

    def _trained_on(self, rows: Tensor) -> Dataset:
        splits = {name: self.split(name) for name in SPLITS}
        return replace(self, _read=splits | {"train": splits["train"].take(rows)})
