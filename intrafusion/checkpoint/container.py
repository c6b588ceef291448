"""The file of a checkpoint: safetensors with one JSON document in its metadata, and a checksum over all of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from intrafusion.checkpoint import manifest as manifests
from intrafusion.checkpoint.manifest import CheckpointError, Manifest, short
from intrafusion.files import replacing

KEY = "intrafusion"
"""The metadata entry that holds the document."""

_BLANK = "0" * 64
_BEFORE_DIGITS = b'{\\"sha256\\":\\"'
_LENGTH = 8
_CHUNK = 2**24


def write(path: Path, manifest: Manifest, tensors: dict[str, Tensor]) -> None:
    """Write a checkpoint in one step.

    Raises CheckpointError for what the format cannot hold, OSError if the file cannot be written.
    """
    document = manifest.to_json(sha256=_BLANK)
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={KEY: document})
        except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
            if "I/O error" in str(error):  # safetensors has one type for everything
                raise OSError(f"{path}: {error}") from error
            raise CheckpointError(f"{path}: safetensors cannot hold these tensors: {error}") from error
        digest, position = _checksum(temporary)
        with open(temporary, "rb+") as file:
            file.seek(position)
            file.write(digest.encode())


def read(path: Path) -> tuple[Manifest, dict[str, Tensor]]:
    """The document and the tensors, on the CPU, of a file that is whole and unchanged.

    Raises CheckpointError, or OSError if the file cannot be read.
    """
    with open(path, "rb") as file:  # a missing file is Python's own error, not safetensors'
        file.read(1)
    try:
        with safe_open(path, framework="pt") as opened:
            text = (opened.metadata() or {}).get(KEY)
            if text is None:
                raise CheckpointError("it is a safetensors file, but intrafusion.save did not write it")
            document, sha256 = manifests.parse(text)
            if sha256 != _checksum(path)[0]:
                raise CheckpointError("its checksum is wrong: it was changed or damaged after it was written")
            manifest = manifests.read(document)
            return manifest, {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"it is no complete safetensors file: {short(str(error))}") from None


def _checksum(path: Path) -> tuple[str, int]:
    """(SHA-256 of the file with the 64 digits of its checksum replaced by zeros, where those digits are)

    Raises CheckpointError if there is no room for a checksum.
    """
    total = hashlib.sha256()
    with open(path, "rb") as file:
        length = file.read(_LENGTH)
        header = file.read(int.from_bytes(length, "little"))
        start = header.find(_BEFORE_DIGITS) + len(_BEFORE_DIGITS)
        if start < len(_BEFORE_DIGITS) or len(header) < start + len(_BLANK):
            raise CheckpointError("its checksum is not where intrafusion.save puts it: another program wrote it again")
        total.update(length + header[:start] + _BLANK.encode() + header[start + len(_BLANK) :])
        while chunk := file.read(_CHUNK):
            total.update(chunk)
    return total.hexdigest(), _LENGTH + start
