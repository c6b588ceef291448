"""What a dependency graph has to be told of attention heads.

Where several heads share one key and value (grouped queries), a shared channel goes when all of its heads go.

Torch-Pruning drops the keys and values with any of their heads, and takes that back in one place only, where it
compares numbers of heads that may have become equal by then. Here its graph says what is true, whoever asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import nn
from torch_pruning import ops
from torch_pruning._helpers import GroupItem
from torch_pruning.dependency.group import Group

from intrafusion.groups.heads import Heads


class SharingGraph(tp.DependencyGraph):
    """blocks: those whose keys are shared."""

    blocks: Sequence[Heads] = ()

    def get_pruning_group(self, module: Any, pruning_fn: Any, idxs: Any) -> Group:
        """As torch-pruning's; a group that holds only some heads of a shared key leaves the key."""
        group = super().get_pruning_group(module, pruning_fn, idxs)
        for block in self.blocks:
            _leave_shared(group, block)
        return group


def know_heads(graph: tp.DependencyGraph, blocks: Sequence[Heads]) -> None:
    """Let a graph that torch-pruning has made with the blocks opaque know them.

    Again before every step: torch-pruning goes on with the numbers of heads that it traced. Told are blocks whose keys
    are shared, and layers that make queries, keys and values at once: torch-pruning does not map the
    chunks of their outputs where positions are added anywhere before.
    """
    if any(block.shared > 1 for block in blocks):
        graph.__class__ = SharingGraph
    if isinstance(graph, SharingGraph):
        graph.blocks = [block for block in blocks if block.shared > 1]
    for block in blocks:
        for node in _behind(graph, (block.keys, block.values), ops.OPTYPE.EXPAND):
            node.grad_fn = _Shape((1, block.key_heads, 1, 1, block.dim))
        if block.is_packed:
            for node in _behind(graph, (block.queries,), ops.OPTYPE.SPLIT):
                node.enable_index_mapping = True


@dataclass(frozen=True)
class _Shape:
    """Where torch-pruning reads the shape of shared keys from: [batch, keys, 1, tokens, channels] when it traced."""

    _saved_self_sym_sizes: tuple[int, ...]


def _behind(graph: tp.DependencyGraph, layers: Iterable[nn.Module], kind: Any) -> Iterator[Any]:
    """The first nodes of a kind behind some layers, through operations that leave the channels as they are."""
    nodes = [node for layer in layers if layer in graph.module2node for node in graph.module2node[layer].outputs]
    while nodes:
        node = nodes.pop()
        if node.type == kind:
            yield node
        elif node.type in (ops.OPTYPE.ELEMENTWISE, ops.OPTYPE.RESHAPE):
            nodes += node.outputs


def _leave_shared(group: Group, block: Heads) -> None:
    removed = next((item.idxs for item in group if _cuts(item, block)), None)
    if removed is None:
        return
    gone = torch.zeros(block.queries.out_features, dtype=torch.bool)
    gone[list(removed)] = True
    if bool(gone.all()):
        return  # the whole group, as importances are asked for it
    without = gone.reshape(block.key_heads, -1, block.dim).all(dim=1).flatten().nonzero().flatten().tolist()
    for number, item in enumerate(group.items):
        if item.dep.target.module in (block.keys, block.values):
            group[number] = GroupItem(item.dep, without)
            group[number].root_idxs = without


def _cuts(item: Any, block: Heads) -> bool:
    """Are these channels of the block's queries, or those that its output reads?"""
    layer, name = item.dep.target.module, getattr(item.dep.handler, "__name__", "")
    return (layer is block.queries and "out" in name) or (layer is block.output and "in_ch" in name)
