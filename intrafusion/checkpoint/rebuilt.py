"""Layers that a pruner turns into others in place; the network that a file is loaded into gets the same ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from intrafusion.checkpoint.inventory import walk
from intrafusion.checkpoint.manifest import Manifest
from intrafusion.groups.conv1d import TransposedLinear, as_linear_
from intrafusion.groups.joined import JOINED, part_
from intrafusion.groups.multihead import PartedAttention, part_attention_
from intrafusion.groups.packed import candidates, multiheads
from intrafusion.groups.snapshot import rebuilding


def rebuild_(model: nn.Module, manifest: Manifest) -> Callable[[], None]:
    """Turn layers into what they are in the file, where they can be that; what it returns takes that back."""
    entries = ((module, manifest.modules.get(name)) for name, module in walk(model))
    wanted = {module: entry.type for module, entry in entries if entry and entry.type != type(module).__name__}
    backs = [rebuilding(module) for module in wanted]
    for module, kind in wanted.items():
        if kind == TransposedLinear.__name__:
            as_linear_(module)
    kinds = {kind.__name__: kind for kind in JOINED}
    if kinds.keys() & set(wanted.values()):
        for packed in candidates(model):
            layer: Any = model.get_submodule(packed.name)
            if kind := kinds.get(wanted.get(layer, "")):
                part_(layer, packed.queries, packed.key_heads, packed.head_dim, kind)

    if PartedAttention.__name__ in wanted.values():
        for packed in multiheads(model):
            layer = model.get_submodule(packed.name)
            if wanted.get(layer) == PartedAttention.__name__:
                part_attention_(layer)

    def undo() -> None:
        for back in backs:
            back()

    return undo
