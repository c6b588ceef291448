"""CIFAR-10 and CIFAR-100 as their authors publish them, read by torchvision; downloaded only if that is asked for."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from intrafusion.lab.data.archive import unpack
from intrafusion.lab.data.download import fetch, md5_of
from intrafusion.lab.errors import LabError

CLASSES = {"cifar10": 10, "cifar100": 100}
NORMALISATION = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
"""Mean and standard deviation of the training images' pixels in [0, 1], per channel."""


def read_cifar(name: str, root: Path, *, train: bool, download: bool, progress: bool) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 ``[N, 3, 32, 32]`` and labels int64 ``[N]`` of one half of ``cifar10`` or ``cifar100``.

    Args:
        root: the folder that holds torchvision's folder of batches, or the archive of it. The archive is unpacked into
            the cache; nothing is written to ``root`` but a download.
        download: fetch the archive if neither is there.

    Raises:
        LabError: the files are not there or damaged, or the download fails; with what is missing and what to do.
    """
    kind = _torchvision(name)
    folder = _find(kind, name, root, download, progress)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy on the age of the pickles; their checksums were compared
            data = kind(str(folder), train=train)
    except RuntimeError:
        raise LabError(_damaged(kind, folder)) from None
    return np.ascontiguousarray(data.data.transpose(0, 3, 1, 2)), np.asarray(data.targets, dtype=np.int64)


def _torchvision(name: str) -> Any:
    from torchvision import datasets

    return {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]


def _find(kind: Any, name: str, root: Path, download: bool, progress: bool) -> Path:
    """The folder in which torchvision finds its own."""
    if (root / kind.base_folder).is_dir():
        return root
    archive = root / kind.filename
    if download and not _whole(archive, kind):
        try:
            root.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(f"{archive}.lock"):
                if not _whole(archive, kind):  # another process may have been faster
                    fetch(kind.url, archive, kind.tgz_md5, progress=progress)
        except LabError as error:
            raise LabError(f"{error}. {_by_hand(kind, root)}") from None
        except OSError as error:
            raise LabError(f"cannot download {name} to {root}: {error.strerror or error}; set data.root") from None
    if not archive.is_file():
        raise LabError(
            f"{name} is neither in {root / kind.base_folder} nor in {archive}. Set data.download (--set "
            f"data.download=true) to fetch it from {kind.url}. {_by_hand(kind, root)}"
        )
    if not _whole(archive, kind):
        raise LabError(
            f"{archive} is damaged or not whole: its md5 is not {kind.tgz_md5}; delete it, and set data.download or "
            "put a whole copy in its place"
        )
    return unpack(archive, progress=progress)


def _whole(archive: Path, kind: Any) -> bool:
    return archive.is_file() and md5_of(archive) == kind.tgz_md5


def _by_hand(kind: Any, root: Path) -> str:
    return (
        "That host is slow and sends only so much at a time; an interrupted download goes on where it stopped. A copy "
        f"from any mirror serves as well: put {kind.filename} (md5 {kind.tgz_md5}) into {root}"
    )


def _damaged(kind: Any, folder: Path) -> str:
    from torchvision.datasets.utils import check_integrity

    files = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
    wrong = [(name, md5) for name, md5 in files if not check_integrity(folder / kind.base_folder / name, md5)]
    listed = ", ".join(f"{name} (md5 {md5})" for name, md5 in wrong)
    return (
        f"{folder / kind.base_folder} lacks, or holds damaged copies of: {listed}; delete the folder, and set "
        f"data.download or put {kind.filename} (md5 {kind.tgz_md5}) beside it"
    )
