"""Folders of small images, one folder a class, decoded once into an array that later runs read in a moment."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from intrafusion.lab.archive import find_archive, is_archive, unpack
from intrafusion.lab.errors import LabError
from intrafusion.lab.files import cache_folder, new_folder, write_atomic

_log = logging.getLogger(__name__)
_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".ppm"})
_MAX_BYTES = 16 * 2**30
_FORMAT = 1


@dataclass(frozen=True)
class ImageArray:
    """Decoded images and what was left out.

    Attributes:
        images: uint8 ``[N, 3, H, W]``, RGB.
        labels: int64 ``[N]``, indices into ``classes``.
        classes: folder names in alphabetical order.
        skipped: files that could not be read, with the reason (only with ``on_corrupt="skip"``).
        digest: sixteen hexadecimal digits of images, labels and classes.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    skipped: tuple[str, ...]
    digest: str


def locate(root: Path, *, progress: bool = True) -> Path:
    """The folder with ``train/`` and ``test/`` (or ``val/``): ``root`` itself, or the unpacked archive it is or holds.

    Raises:
        LabError: there is no such folder and no archive, or the archive does not hold one.
    """
    if _has_splits(root):
        return root
    if not root.exists():
        raise LabError(f"data.root {root} does not exist")
    archive = root if is_archive(root) else find_archive(root) if root.is_dir() else None
    if archive is None:
        raise LabError(f"{root} holds neither the folders train/ and test/ nor a .tar, .tar.gz, .tgz archive of them")
    unpacked = unpack(archive, progress=progress)
    for folder in (unpacked, *sorted(path for path in unpacked.iterdir() if path.is_dir())):
        if _has_splits(folder):
            return folder
    raise LabError(f"{archive} does not hold the folders train/ and test/")


def read_split(
    folder: Path, *, on_corrupt: str = "error", progress: bool = True, size: int | None = None, limit: int | None = None
) -> ImageArray:
    """Decode ``folder/<class>/*`` or read the array an earlier call decoded from the same files.

    "The same" means the same names, sizes and times of change.

    Args:
        folder: one split, with a folder for each class.
        on_corrupt: ``"error"`` raises at the first unreadable image, ``"skip"`` leaves it out and says so.
        size: side of the square that every image becomes, in pixels (the shorter side is brought to 8/7 of it and the
            centre is cut out; images of exactly this size stay as they are); ``None`` leaves them as they are.
        limit: read only this many files of a fixed shuffle; ``None`` for all.

    Raises:
        LabError: no class, a class without an image, an unreadable image, images of different sizes.
    """
    classes, files = _list_files(folder)
    if limit is not None and limit < len(files):
        files = [files[i] for i in sorted(np.random.default_rng(0).permutation(len(files))[:limit])]
    key = _fingerprint(folder, files, on_corrupt, size)
    target = cache_folder() / "images" / f"{folder.name}-{key}"
    cached = _read_cache(target)
    if cached is None:
        cached = _decode(folder, classes, files, on_corrupt, progress, size)
        if target.exists():
            shutil.rmtree(target)
        _write_cache(target, cached)
    if cached.skipped:
        _log.warning("%d unreadable images were left out of %s: %s", len(cached.skipped), folder,
                     "; ".join(cached.skipped[:5]))  # fmt: skip
    return cached


def class_names(folder: Path) -> tuple[str, ...]:
    """The class folders of one split in alphabetical order.

    Raises:
        LabError: the folder has none, or cannot be found.
    """
    if not folder.is_dir():
        raise LabError(f"{folder} does not exist")
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not names:
        raise LabError(f"{folder} holds no class folders; expected {folder / '<class>' / '*.jpg'}")
    return tuple(names)


def _has_splits(folder: Path) -> bool:
    return (folder / "train").is_dir() and any((folder / held).is_dir() for held in ("test", "val"))


def _list_files(folder: Path) -> tuple[tuple[str, ...], list[tuple[Path, int]]]:
    classes = class_names(folder)
    files: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        found = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in _SUFFIXES)
        found = [path for path in found if not path.name.startswith(".")]
        if not found:
            raise LabError(f"class folder {folder / name} holds no images ({', '.join(sorted(_SUFFIXES))})")
        files += [(path, label) for path in found]
    return classes, files


def _fingerprint(folder: Path, files: Sequence[tuple[Path, int]], on_corrupt: str, size: int | None) -> str:
    total = hashlib.sha256(f"{_FORMAT}\n{folder.resolve()}\n{on_corrupt}{size or ''}".encode())
    for path, label in files:
        status = path.stat()
        total.update(f"{path.name}\n{label}\n{status.st_size}\n{status.st_mtime_ns}\n".encode())
    return total.hexdigest()[:16]


def _decode(
    folder: Path, classes: tuple[str, ...], files: Sequence[tuple[Path, int]], on_corrupt: str, progress: bool,
    size: int | None,
) -> ImageArray:  # fmt: skip
    images: np.ndarray | None = None
    labels: list[int] = []
    skipped: list[str] = []
    first = files[0][0]
    bar = tqdm(files, desc=f"decode {folder.name}", unit=" images", delay=1, leave=False,
               disable=None if progress else True)  # fmt: skip
    for path, label in bar:
        try:
            pixels = _read_image(path, size)
        except LabError as error:
            if on_corrupt == "error":
                raise
            skipped.append(str(error))
            continue
        if images is None:
            images, first = _room_for(len(files), pixels, folder), path
        elif pixels.shape != images.shape[1:]:
            raise LabError(f"images differ in size: {path} is {_size(pixels)}, {first} is {_size(images[0])}")
        images[len(labels)] = pixels
        labels.append(label)
    empty = [classes[label] for label in sorted({label for _, label in files} - set(labels))]
    if images is None or empty:
        raise LabError(f"no readable image is left in {folder} for class {', '.join(empty)}: {skipped[0]}")
    images, label_array = images[: len(labels)], np.asarray(labels, dtype=np.int64)
    return ImageArray(images, label_array, classes, tuple(skipped), _digest(images, label_array, classes))


def _read_image(path: Path, size: int | None = None) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
            if size is not None and image.size != (size, size):
                scale = 8 / 7 * size / min(image.size)
                width, height = (round(side * scale) for side in image.size)
                left, top = (width - size) // 2, (height - size) // 2
                image = image.resize((width, height)).crop((left, top, left + size, top + size))
            return np.asarray(image).transpose(2, 0, 1)
    except FileNotFoundError:
        raise LabError(f"{path} disappeared while it was read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise LabError(f"cannot read {path}: {reason}") from None


def _room_for(count: int, pixels: np.ndarray, folder: Path) -> np.ndarray:
    if count * pixels.size > _MAX_BYTES:
        raise LabError(
            f"the {count} images of {_size(pixels)} in {folder} would take "
            f"{count * pixels.size / 2**30:.0f} GiB; image_folder is for data sets that fit in memory (16 GiB)"
        )
    return np.empty((count, *pixels.shape), dtype=np.uint8)


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[2]}x{pixels.shape[1]}"


def _digest(images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> str:
    total = hashlib.sha256("\n".join(classes).encode())
    total.update(str(images.shape).encode())
    total.update(np.ascontiguousarray(images).data)
    total.update(labels.tobytes())
    return total.hexdigest()[:16]


def _write_cache(target: Path, array: ImageArray) -> None:
    with new_folder(target) as folder:
        np.save(folder / "images.npy", array.images)
        np.save(folder / "labels.npy", array.labels)
        meta = {"classes": array.classes, "skipped": array.skipped, "digest": array.digest}
        write_atomic(folder / "meta.json", json.dumps(meta))


def _read_cache(target: Path) -> ImageArray | None:
    if not target.is_dir():
        return None
    try:
        meta = json.loads((target / "meta.json").read_text())
        images, labels = np.load(target / "images.npy"), np.load(target / "labels.npy")
        return ImageArray(images, labels, tuple(meta["classes"]), tuple(meta["skipped"]), meta["digest"])
    except (OSError, ValueError, KeyError, EOFError) as error:
        _log.warning("the cached images in %s are damaged (%s); decoding again", target, error)
        return None
