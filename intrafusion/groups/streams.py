"""Residual streams between norms: a stream that is only read through norms may be rotated.

    norm(x) = g · x / rms(x) + b,   read by W:   W (g · x / rms(x)) + W b

With g and b carried over into what reads the norm, an orthogonal map between all that writes the stream and all that
reads it changes nothing (SliceGPT, Ashkboos et al., ICLR 2024): it commutes with the norm. A norm that takes out the
mean (LayerNorm) does so where the map leaves the direction of equal channels alone.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import nn
from torch_pruning import ops

from intrafusion.groups.kinds.base import Slot
from intrafusion.groups.kinds.normalisation import LayerNorm, RMSNorm
from intrafusion.groups.table import GroupTable

_MEETS = tuple(f"{name}backward" for name in ("add", "mul", "sub", "rsub", "div", "cat", "stack", "lerp", "where"))


@dataclass(frozen=True, eq=False)
class Stream:
    """norms: slots of all norms that read the stream, each with the slots of what reads it. centred: do the norms take
    out the mean?
    """

    table: GroupTable
    norms: tuple[tuple[Slot, tuple[Slot, ...]], ...]
    centred: bool


def stream_of(graph: tp.DependencyGraph, table: GroupTable) -> Stream | None:
    """The stream that a group is, if every layer that reads it does so through a norm, and nothing else sees a norm."""
    norms = [slot for slot in table.slots if isinstance(slot.kind, (LayerNorm, RMSNorm))]
    readers = {slot.owner: slot for slot in table.slots if slot.reads}
    makers = [slot for slot in table.slots if slot.makes_channels]
    plain = torch.arange(table.n)[:, None]
    if (
        not norms
        or not readers
        or table.unsupported
        or len(table.classes.unique()) > 1
        or len(norms) + len(readers) + len(makers) != len(table.slots)
        or any(slot.size != table.n or not torch.equal(slot.local, plain) for slot in table.slots)
        or any(not isinstance(slot.owner, nn.Linear) for slot in readers.values())
        or len({slot.kind.centred for slot in norms}) != 1  # type: ignore[attr-defined]
    ):
        return None
    found, seen = [], set()
    for norm in norms:
        read = _behind(graph, norm.owner)
        if read is None or not set(read) <= set(readers):
            return None
        found.append((norm, tuple(readers[layer] for layer in read)))
        seen.update(read)
    if seen != set(readers) or sum(len(some) for _, some in found) != len(readers):
        return None
    if any(keeps_shift(norm, some) and not bool(norm.owner.weight.all()) for norm, some in found):
        return None
    return Stream(table, tuple(found), norms[0].kind.centred)  # type: ignore[attr-defined]


def keeps_shift(norm: Slot, readers: Collection[Slot]) -> bool:
    """Does the shift of a norm stay in it, since not all that read it could take it over as a bias?"""
    shift = getattr(norm.owner, "bias", None)
    return shift is not None and any(slot.owner.bias is None for slot in readers)


def untie_(model: nn.Module, owners: Collection[Any]) -> bool:
    """Give `owners`, layers that share a weight with another layer, one of their own; was there one?

    Torch-Pruning does the same to the layers of a group by cutting them one after the other.
    """
    first: dict[int, Any] = {}
    found = False
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        if id(weight) in first and (module in owners or first[id(weight)] in owners):
            module._parameters["weight"] = nn.Parameter(weight.detach().clone(), weight.requires_grad)
            found = True
        first.setdefault(id(weight), module)
    return found


def _behind(graph: tp.DependencyGraph, norm: nn.Module) -> list[nn.Module] | None:
    """The linear layers that read a norm's output, through operations without tensors; None if anything else does."""
    found: dict[nn.Module, None] = {}
    seen, stack = set(), [graph.module2node[norm]]
    while stack:
        node = stack.pop()
        for after in node.outputs:
            if after in seen:
                continue
            seen.add(after)
            layer = after.module
            held = [layer] if isinstance(layer, nn.Parameter) else list(getattr(layer, "parameters", list)())
            if isinstance(layer, nn.Linear):
                found[layer] = None
            elif after.type == ops.OPTYPE.OUTPUT or held:
                return None
            else:
                name = str(getattr(layer, "_grad_fn", "")).lower()
                if name.startswith(_MEETS):
                    return None  # it meets something else
                stack.append(after)
    return list(found)
