"""The JSON document of a checkpoint: what it says, and a reader that believes none of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

FORMAT = "intrafusion-checkpoint"
VERSION = 1

Attribute = int | float | list[int]
"""The attributes that are kept: sizes, factors and lists of sizes (tuples too)."""

_LARGEST = 2**53
"""JSON readers agree on whole numbers up to here."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written, read or fitted to a network; no network and no file was changed."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor: `parameter` or `buffer`, the name of its torch dtype, its shape, and whether it is trained."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    trains: bool


@dataclass(frozen=True)
class ModuleEntry:
    """One module: the name of its class, its mode, and its public attributes that are numbers or lists of numbers."""

    type: str
    training: bool
    attributes: dict[str, Attribute]


@dataclass(frozen=True)
class Kept:
    """Which of the dense layer's channels stay where they are in the pruned one; the others were fused into them."""

    side: str
    of: int
    channels: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says about its network.

    source, num_classes: arguments of `intrafusion.models.named_model` that give the dense network, if known.
    recipe: anything that JSON can hold. packages: versions by name. tensors: by name, None where a module has no such
    tensor (a convolution without a bias). tied: further names of tensors. kept: by layer.
    """

    modules: dict[str, ModuleEntry]
    tensors: dict[str, TensorEntry | None]
    tied: dict[str, str]
    source: str | None = None
    num_classes: int | None = None
    recipe: Any = None
    packages: dict[str, str] = field(default_factory=dict)
    kept: dict[str, Kept] = field(default_factory=dict)

    def to_json(self, sha256: str) -> str:
        """One line of JSON that starts with the checksum. Raises CheckpointError if the recipe is no JSON value."""
        source = {"model": self.source, "num_classes": self.num_classes} if self.source is not None else None
        document = {
            "sha256": sha256,
            "format": FORMAT,
            "version": VERSION,
            "source": source,
            "recipe": self.recipe,
            "packages": self.packages,
            "modules": {name: vars(entry) for name, entry in self.modules.items()},
            "tensors": {name: vars(entry) if entry else None for name, entry in self.tensors.items()},
            "tied": self.tied,
            "kept": {name: vars(entry) for name, entry in self.kept.items()},
        }
        try:
            return json.dumps(document, allow_nan=False, separators=(",", ":"))
        except (TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"the recipe cannot be written as JSON: {error}") from error


def parse(text: str) -> tuple[dict, str]:
    """The document as it is and its checksum, when it is one of ours and not newer than this version.

    Raises CheckpointError for what is no JSON object, has a key twice, a NaN, or another format.
    """
    try:
        document = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its document is not valid JSON: {short(str(error))}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError("its document is not that of an intrafusion checkpoint")
    version = _take(document, "version", _count, "the document")
    if version != VERSION:
        newer = "a newer intrafusion (pip install -U intrafusion)" if version > VERSION else "something else"
        raise CheckpointError(f"its format has version {version}, this is version {VERSION}: {newer} wrote it")
    return document, _take(document, "sha256", _text, "the document")


def read(document: dict) -> Manifest:
    """The manifest that a document describes. Raises CheckpointError naming the first entry that makes no sense."""
    top = "the document"
    source = _take(document, "source", _optional(_mapping), top)
    manifest = Manifest(
        modules=_each(document, "modules", _module),
        tensors=_each(document, "tensors", _optional(_tensor)),
        tied=_each(document, "tied", _text),
        source=_take(source, "model", _text, "source") if source is not None else None,
        num_classes=_take(source, "num_classes", _count, "source") if source is not None else None,
        recipe=document.get("recipe"),
        packages=_each(document, "packages", _text),
        kept=_each(document, "kept", _kept),
    )
    for alias, name in manifest.tied.items():
        if manifest.tensors.get(name) is None or alias in manifest.tensors:
            raise CheckpointError(f"tied: {short(alias)} stands for {short(name)}, which cannot be")
    return manifest


def short(value: Any) -> str:
    """`repr`, of bounded length and in ASCII: what a file says may be anything."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-15:]}"


def listed(names: list[str], shown: int = 3) -> str:
    """The first few of some descriptions, and how many there are beyond."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


class _Wrong(Exception):
    """What is expected, of a value that is something else."""


Reader = Callable[[Any], Any]


def _take(mapping: Mapping, key: str, reader: Reader, where: str) -> Any:
    if key not in mapping:
        raise CheckpointError(f"{where} has no {key!r}")
    try:
        return reader(mapping[key])
    except _Wrong as error:
        raise CheckpointError(f"{where}: {short(key)} is {short(mapping[key])}, not {error}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {short(key)}: {error}") from None


def _each(document: dict, section: str, reader: Reader) -> dict[str, Any]:
    entries = _take(document, section, _mapping, "the document")
    return {name: _take(entries, name, reader, section) for name in entries}


def _module(value: Any) -> ModuleEntry:
    where = "this module"
    entry = _mapping(value)
    attributes = _take(entry, "attributes", _mapping, where)
    return ModuleEntry(
        type=_take(entry, "type", _text, where),
        training=_take(entry, "training", _flag, where),
        attributes={name: _take(attributes, name, _attribute, "attributes") for name in attributes},
    )


def _tensor(value: Any) -> TensorEntry:
    where = "this tensor"
    entry = _mapping(value)
    kind = _take(entry, "kind", _text, where)
    if kind not in ("parameter", "buffer"):
        raise _Wrong("a parameter or a buffer")
    return TensorEntry(
        kind=kind,
        dtype=_take(entry, "dtype", _text, where),
        shape=tuple(_take(entry, "shape", _counts, where)),
        trains=_take(entry, "trains", _flag, where),
    )


def _kept(value: Any) -> Kept:
    where = "this layer"
    entry = _mapping(value)
    side, of = _take(entry, "side", _text, where), _take(entry, "of", _count, where)
    channels = _take(entry, "channels", _counts, where)
    if side not in ("in", "out") or sorted(set(channels)) != channels or (channels and channels[-1] >= of):
        raise _Wrong("a side (in, out) with ascending channel numbers")
    return Kept(side, of, tuple(channels))


def _optional(reader: Reader) -> Reader:
    return lambda value: None if value is None else reader(value)


def _mapping(value: Any) -> dict:
    if not isinstance(value, dict):
        raise _Wrong("a mapping")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _Wrong("a text")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Wrong("true or false")
    return value


def _count(value: Any) -> int:
    if not _is_whole(value) or value < 0:
        raise _Wrong("a whole number of at least 0")
    return value


def _counts(value: Any) -> list[int]:
    if not isinstance(value, list):
        raise _Wrong("a list of whole numbers")
    return [_count(number) for number in value]


def _attribute(value: Any) -> Attribute:
    whole = _is_whole(value) or (isinstance(value, list) and all(_is_whole(number) for number in value))
    if not whole and not (isinstance(value, float) and math.isfinite(value)):
        raise _Wrong("a finite number or a list of whole numbers")
    return value


def _is_whole(value: Any) -> bool:
    return type(value) is int and abs(value) <= _LARGEST


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a key is there twice")
    return mapping


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")
