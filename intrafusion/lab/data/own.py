"""Images of one's own: a function that a recipe names as ``package.module:function``."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from intrafusion.lab.data.conventions import Values, hold_out, numbered, statistics_or
from intrafusion.lab.data.dataset import Dataset, Split
from intrafusion.lab.errors import LabError
from intrafusion.lab.named import named_function

_HALF = ((0.5,), (0.25,))
_WANTED = "expected images uint8 [N, C, H, W] and labels int64 [N]"


def own(
    name: str, classes: int, root: Path | None = None, *, validation: float = 0.1, seed: int = 0,
    train_images: int | None = None, test_images: int | None = None, mean: Values = None, std: Values = None,
) -> Dataset:  # fmt: skip
    """The data set that a function reads: ``function("train", root)`` and ``function("test", root)``.

    Each returns images uint8 ``[N, C, H, W]`` and labels int64 ``[N]`` below ``classes``, as tensors or as numpy
    arrays, mapped ones too. It is called when a split is first asked for, for ``test`` at once (the shape is needed),
    and should give the same images every time.

    Args:
        name: ``package.module:function``, importable here.
        root: passed on; ``data.root`` of a recipe.
        mean, std: of pixels scaled to [0, 1]; ``None`` for 0.5 and 0.25. The rest as for any other data set.

    Raises:
        LabError: there is no such function, it fails, or it returns something else.
    """
    function = named_function(name)

    @cache
    def read(half: str) -> Split:
        try:
            returned = function(half, root)
        except Exception as error:
            raise LabError(f"'{name}': the call with {half!r} and root={root} failed: {error}") from error
        images, labels = _checked(returned, f"'{name}' returned for {half!r}", classes)
        return Split(images, labels)

    def load(split: str) -> Split:
        if split == "test":
            return read("test").first(test_images)
        everything = read("train")
        if everything.shape[1:] != read("test").shape[1:]:
            raise LabError(f"'{name}': {_shape(everything)} for training, {_shape(read('test'))} for the test")
        return hold_out(everything.first(train_images), split, validation, seed)

    channels, height, width = read("test").shape[1:]
    statistics = statistics_or(mean, std, _HALF, channels)
    return Dataset(name, numbered(classes), (channels, height, width), *statistics, _load=load)


def _checked(returned: object, what: str, classes: int) -> tuple[Tensor, Tensor]:
    """The images and labels, or LabError with what is wrong about them."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing writes into images
            images, labels = (torch.as_tensor(part) for part in returned)  # type: ignore[attr-defined]
    except (TypeError, ValueError, RuntimeError):
        raise LabError(f"{what} a {type(returned).__name__}; {_WANTED}") from None
    found = ", ".join(f"{str(part.dtype).removeprefix('torch.')} {list(part.shape)}" for part in (images, labels))
    right = images.dtype == torch.uint8 and images.ndim == 4 and labels.dtype == torch.int64 and labels.ndim == 1
    if not right or len(images) != len(labels) or not images.numel():
        raise LabError(f"{what} {found}; {_WANTED}, at least one")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise LabError(f"{what} labels from {low} to {high}; with model.num_classes={classes}: from 0 to {classes - 1}")
    return images, labels


def _shape(split: Split) -> str:
    return "images of " + "x".join(map(str, split.shape[1:]))
