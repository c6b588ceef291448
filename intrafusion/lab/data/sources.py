"""Where images come from: the data sets that a recipe can name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from intrafusion.lab.data.cifar import CLASSES, NORMALISATION, read_cifar
from intrafusion.lab.data.conventions import Values, hold_out, numbered, statistics_or
from intrafusion.lab.data.dataset import Dataset, Split
from intrafusion.lab.data.images import (
    SUFFIXES,
    Decoding,
    class_names,
    image_shape,
    locate,
    locate_classes,
    read_split,
)  # fmt: skip
from intrafusion.lab.data.own import own
from intrafusion.lab.errors import LabError
from intrafusion.lab.files import cache_folder
from intrafusion.lab.recipe.sections import DataSection
from intrafusion.schedule import stratified

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
IMAGENET_SIZE = 224
_DIGITS = ((0.3,), (0.37,))
_FAKE = ((0.5,), (0.25,))
_FAKE_SIZE, _FAKE_TRAIN, _FAKE_TEST = 32, 1000, 500


def open_data(settings: DataSection, classes: int, *, progress: bool = True) -> Dataset:
    """The data set of a recipe; its images are read when they are first asked for.

    Args:
        classes: of generated images and of one's own, which have as many as the network has outputs.

    Raises:
        LabError: the files are not there, or not laid out as they must be; one's own function fails.
    """
    common: dict[str, Any] = {
        name: getattr(settings, name) for name in ("validation", "seed", "test_images", "mean", "std")
    }
    if settings.name == "digits":
        return digits(**common)
    common["train_images"] = settings.train_images
    if settings.name == "fake":
        return fake(classes, size=settings.size or _FAKE_SIZE, **common)
    if ":" in settings.name:
        return own(settings.name, classes, Path(settings.root) if settings.root else None, **common)
    if settings.name in CLASSES:
        root = Path(settings.root) if settings.root else None
        return cifar(settings.name, root, download=settings.download, progress=progress, **common)
    common |= {name: getattr(settings, name) for name in ("on_corrupt", "size", "resize", "workers")}
    make = {"imagenet": imagenet, "image_halves": image_halves}.get(settings.name, image_folder)
    return make(Path(settings.root or ""), progress=progress, **common)


def digits(*, validation: float = 0.1, seed: int = 0, test_images: int | None = None,
           mean: Values = None, std: Values = None) -> Dataset:  # fmt: skip
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
            return everything.take(test).first(test_images)
        return hold_out(everything.take(rest), name, validation, seed)

    return Dataset("digits", numbered(10), (1, 8, 8), *statistics_or(mean, std, _DIGITS, 1), _load=load)


def cifar(
    name: str, root: Path | None = None, *, download: bool = False, validation: float = 0.1, seed: int = 0,
    train_images: int | None = None, test_images: int | None = None, mean: Values = None, std: Values = None,
    progress: bool = True,
) -> Dataset:  # fmt: skip
    """``cifar10`` or ``cifar100``: 50,000 training and 10,000 test images of 32x32 pixels, classes in their own order.

    Args:
        root: see :func:`read_cifar`; ``None`` for a folder of the cache.
        mean, std: of pixels scaled to [0, 1]; ``None`` for those of the training images. The rest as in :func:`digits`
            and :func:`image_folder`.

    Raises:
        LabError: when a split is read and its files are not there or damaged.
    """
    folder = root or cache_folder() / name

    def load(split: str) -> Split:
        images, labels = read_cifar(name, folder, train=split != "test", download=download, progress=progress)
        everything = Split(torch.from_numpy(images), torch.from_numpy(labels))
        if split == "test":
            return everything.first(test_images)
        return hold_out(everything.first(train_images), split, validation, seed)

    statistics = statistics_or(mean, std, NORMALISATION[name], 3)
    return Dataset(name, numbered(CLASSES[name]), (3, 32, 32), *statistics, _load=load)


def image_folder(
    root: Path, *, validation: float = 0.1, seed: int = 0, test_images: int | None = None,
    mean: Values = None, std: Values = None, on_corrupt: str = "error", progress: bool = True,
    size: int | None = None, resize: int | None = None, train_images: int | None = None, workers: int | None = None,
) -> Dataset:  # fmt: skip
    """``root/train/<class>/*.jpg`` and ``root/test/<class>/*.jpg``, or an archive of such folders.

    A folder without ``test/`` may have ``val/`` instead.

    Args:
        root: the folder, a folder that holds one tar archive of it, or the archive.
        on_corrupt, size, resize, workers: see :class:`Decoding`.
        train_images: read only this many files of a fixed shuffle of ``train/``; ``None`` for all.
        mean, std: of pixels scaled to [0, 1]; ``None`` for ImageNet's. The rest as in :func:`digits`.

    Raises:
        LabError: the folders are not as described; when a split is read: an image cannot be read, images differ in
            size.
    """
    folder = locate(root, progress=progress)
    held = folder / ("test" if (folder / "test").is_dir() else "val")
    decoding = Decoding(size, resize, on_corrupt, workers, progress)
    return _from_folders("image_folder", folder / "train", held, decoding, validation, seed, train_images, test_images,
                         mean, std)  # fmt: skip


def image_halves(
    root: Path, *, validation: float = 0.1, seed: int = 0, test_images: int | None = None,
    mean: Values = None, std: Values = None, on_corrupt: str = "error", progress: bool = True,
    size: int | None = None, resize: int | None = None, train_images: int | None = None, workers: int | None = None,
) -> Dataset:  # fmt: skip
    """``root/<class>/*.jpg`` without halves of its own: of all images in order, every second one is for the test.

    The order is that of the class folders and, within one, of the file names. So a folder with one image a class, as a
    sample of ImageNet may be, trains and validates on the first class, tests on the second, and so on, and a label is
    the place of its class among all of them.

    Args:
        root: the folder, or a tar archive of it.
        validation: share of the training half that is held out; of classes with one image each there is none.
            The rest as in :func:`image_folder`.

    Raises:
        LabError: as :func:`image_folder`.
    """
    folder = locate_classes(root, progress=progress)
    decoding = Decoding(size, resize, on_corrupt, workers, progress)

    def load(split: str) -> Split:
        array = read_split(folder, decoding)
        images, labels = torch.from_numpy(array.images), torch.from_numpy(array.labels)
        everything = Split(images, labels, array.skipped, source_digest=array.digest)
        half = everything.take(torch.arange(int(split == "test"), len(everything), 2))
        if split == "test":
            return half.first(test_images)
        return hold_out(half.first(train_images), split, validation, seed)

    shape = image_shape(folder, decoding)
    statistics = statistics_or(mean, std, IMAGENET, shape[0])
    return Dataset("image_halves", class_names(folder), shape, *statistics, _load=load)


def imagenet(
    root: Path, *, validation: float = 0.1, seed: int = 0, test_images: int | None = None,
    mean: Values = None, std: Values = None, on_corrupt: str = "error", progress: bool = True,
    size: int | None = None, resize: int | None = None, train_images: int | None = None, workers: int | None = None,
) -> Dataset:  # fmt: skip
    """``root/val/<wnid>/*.JPEG`` and ``root/train/<wnid>/*.JPEG``: all 1,000 classes, or any of them.

    ``val/`` is the test split. ``train/`` may be missing unless training images are asked for. ``root`` may also be
    the folder of the unpacked ILSVRC archive. ``size`` is 224 unless given; the rest as in :func:`image_folder`.

    Raises:
        LabError: as :func:`image_folder`; the validation images lie in one flat folder; folders are no WordNet ids.
    """
    folder = next((path for path in (root, root / "ILSVRC/Data/CLS-LOC") if (path / "val").is_dir()), None)
    if folder is None:
        raise LabError(f"{root} holds no folder val/; expected {root}/val/<wnid>/*.JPEG and {root}/train/<wnid>/*.JPEG")
    _check_wnids(folder / "val")
    decoding = Decoding(size or IMAGENET_SIZE, resize, on_corrupt, workers, progress)
    return _from_folders("imagenet", folder / "train", folder / "val", decoding, validation, seed, train_images,
                         test_images, mean, std)  # fmt: skip


def fake(
    classes: int = 10, *, size: int = _FAKE_SIZE, validation: float = 0.1, seed: int = 0,
    train_images: int | None = None, test_images: int | None = None, mean: Values = None, std: Values = None,
) -> Dataset:  # fmt: skip
    """Generated images that a network can learn: each class is a pattern of coloured blobs, shifted and under noise.

    The same arguments give the same images on every machine; no file is read.

    Args:
        size: side of the square images, in pixels.
        train_images, test_images: how many there are; ``None`` for 1,000 and 500.
        mean, std: of pixels scaled to [0, 1]; ``None`` for 0.5 and 0.25. The rest as in :func:`digits`.
    """
    grid = torch.rand(classes, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    patterns = F.interpolate(grid, (size, size), mode="bilinear", align_corners=False)

    def load(name: str) -> Split:
        if name == "test":
            return _draw(patterns, test_images or _FAKE_TEST, seed=1)
        return hold_out(_draw(patterns, train_images or _FAKE_TRAIN, seed=2), name, validation, seed)

    return Dataset("fake", numbered(classes), (3, size, size), *statistics_or(mean, std, _FAKE, 3), _load=load)


def _draw(patterns: Tensor, count: int, *, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % len(patterns)
    images = torch.empty(count, *patterns.shape[1:], dtype=torch.uint8)
    furthest = max(1, patterns.shape[-1] // 8)
    for index, label in enumerate(labels.tolist()):
        down, right = torch.randint(-furthest, furthest + 1, (2,), generator=generator).tolist()
        noise = torch.randn(patterns.shape[1:], generator=generator)
        image = patterns[label].roll((down, right), (1, 2)) + 0.15 * noise
        images[index] = image.clamp_(0, 1).mul_(255).round_().to(torch.uint8)
    return Split(images, labels)


def _from_folders(
    name: str, train: Path, held: Path, decoding: Decoding, validation: float, seed: int, train_images: int | None,
    test_images: int | None, mean: Values, std: Values,
) -> Dataset:  # fmt: skip
    classes = class_names(held)
    if train.is_dir() and (other := set(classes) ^ set(class_names(train))):
        raise LabError(
            f"{held.parent}: train/ and {held.name}/ hold different classes: {_few(sorted(other))} in only one"
        )

    def load(split: str) -> Split:
        folder, limit = (held, None) if split == "test" else (train, train_images)
        array = read_split(folder, decoding, limit=limit)
        images, labels = torch.from_numpy(array.images), torch.from_numpy(array.labels)
        everything = Split(images, labels, array.skipped, source_digest=array.digest)
        return everything.first(test_images) if split == "test" else hold_out(everything, split, validation, seed)

    shape = image_shape(held, decoding)
    return Dataset(name, classes, shape, *statistics_or(mean, std, IMAGENET, shape[0]), _load=load)


def _check_wnids(folder: Path) -> None:
    flat = sum(path.suffix.lower() in SUFFIXES for path in folder.iterdir())
    if flat:
        raise LabError(
            f"{folder} holds {flat} images beside or instead of class folders: ILSVRC's validation archive is flat; "
            "move each image into val/<wnid>/, as the script valprep.sh of soumith/imagenetLoader.torch does"
        )
    strange = [name for name in class_names(folder) if not re.fullmatch(r"n\d{8}", name)]
    if strange:
        raise LabError(
            f"{folder}: the class folders of ImageNet are WordNet ids such as n01440764, not {_few(strange)}; for "
            "other folders of images there is data.name: image_folder"
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
