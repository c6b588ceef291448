"""One file from the internet, in as many attempts as it takes."""

from __future__ import annotations

import hashlib
import http.client
import ssl
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

from intrafusion.lab.errors import LabError

_CHUNK = 2**18
_TIMEOUT = 60.0
"""Seconds without a single byte after which an attempt is given up."""


def fetch(url: str, path: Path, md5: str, *, progress: bool = True) -> None:
    """Download ``url`` to ``path``, which appears only when it is whole and has the checksum.

    What an interrupted attempt got is kept in ``<path>.part``, and the next one goes on from there.

    Raises:
        LabError: the host cannot be reached or breaks off, or what it sends has another checksum.
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        _append(url, part, progress)
    except (urllib.error.URLError, http.client.HTTPException, ssl.SSLError, TimeoutError, ConnectionError) as error:
        got = part.stat().st_size if part.exists() else 0
        reason = getattr(error, "reason", None) or error
        raise LabError(
            f"the download of {url} broke off ({reason}); {got / 2**20:.1f} MiB are kept in {part}, and the same "
            "command goes on from there"
        ) from None
    if md5_of(part) != md5:
        part.unlink()
        raise LabError(f"{url} sent a file with another checksum than md5 {md5}; nothing of it was kept")
    part.replace(path)


def md5_of(path: Path) -> str:
    """The md5 checksum of a file, as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _append(url: str, part: Path, progress: bool) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "intrafusion"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:  # it is all there already
            return
        raise
    with response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:  # the host starts from the beginning
            have = 0
        left = int(response.headers.get("Content-Length") or 0)
        bar = tqdm(total=have + left or None, initial=have, desc=part.stem, unit="B", unit_scale=True, leave=False,
                   disable=None if progress else True)  # fmt: skip
        with open(part, "ab" if have else "wb") as file, bar:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
                left -= len(chunk)
    if left > 0:
        raise http.client.IncompleteRead(b"", left)
