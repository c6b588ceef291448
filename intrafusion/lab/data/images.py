"""Folders of images, one folder a class, decoded once into an array that later runs map into memory."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from intrafusion.lab.data.archive import find_archive, is_archive, unpack
from intrafusion.lab.data.image_cache import Contents, ImageArray, Pixels, TooLarge, cached
from intrafusion.lab.errors import LabError

_log = logging.getLogger(__name__)
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".ppm"})
_AHEAD = 32
"""Images that one worker decodes ahead of the writer."""
_FORMAT = 2
_Files = Sequence[tuple[Path, int]]


@dataclass(frozen=True)
class Decoding:
    """How files become images.

    Attributes:
        size: side of the square that every image becomes, in pixels; images of exactly this size stay as they are.
            ``None`` leaves all as they are, and they must agree.
        resize: length that the shorter side is brought to before the square is cut out of the centre, in pixels;
            ``None`` for 8/7 of ``size`` (256 for 224). Both steps are torchvision's, bilinear.
        on_corrupt: ``"error"`` raises at the first unreadable image, ``"skip"`` leaves it out and says so.
        workers: threads; ``None`` for one per processor.
        progress: show a progress bar (on a terminal only).
    """

    size: int | None = None
    resize: int | None = None
    on_corrupt: str = "error"
    workers: int | None = None
    progress: bool = True


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


def locate_classes(root: Path, *, progress: bool = True) -> Path:
    """The folder with the class folders: ``root`` itself, or the unpacked archive that it is.

    Raises:
        LabError: there is no such folder, and no archive of one.
    """
    if is_archive(root):
        root = unpack(root, progress=progress)
        inside = [path for path in root.iterdir() if path.is_dir()]
        root = inside[0] if len(inside) == 1 else root
    if not root.is_dir():
        raise LabError(f"data.root {root} is neither a folder of class folders nor a tar archive of it")
    class_names(root)
    return root


def read_split(folder: Path, decoding: Decoding | None = None, *, limit: int | None = None) -> ImageArray:
    """Decode ``folder/<class>/*`` or map the array an earlier call decoded from the same files.

    "The same" means the same names, sizes and times of change.

    Args:
        folder: one split, with a folder for each class.
        limit: read only this many files of a fixed shuffle; ``None`` for all.

    Raises:
        LabError: no class, a class without an image, an unreadable image, images of different sizes, no room for them
            on disk or in memory.
    """
    decoding = decoding or Decoding()
    classes, files = _list_files(folder)
    if limit is not None and limit < len(files):
        files = [files[i] for i in sorted(np.random.default_rng(0).permutation(len(files))[:limit])]
    try:
        array = cached(
            folder.name, _fingerprint(folder, files, decoding), partial(_decode, folder, classes, files, decoding)
        )
    except TooLarge as error:
        raise LabError(
            f"{error}, and the {len(files)} images of {folder} do not fit in memory; free some space, set "
            "INTRAFUSION_CACHE to a folder on a larger disk, or read fewer (data.train_images, data.size)"
        ) from None
    if array.skipped:
        _log.warning("%d unreadable images were left out of %s: %s", len(array.skipped), folder,
                     "; ".join(array.skipped[:5]))  # fmt: skip
    return array


def image_shape(folder: Path, decoding: Decoding) -> tuple[int, int, int]:
    """``(C, H, W)`` of the images of one split, from the first one that can be read.

    Raises:
        LabError: as :func:`read_split` would for that image.
    """
    if decoding.size is not None:
        return 3, decoding.size, decoding.size
    _, files = _list_files(folder)
    failures: list[str] = []
    for path, _ in files:
        try:
            channels, height, width = _read_image(path).shape
            return channels, height, width
        except LabError as error:
            if decoding.on_corrupt == "error":
                raise
            failures.append(str(error))
    raise LabError(f"no image of {folder} can be read: {failures[0]}")


def class_names(folder: Path) -> tuple[str, ...]:
    """The class folders of one split in alphabetical order.

    Raises:
        LabError: the folder has none, or cannot be found.
    """
    if not folder.is_dir():
        raise LabError(f"{folder} does not exist")
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise LabError(f"{folder} holds no class folders; expected {folder / '<class>' / '*.jpg'}")
    return tuple(names)


def _has_splits(folder: Path) -> bool:
    return (folder / "train").is_dir() and any((folder / held).is_dir() for held in ("test", "val"))


def _list_files(folder: Path) -> tuple[tuple[str, ...], list[tuple[Path, int]]]:
    classes = class_names(folder)
    files: list[tuple[Path, int]] = []
    for label, name in enumerate(classes):
        found = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in SUFFIXES)
        found = [path for path in found if not path.name.startswith(".")]
        if not found:
            raise LabError(f"class folder {folder / name} holds no images ({', '.join(sorted(SUFFIXES))})")
        files += [(path, label) for path in found]
    return classes, files


def _fingerprint(folder: Path, files: _Files, decoding: Decoding) -> str:
    how = f"{decoding.on_corrupt} {decoding.size} {decoding.resize}"
    total = hashlib.sha256(f"{_FORMAT}\n{folder.resolve()}\n{how}".encode())
    for path, label in files:
        status = path.stat()
        total.update(f"{path.name}\n{label}\n{status.st_size}\n{status.st_mtime_ns}\n".encode())
    return total.hexdigest()[:16]


def _decode(folder: Path, classes: tuple[str, ...], files: _Files, decoding: Decoding, pixels: Pixels) -> Contents:
    labels: list[int] = []
    skipped: list[str] = []
    first = files[0][0]
    bar = tqdm(_read_all(files, decoding), total=len(files), desc=f"decode {folder.name}", unit=" images", delay=1,
               leave=False, disable=None if decoding.progress else True)  # fmt: skip
    for path, label, image in bar:
        if isinstance(image, LabError):
            if decoding.on_corrupt == "error":
                raise image
            skipped.append(str(image))
            continue
        if not pixels.shape:
            pixels.start(len(files), image.shape)
            first = path
        elif image.shape != pixels.shape:
            raise LabError(
                f"images differ in size: {path} is {_size(image.shape)}, {first} is {_size(pixels.shape)}; "
                "data.size brings them to one"
            )
        pixels.add(image)
        labels.append(label)
    empty = [classes[label] for label in sorted({label for _, label in files} - set(labels))]
    if empty:
        raise LabError(f"no readable image is left in {folder} for class {', '.join(empty)}: {skipped[0]}")
    return Contents(np.asarray(labels, dtype=np.int64), classes, tuple(skipped))


def _read_all(files: _Files, decoding: Decoding) -> Iterator[tuple[Path, int, np.ndarray | LabError]]:
    """Every file in order with its image or the reason why there is none; a bounded number is in memory at a time."""
    workers = decoding.workers or os.cpu_count() or 1

    def read(path: Path) -> np.ndarray | LabError:
        try:
            return _read_image(path, decoding.size, decoding.resize)
        except LabError as error:
            return error

    with ThreadPoolExecutor(workers) as pool:  # Pillow decodes without the interpreter's lock
        for start in range(0, len(files), _AHEAD * workers):
            part = files[start : start + _AHEAD * workers]
            images = pool.map(read, [path for path, _ in part])
            yield from ((path, label, image) for (path, label), image in zip(part, images, strict=True))


def _read_image(path: Path, size: int | None = None, resize: int | None = None) -> np.ndarray:
    from PIL import Image
    from torchvision.transforms import functional as transform

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
            if size is not None and image.size != (size, size):
                smaller: Image.Image = transform.resize(image, [resize or round(8 / 7 * size)])  # pyright: ignore
                image: Image.Image = transform.center_crop(smaller, [size, size])  # pyright: ignore
            return np.asarray(image).transpose(2, 0, 1)
    except FileNotFoundError:
        raise LabError(f"{path} disappeared while it was read") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise LabError(f"cannot read {path}: {reason}") from None


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[2]}x{shape[1]}"
