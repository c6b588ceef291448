"""Unpack an archive of images once, safely, into the cache folder."""

from __future__ import annotations

import hashlib
import logging
import tarfile
import zlib
from lzma import LZMAError
from pathlib import Path

from tqdm import tqdm

from intrafusion.lab.errors import LabError
from intrafusion.lab.files import cache_folder, new_folder

_log = logging.getLogger(__name__)
_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


def is_archive(path: Path) -> bool:
    """Whether ``path`` is a file whose name says it is a tar archive."""
    return path.is_file() and path.name.endswith(_SUFFIXES)


def find_archive(folder: Path) -> Path | None:
    """The one archive directly inside ``folder``, or ``None`` if there is none.

    Raises:
        LabError: there are several, and which one is meant cannot be known.
    """
    found = sorted(path for path in folder.iterdir() if is_archive(path))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise LabError(f"{folder} holds several archives ({names}); give the path of one of them as data.root")
    return found[0] if found else None


def unpack(archive: Path, *, progress: bool = True) -> Path:
    """The folder with the content of ``archive``: unpacked now, or by an earlier call.

    The folder lies in the cache and is keyed by the archive's path, size and time of change. It appears only
    when everything is unpacked. A single top folder inside the archive is entered.

    Raises:
        LabError: the archive is truncated or broken, or holds a member that points outside the folder.
    """
    status = archive.stat()
    identity = f"{archive.resolve()}\n{status.st_size}\n{status.st_mtime_ns}"
    stem = archive.name.split(".")[0]
    target = cache_folder() / "unpacked" / f"{stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    if not target.is_dir():
        _log.info("unpacking %s into %s", archive, target)
        with new_folder(target) as folder:
            _extract(archive, folder, progress)
    return target


def _extract(archive: Path, folder: Path, progress: bool) -> None:
    if not hasattr(tarfile, "data_filter"):
        raise LabError("this Python cannot unpack archives safely; use Python 3.11.4 or newer, or unpack by hand")
    try:
        with tarfile.open(archive) as tar:
            bar = tqdm(tar, desc=f"unpack {archive.name}", unit=" files", delay=1, leave=False,
                       disable=None if progress else True)  # fmt: skip
            for member in bar:
                tar.extract(member, folder, filter="data")
            while tar.fileobj is not None and tar.fileobj.read(1 << 20):
                pass  # a compressed file's checksum stands behind its last block
    except tarfile.FilterError as error:
        raise LabError(f"{archive} is not safe to unpack: {error}") from None
    except (tarfile.TarError, EOFError, zlib.error, LZMAError) as error:
        raise LabError(f"{archive} is truncated or not a tar archive ({error})") from None
    except OSError as error:
        # gzip and bz2 report damage as a bare OSError without an error number
        if error.errno is not None:
            raise
        raise LabError(f"{archive} is damaged ({error})") from None
