"""Take a checkpoint apart and put it together again with a valid checksum, as someone would who means harm."""

from __future__ import annotations

import hashlib
import json
from typing import Any

START = b'{\\"sha256\\":\\"'


def parts(content: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """(the safetensors header without the document, the document, the bytes of the tensors)"""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    document = json.loads(header.pop("__metadata__")["intrafusion"])
    return header, document, content[8 + length :]


def forge(header: dict[str, Any], document: Any, data: bytes) -> bytes:
    text = document if isinstance(document, str) else json.dumps(document, separators=(",", ":"))
    metadata = {"__metadata__": {"intrafusion": text}}
    return signed(json.dumps({**metadata, **header}, separators=(",", ":")).encode(), data)


def signed(header: bytes, data: bytes) -> bytes:
    """A file with this header, padded as safetensors does, and the checksum that the loader will ask for."""
    header += b" " * (-len(header) % 8)
    content = bytearray(len(header).to_bytes(8, "little") + header + data)
    at = content.find(START) + len(START)
    if at >= len(START):
        content[at : at + 64] = b"0" * 64
        content[at : at + 64] = hashlib.sha256(content).hexdigest().encode()
    return bytes(content)
