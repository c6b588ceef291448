"""Attention heads while a pruner cuts a network: which must stay, and how many there are by now."""

from __future__ import annotations

from typing import Any

from torch_pruning.dependency.group import Group

from intrafusion.groups.head_graph import know_heads
from intrafusion.groups.heads import Heads


def leave_(pruner: Any) -> None:
    """Cut no heads, and no channels inside heads, that something else tells apart."""
    if not all(block.dims_move for block in pruner.heads):
        pruner.prune_head_dims = False
    never = [0.0] * (pruner.iterative_steps + 1)
    for block in pruner.heads:
        if not block.heads_move:
            pruner.head_pruning_ratio_dict.update(dict.fromkeys(block.projections, never))


def present(pruner: Any) -> dict[str, Heads]:
    """The blocks as they are now, by name; torch-pruning's `num_heads` says how many heads are left."""
    counts = pruner.num_heads
    return {
        block.name: block.now(counts.get(block.queries, block.heads), counts.get(block.keys, block.key_heads))
        for block in pruner.heads
    }


def whole_heads(pruner: Any, group: Group) -> int:
    """How many heads a full group is, of which only whole ones may go; 0 if it is no such group."""
    found, layers = pruner._is_atten_group(group)
    if not found or not pruner.prune_num_heads or pruner.prune_head_dims:
        return 0
    heads = max(pruner.num_heads[layer] for layer in layers)
    return heads if pruner.get_target_head_pruning_ratio(layers[0]) > 0 and len(group[0].idxs) % heads == 0 else 0


def numbers(pruner: Any) -> list[tuple[int, int, int]]:
    """(heads, heads of keys and values, width of a head) of every block."""
    return [(block.heads, block.key_heads, block.dim) for block in present(pruner).values()]


def tell_(pruner: Any) -> None:
    """Let the pruner's graph know the blocks as they are now."""
    know_heads(pruner.DG, list(present(pruner).values()))


def count_again_(pruner: Any, before: dict, cut: set) -> None:
    """Torch-Pruning counts heads as gone that it could not cut in the end.

    before: `num_heads`. cut: layers of which it cuts what they read.
    """
    for block in pruner.heads:
        if block.output not in cut:
            left = {layer: before[layer] for layer in block.projections if layer in before}
            pruner.num_heads.update(left)
            pruner.out_channel_groups.update(left)


def count_(pruner: Any, group: Group) -> None:
    """What torch-pruning does to `num_heads` where it chooses whole heads, for a group that it did not choose."""
    for block in present(pruner).values():
        cut = next((item.idxs for item in group if item.dep.target.module is block.output), None)
        if cut is None:
            continue
        gone = {i // block.dim for i in cut}
        if len(gone) * block.dim == len(cut):
            for layer in block.projections if block.shared == 1 else (block.queries,):
                pruner.num_heads[layer] = pruner.out_channel_groups[layer] = block.heads - len(gone)
