"""The source of a network while it is written: what `__init__` makes and what `forward` does, line by line."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

_HEAD = """import torch
from torch import nn
from torch.nn import functional as F

from tests.sweep.layers import EqualisedLinear, PaddedConv2d, StandardisedConv2d


class Network(nn.Module):
    def __init__(self):
        super().__init__()
"""


@dataclass(frozen=True)
class Value:
    """A variable of `forward`: its name, its channels, and the length of each of its spatial axes."""

    name: str
    channels: int
    size: int = 0


@dataclass
class Draft:
    """A network being written.

    dim: number of spatial axes; 0 where channels are the last axis. tokens: with dim 0, is there an axis before it?
    heads: the layers that give the outputs.
    """

    random: random.Random
    dim: int
    tokens: bool = False
    heads: list[str] = field(default_factory=list)
    _init: list[str] = field(default_factory=list)
    _forward: list[str] = field(default_factory=list)
    _names: dict[str, int] = field(default_factory=dict)

    def chance(self, probability: float) -> bool:
        """True this often."""
        return self.random.random() < probability

    def width(self) -> int:
        """A number of channels; even, so that it can consist of pairs."""
        return self.random.choice([4, 6, 8, 8, 12, 16])

    def layer(self, kind: str, made_by: str) -> str:
        """A new attribute of the network; returns how `forward` calls it."""
        self._names[kind] = number = self._names.get(kind, 0) + 1
        self._init.append(f"self.{kind}{number} = {made_by}")
        return f"self.{kind}{number}"

    def value(self, expression: str, channels: int, size: int = 0) -> Value:
        """A new variable of `forward`."""
        self._names["x"] = number = self._names.get("x", 0) + 1
        self._forward.append(f"x{number} = {expression}")
        return Value(f"x{number}", channels, size)

    def like(self, x: Value, expression: str) -> Value:
        """A new variable of the same shape."""
        return self.value(expression, x.channels, x.size)

    @property
    def axes(self) -> tuple[int, ...]:
        """The spatial axes."""
        return tuple(range(2, 2 + self.dim))

    def source(self, returned: str) -> str:
        """The network as Python code."""
        lines = [f"        {line}\n" for line in self._init]
        lines += ["\n", "    def forward(self, x):\n"]
        lines += [f"        {line}\n" for line in [*self._forward, f"return {returned}"]]
        return _HEAD + "".join(lines)


def call(name: str, *arguments: object, **keywords: object) -> str:
    """A call as code; keywords whose value is None are left out."""
    given = [str(argument) for argument in arguments]
    given += [f"{key}={value!r}" for key, value in keywords.items() if value is not None]
    return f"{name}({', '.join(given)})"


def pick(draft: Draft, weighted: Sequence[tuple[float, str]]) -> str:
    """One of the names, as often as its weight says."""
    return draft.random.choices([name for _, name in weighted], [weight for weight, _ in weighted])[0]
