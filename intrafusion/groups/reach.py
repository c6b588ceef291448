"""Which channels of which layers go with each channel of a group's root: torch-pruning's walk, with index tensors.

Torch-Pruning maps indices one Python object at a time. Its own mappings are offsets and strides, which are done here on
whole tensors; one that is not known is asked through its objects.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor
from torch_pruning import ops
from torch_pruning._helpers import _HybridIndex
from torch_pruning.dependency import index_mapping as maps

_NO_ROOT = -1
"""What torch-pruning calls root index None: the channel goes with several roots that it cannot name."""
_ROUNDS, _PAIRS, _TIED, _MOST = 50, 2**16, 64, 2**24
"""A layer whose channels are counted on beyond its last one so often, or so many at once, is counted on for ever; and
so is, as far as anyone can wait, one with so many pairs whose every channel goes with so many of the root's."""


class Endless(ValueError):
    """Torch-Pruning's indices grow at every turn of a circle, and its own walk would not end, or not in a day.

    layer: where they grow.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__("torch-pruning counts a layer's channels on without end")
        self.layer = layer


def channels_of(graph: tp.DependencyGraph, owner: Any, handler: Callable) -> int:
    """Number of channels that `handler` would prune from `owner`."""
    outputs = graph.is_out_channel_pruning_fn(handler)
    n = graph.get_out_channels(owner) if outputs else graph.get_in_channels(owner)
    return n or 0


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


def reach(graph: tp.DependencyGraph, root: Any, handler: Callable, n: int, *, mapped: bool = False) -> list[Item]:
    """Every layer of the group of `root`, whose n channels `handler` cuts, in the order in which they are reached.

    mapped: are the graph's index maps of the present widths already? (To make them is most of the work.)

    The same walk as `DependencyGraph.get_pruning_group`, but every (local, root) pair is kept: torch-pruning's merged
    items remember only the first root of a local channel, which hides the ties of shared consumers.
    Raises Endless where that walk does not end.
    """
    if not mapped:
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
            there = pairs
            for mapping in dep.index_mapping:
                if mapping is not None:
                    there = _map(mapping, *there)
            key = (dep.target.module, dep.handler)
            seen = known.setdefault(key, _Known(n))
            fresh = seen.add(there)
            if len(fresh[0]):
                if seen.is_endless(partial(_limit, graph, *key)):
                    raise Endless(dep.target.module)
                stack.append((dep.target, dep.handler, fresh))
    ignored = {id(parameter) for parameter in graph.ignored_params}
    return [
        Item(owner, fn, *seen.table())
        for (owner, fn), seen in known.items()
        if len(seen.codes) and id(owner) not in ignored
    ]


def may_be_endless(graph: tp.DependencyGraph) -> bool:
    """Is there anything in a graph that could make indices grow: something other than concats?"""
    maps.update_index_mapping(graph)
    mappings = {m for node in graph.module2node.values() for dep in node.dependencies for m in dep.index_mapping}
    return not all(m is None or isinstance(m, maps._ConcatIndexMapping) for m in mappings)


class _Known:
    """The (local, root) pairs that an item has received, as sorted codes."""

    def __init__(self, n: int, pairs: tuple[Tensor, Tensor] | None = None) -> None:
        self._n = n
        self._highest, self._rounds = 0, 0
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

    def is_endless(self, limit: Callable[[], int]) -> bool:
        """Have pairs been added again and again, or very many at once, that lie beyond all channels that there are?

        Or is everything tied to everything, which torch-pruning would list pair by pair?

        limit: how many channels there are.
        """
        highest = int(self.codes[-1]) // (self._n + 1)
        if highest > self._highest:
            self._highest = highest
            self._rounds += 1
        if self._rounds <= _ROUNDS and len(self.codes) <= _PAIRS:
            return False
        channels = limit()
        return highest >= channels or len(self.codes) > max(_PAIRS, _TIED * channels)

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


def _limit(graph: tp.DependencyGraph, owner: Any, handler: Callable) -> int:
    """Number of channels of a layer; for what stands for an operation and has none, those of the widest layer."""
    try:
        own = channels_of(graph, owner, handler)
    except (AttributeError, TypeError):  # a pruner of the user's that does not say
        own = 0
    layers = [layer for layer in graph.module2node if isinstance(layer, (ops.TORCH_LINEAR, ops.TORCH_CONV))]
    return own or max((max(layer.weight.shape[:2]) for layer in layers), default=0)


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
    if len(local) * stride > _MOST and not mapping.reverse:
        raise Endless(None)
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
