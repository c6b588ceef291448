"""What attributes that hold widths may have become when some widths have changed: every number that would fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from intrafusion.groups.joined import JoinedLinear
from intrafusion.groups.multihead import PartedAttention

_PACKED = 3
"""Queries, keys and values that one layer makes."""

_SHARING = ("num_key_value_groups", "num_queries_per_kv", "n_rep", "kv_groups", "num_kv_groups")
"""Attributes that say how many heads share one key and value."""


_POSITIONS = {"idx", "index", "id", "layer", "level", "depth"}
"""Words in names of numbers that say where a module is, as `layer_idx` does: with another one nothing fails at once."""
_HEADS = ("h", "nh", "n_h")
"""Attributes that are a number of heads, besides those whose names say so. What else is as large by chance, as a
stride, may be one of heads only where the network does not run with it."""


@dataclass(frozen=True)
class Width:
    """Channels of layers, before and after a cut. attention, heads: the layer of queries, keys or values whose rows
    they are, and how many heads share them before and after, where torch-pruning was told; keys: the same of the keys
    and values, which several heads may share.
    """

    before: int
    after: int
    attention: nn.Module | None = None
    heads: tuple[int, int] = (0, 0)
    keys: tuple[int, int] = (0, 0)

    @property
    def shared(self) -> tuple[int, int]:
        """How many heads share one key, before and after; (0, 0) if none do."""
        before, after = (many // few if few else 0 for many, few in zip(self.heads, self.keys, strict=True))
        return (before, after) if before > 1 else (0, 0)


@dataclass(frozen=True)
class Option:
    """A number that a module holds may have become another one.

    place: in a tuple or list (None: it is the attribute itself). sure: torch-pruning was told the number of heads that
    says so.
    """

    module: nn.Module
    name: str
    place: int | None
    before: int
    value: int
    sure: bool

    @property
    def is_open(self) -> bool:
        """Has nobody set it since?"""
        value = vars(self.module).get(self.name)
        if self.place is None:
            return value == self.before
        return isinstance(value, (tuple, list)) and len(value) > self.place and value[self.place] == self.before

    def put(self, *, back: bool = False) -> None:
        new: Any = self.before if back else self.value
        if self.place is not None:
            old = vars(self.module)[self.name]
            new = type(old)((*old[: self.place], new, *old[self.place + 1 :]))
        setattr(self.module, self.name, new)


def options_of(values: dict[tuple[nn.Module, str], Any], widths: list[Width]) -> list[Option]:
    """What attributes may have become, each option once."""
    by_module: dict[nn.Module, list[int]] = {}
    for (module, _), value in values.items():
        if type(value) is int:
            by_module.setdefault(module, []).append(value)
    found: dict[tuple, Option] = {}
    for (module, name), value in values.items():
        for number, place in _entries(value):
            for new, sure in _becomes(name, number, widths, by_module.get(module, []), module):
                key = module, name, place, new
                if sure or key not in found:
                    found[key] = Option(*key[:3], number, new, sure)
    return list(found.values())


def _becomes(
    name: str, number: int, widths: list[Width], beside: list[int], module: nn.Module
) -> Iterator[tuple[int, bool]]:
    """(what a number may have become, whether a known number of heads says so). beside: the module's other numbers."""
    gone: set[int] = set()  # numbers of heads that are no more: no width is that of one of so many
    for width in widths:
        if width.attention is not None and width.heads[0] != width.heads[1] and _holds(module, width.attention):
            gone |= {width.heads[0], _PACKED * width.heads[0]}
    for width in widths:
        if width.attention is not None and _holds(module, width.attention):
            old, new = width.heads
            is_width = any(part in name for part in ("dim", "size", "width", "channels"))
            if number == old != new and name not in _SHARING and not is_width:
                yield new, "head" in name or name in _HEADS
            before, after = width.shared
            if name in _SHARING and number == before != after:
                yield after, True
            for parts in (old, _PACKED * old) if "heads" not in name else ():
                after = parts // old * new
                if number * parts == width.before and after and width.after % after == 0:
                    yield width.after // after, True
        if number == width.before:
            yield width.after, False
        elif width.before % number == 0:
            parts = width.before // number
            shared = parts == _PACKED or parts in beside or (parts % _PACKED == 0 and parts // _PACKED in beside)
            if shared and parts not in gone and width.after % parts == 0:
                yield width.after // parts, False


def _holds(module: nn.Module, layer: nn.Module) -> bool:
    """Is it one of the module's layers, or a part of one?"""
    parted = (child for child in module.children() if isinstance(child, (JoinedLinear, PartedAttention)))
    return layer in module.children() or any(layer is part for child in parted for part in child.parts)


def is_size(name: str, value: Any) -> bool:
    """May this be an attribute that holds widths: a whole number above 1, or a tuple or list with one?"""
    return (
        not name.startswith("_") and _POSITIONS.isdisjoint(name.split("_")) and next(_entries(value), None) is not None
    )


def _entries(value: Any) -> Iterator[tuple[int, int | None]]:
    """(number, place in a tuple or list) for all that may be widths."""
    if type(value) is int and value > 1:
        yield value, None
    elif isinstance(value, (tuple, list)) and type(value) in (tuple, list, torch.Size):
        numbers = enumerate(value) if all(type(one) is int for one in value) else ()
        yield from ((one, place) for place, one in numbers if one > 1)


def put(options: Sequence[Option], *, back: bool = False) -> None:
    for option in options:
        option.put(back=back)


def one_each(options: Sequence[Option]) -> list[Option]:
    """One option for every number."""
    found: dict[tuple, Option] = {}
    for option in options:
        found.setdefault((option.module, option.name, option.place), option)
    return list(found.values())
