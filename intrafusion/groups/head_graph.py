"""What a dependency graph has to be told of attention heads.

Where several heads share one key and value (grouped queries), a shared channel goes when all of its heads go.

Torch-Pruning drops the keys and values with any of their heads, and takes that back in one place only, where it
compares numbers of heads that may have become equal by then. Here its graph says what is true, whoever asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch_pruning as tp
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

    Blocks whose keys are shared, and layers that make queries, keys and values at once: torch-pruning does not map the
    chunks of their outputs where positions are added anywhere before.
    """
    shared = [block for block in blocks if block.shared > 1]
    if shared:
        graph.__class__ = SharingGraph
        graph.blocks = shared  # type: ignore[attr-defined]
    for block in blocks:
        if block.is_packed and block.queries in graph.module2node:
            nodes = list(graph.module2node[block.queries].outputs)
            while nodes:
                node = nodes.pop()
                if node.type == ops.OPTYPE.SPLIT:
                    node.enable_index_mapping = True
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
    dim = block.keys.out_features // block.key_heads
    without = gone.reshape(block.key_heads, -1, dim).all(dim=1).flatten().nonzero().flatten().tolist()
    for number, item in enumerate(group.items):
        if item.dep.target.module in (block.keys, block.values):
            group[number] = GroupItem(item.dep, without)
            group[number].root_idxs = without


def _cuts(item: Any, block: Heads) -> bool:
    """Are these channels of the block's queries, or those that its output reads?"""
    layer, name = item.dep.target.module, getattr(item.dep.handler, "__name__", "")
    return (layer is block.queries and "out" in name) or (layer is block.output and "in_ch" in name)
