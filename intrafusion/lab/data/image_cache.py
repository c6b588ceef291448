"""Decoded images on disk: written once, one after the other, then mapped into memory by every later run."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import filelock
import numpy as np
from numpy.lib import format as npy

from intrafusion.lab.files import cache_folder, new_folder, write_atomic

_log = logging.getLogger(__name__)
MEMORY_LIMIT = 16 * 2**30
"""Bytes of images that are held in memory where the cache cannot be written."""


@dataclass(frozen=True)
class ImageArray:
    """Decoded images and what was left out.

    Attributes:
        images: uint8 ``[N, 3, H, W]``, RGB; a copy-on-write map of the cached file wherever there is one.
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


@dataclass(frozen=True)
class Contents:
    """What a decoder knows when it is done: :class:`ImageArray` without the images."""

    labels: np.ndarray
    classes: tuple[str, ...]
    skipped: tuple[str, ...]


class TooLarge(Exception):
    """The images fit neither into the cache nor into memory; the message says how large they are, and why."""


class Pixels:
    """An ``.npy`` file of uint8 images that grows image by image, its first axis being known only at the end.

    Plain writing, not a writable map: a full disk is then an error that can be caught, not a signal that kills.
    """

    def __init__(self, file: BinaryIO, room: Callable[[], int]) -> None:
        self._file, self._room = file, room
        self._shape: tuple[int, ...] = ()
        self._hash = hashlib.sha256()
        self.count = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image, ``(C, H, W)``; empty before the first one."""
        return self._shape

    def start(self, most: int, shape: tuple[int, ...]) -> None:
        """Make room for ``most`` images of ``shape``.

        Raises:
            OSError: there is less room than that.
        """
        if most * int(np.prod(shape)) > self._room():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._shape = shape
        self._write_header(most)

    def add(self, image: np.ndarray) -> None:
        """Append one image, uint8 of :attr:`shape`."""
        content = np.ascontiguousarray(image).data
        self._file.write(content)
        self._hash.update(content)
        self.count += 1

    def finish(self, contents: Contents) -> str:
        """Write the real number of images and return the digest of everything."""
        self._file.seek(0)
        self._write_header(self.count)  # as long as the first one: numpy pads for a growing first axis
        for part in (contents.labels.tobytes(), "\n".join(contents.classes).encode(), str(self._shape).encode()):
            self._hash.update(part)
        return self._hash.hexdigest()[:16]

    def _write_header(self, count: int) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, *self._shape)}
        npy.write_array_header_1_0(self._file, header)


def cached(name: str, key: str, decode: Callable[[Pixels], Contents]) -> ImageArray:
    """The images stored under ``name`` and ``key``; what is not there yet is made by ``decode`` and stored.

    Only one process decodes; others that ask for the same images wait for it. Where the cache cannot be written, the
    images are decoded into memory, with a warning.

    Raises:
        TooLarge: the cache cannot hold the images, and they exceed :data:`MEMORY_LIMIT`.
        Exception: whatever ``decode`` raises; nothing is stored then.
    """
    target = cache_folder() / "images" / f"{name}-{key}"
    found = _load(target)
    if found is not None:
        return found
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{target}.lock"):
            if (found := _load(target)) is None:
                _store(target, decode)
                found = _load(target)
    except (OSError, NotImplementedError) as error:
        return _in_memory(decode, target.parent, error)
    if found is None:
        raise RuntimeError(f"{target} was changed while it was written")
    return found


def _store(target: Path, decode: Callable[[Pixels], Contents]) -> None:
    if target.exists():
        _log.warning("the cached images in %s are damaged; decoding again", target)
        shutil.rmtree(target)
    with new_folder(target) as folder:
        with open(folder / "images.npy", "wb") as file:
            pixels = Pixels(file, lambda: shutil.disk_usage(folder).free)
            contents = decode(pixels)
            digest = pixels.finish(contents)
            file.flush()
            os.fsync(file.fileno())
        np.save(folder / "labels.npy", contents.labels)
        meta = {"classes": contents.classes, "skipped": contents.skipped, "digest": digest}
        write_atomic(folder / "meta.json", json.dumps(meta))


def _in_memory(decode: Callable[[Pixels], Contents], folder: Path, error: Exception) -> ImageArray:
    reason = getattr(error, "strerror", None) or str(error)
    _log.warning("%s cannot be written (%s); the images are decoded into memory, and again by every run; "
                 "set INTRAFUSION_CACHE to another folder", folder, reason)  # fmt: skip
    buffer = io.BytesIO()
    pixels = Pixels(buffer, lambda: MEMORY_LIMIT)
    try:
        contents = decode(pixels)
    except OSError:
        raise TooLarge(f"{folder} cannot be written ({reason})") from None
    digest = pixels.finish(contents)
    start = buffer.tell()
    images = np.frombuffer(buffer.getbuffer(), np.uint8, offset=start).reshape(pixels.count, *pixels.shape)
    return ImageArray(images, contents.labels, contents.classes, contents.skipped, digest)


def _load(target: Path) -> ImageArray | None:
    if not target.is_dir():
        return None
    try:
        meta = json.loads((target / "meta.json").read_text())
        images, labels = np.load(target / "images.npy", mmap_mode="c"), np.load(target / "labels.npy")
        if len(images) != len(labels):
            return None
        return ImageArray(images, labels, tuple(meta["classes"]), tuple(meta["skipped"]), meta["digest"])
    except (OSError, ValueError, KeyError, EOFError) as error:
        _log.debug("%s: %s", target, error)
        return None
