"""Which channels of which layers go with each channel of a group's root: torch-pruning's walk, with index tensors.

Torch-Pruning maps indices one Python object at a time. Its own mappings are offsets and strides, which are done here on
whole tensors; one that is not known is asked through its objects.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor
from torch_pruning import ops
from torch_pruning._helpers import _HybridIndex
from torch_pruning.dependency import index_mapping as maps

_NO_ROOT = -1
"""What torch-pruning calls root index None: the channel goes with several roots that it cannot name."""


@dataclass(frozen=True, eq=False)
class Item:
    """One layer, and one way of cutting it.

    local: [n, m] int64, its channels by root channel, increasing, padded with -1. tied: root channels that share one of
    its channels. is_whole: every channel's root is known.
    """

    owner: Any
    handler: Callable
    local: Tensor
    tied: Tensor
    is_whole: bool


def reach(graph: tp.DependencyGraph, root: Any, handler: Callable, n: int) -> list[Item]:
    """Every layer of the group of `root`, whose n channels `handler` cuts, in the order in which they are reached.

    The same walk as `DependencyGraph.get_pruning_group`, but every (local, root) pair is kept: torch-pruning's merged
    items remember only the first root of a local channel, which hides the ties of shared consumers.
    """
    maps.update_index_mapping(graph)
    if isinstance(root, ops.TORCH_CONV) and root.groups == root.out_channels and root.out_channels > 1:
        handler = tp.prune_depthwise_conv_out_channels
    numbers = torch.arange(n)
    start = (numbers, numbers)
    known: dict[tuple[Any, Callable], _Known] = {(root, handler): _Known(n, start)}
    stack = [(graph.module2node[root], handler, start)]
    while stack:
        node, fn, pairs = stack.pop()
        for dep in node.dependencies:
            if not dep.is_triggered_by(fn):
                continue
            mapped = pairs
            for mapping in dep.index_mapping:
                if mapping is not None:
                    mapped = _map(mapping, *mapped)
            key = (dep.target.module, dep.handler)
            seen = known.setdefault(key, _Known(n))
            fresh = seen.add(mapped)
            if len(fresh[0]):
                stack.append((dep.target, dep.handler, fresh))
    ignored = {id(parameter) for parameter in graph.ignored_params}
    return [
        Item(owner, fn, *seen.table())
        for (owner, fn), seen in known.items()
        if len(seen.codes) and id(owner) not in ignored
    ]


class _Known:
    """The (local, root) pairs that an item has received, as sorted codes."""

    def __init__(self, n: int, pairs: tuple[Tensor, Tensor] | None = None) -> None:
        self._n = n
        self.codes = torch.empty(0, dtype=torch.long) if pairs is None else self._code(*pairs).unique()

    def _code(self, local: Tensor, root: Tensor) -> Tensor:
        return local * (self._n + 1) + root + 1

    def add(self, pairs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The pairs that are new."""
        codes = self._code(*pairs)
        if len(self.codes) == 0:
            self.codes = codes.unique()
            return pairs
        at = torch.searchsorted(self.codes, codes).clamp(max=len(self.codes) - 1)
        fresh = self.codes[at] != codes
        if not fresh.any():
            return pairs[0][:0], pairs[1][:0]
        self.codes = torch.cat([self.codes, codes[fresh]]).unique()
        return pairs[0][fresh], pairs[1][fresh]

    def table(self) -> tuple[Tensor, Tensor, bool]:
        """(local [n, m], tied roots, are all roots known?)"""
        local, root = self.codes // (self._n + 1), self.codes % (self._n + 1) - 1
        there = root != _NO_ROOT
        whole = bool(there.all())
        local, root = local[there], root[there]
        again = local[1:] == local[:-1]  # codes are sorted by local
        tied = torch.cat([root[1:][again], root[:-1][again]]).unique()
        order = root.sort(stable=True).indices  # increasing local channels within each root
        local, root = local[order], root[order]
        counts = torch.bincount(root, minlength=self._n)
        table = torch.full((self._n, max(1, int(counts.max()))), -1)
        column = torch.arange(len(root)) - (counts.cumsum(0) - counts)[root]
        table[root, column] = local
        return table, tied, whole


def _map(mapping: Any, local: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """What one of torch-pruning's index mappings makes of (local, root) pairs."""
    vectorised = _MAPS.get(type(mapping))
    if vectorised is not None:
        return vectorised(mapping, local, root)
    given = [
        _HybridIndex(idx=i, root_idx=None if r < 0 else r) for i, r in zip(local.tolist(), root.tolist(), strict=True)
    ]
    found = dict.fromkeys(mapping(given))
    pairs = [(index.idx, _NO_ROOT if index.root_idx is None else index.root_idx) for index in found]
    return torch.tensor([i for i, _ in pairs], dtype=torch.long), torch.tensor([r for _, r in pairs], dtype=torch.long)


def _flatten(mapping: Any, local: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    stride = mapping._stride
    if mapping.reverse:
        pairs = torch.stack([local // stride, root], dim=1).unique(dim=0)
        return pairs[:, 0], pairs[:, 1]
    return (local[:, None] * stride + torch.arange(stride)).flatten(), root.repeat_interleave(stride)


def _offset(mapping: Any, local: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """Into a part of the channels (a split, or backwards through a concat), or out of it."""
    first, last = mapping.offset[0], mapping.offset[1]
    if mapping.reverse == isinstance(mapping, maps._SplitIndexMapping):
        return local + first, root
    inside = (local >= first) & (local < last)
    return local[inside] - first, root[inside]


def _slice(mapping: Any, local: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    if mapping.reverse:
        return local * mapping.step + mapping.start, root
    inside = (local >= mapping.start) & (local < mapping.end) & ((local - mapping.start) % mapping.step == 0)
    return torch.div(local[inside] - mapping.start, mapping.step, rounding_mode="floor"), root[inside]


_MAPS: dict[type, Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    maps._FlattenIndexMapping: _flatten,
    maps._ConcatIndexMapping: _offset,
    maps._SplitIndexMapping: _offset,
    maps._SliceIndexMapping: _slice,
}
