"""Does the dependency graph describe the network? A permutation of a group's channels must not change the output.

Torch-Pruning 1.6.1 maps the outputs of a `split` in the order in which it meets them walking backwards, which is not
always theirs: it then cuts the wrong channels of the readers, without an error. Permuting channels inside their
coupling classes shows that in one forward pass; it moves entries and computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning import ops

from intrafusion.groups.kinds.base import Place
from intrafusion.groups.places import move
from intrafusion.groups.table import GroupTable
from intrafusion.running import Levelled, evaluating, same_outputs


def inconsistent_groups(
    graph: tp.DependencyGraph, tables: Sequence[GroupTable], forward: Callable[[nn.Module], list[Tensor]]
) -> set[str]:
    """Names of the groups whose channels cannot be permuted without changing the network's output.

    forward: runs the network on the example input and returns its output tensors; called with the network in eval mode.
    The network is put back, bit for bit. One forward pass more if all is well, one per group if not. Noise that the
    network adds to its channels is the same for all of them, see `Levelled`.
    """
    movable = [
        table
        for table in tables
        if not table.unsupported and len(table.classes.unique()) < table.n and not is_output(graph, table)
    ]
    if not movable:
        return set()
    with torch.no_grad(), evaluating(graph.model), Levelled():
        before = forward(graph.model)
        if _unchanged_by(graph, movable, forward, before):
            return set()
        return {table.name for table in movable if not _unchanged_by(graph, [table], forward, before)}


def class_permutation(classes: Tensor, generator: torch.Generator) -> Tensor:
    """[n] a random order of the channels in which each takes the place of one of its own class."""
    order = torch.arange(len(classes))
    for label in classes.unique():
        members = (classes == label).nonzero().flatten()
        order[members] = members[torch.randperm(len(members), generator=generator)]
    return order


@contextmanager
def reordered(*orders: tuple[GroupTable, Tensor]) -> Iterator[None]:
    """For as long as it lasts, channel order[i] of each group is in the place of channel i, in every layer.

    Tensors are replaced, not written into; afterwards every one is the very one that it was before.
    """
    moves: dict[tuple[Any, str], list[tuple[Place, Tensor]]] = {}
    for table, order in orders:
        for place in (place for slot in table.slots for place in slot.places):
            moves.setdefault((place.owner, place.attribute), []).append((place, order))
    saved = []
    try:
        for several in moves.values():
            place, _ = several[0]
            saved.append((place, place.put(move(place.tensor.detach(), *several))))
        yield
    finally:
        for place, old in reversed(saved):
            place.put(old)


def is_output(graph: tp.DependencyGraph, table: GroupTable) -> bool:
    """Are the group's channels those of the network's own output? Their order is the user's."""
    for owner, handler in table.reach:
        node = graph.module2node[owner]
        if not node.outputs and (graph.is_out_channel_pruning_fn(handler) or node.type == ops.OPTYPE.OUTPUT):
            return True
    return False


def _unchanged_by(graph, tables: Sequence[GroupTable], forward: Callable, before: list[Tensor]) -> bool:
    generator = torch.Generator().manual_seed(0)
    with reordered(*((table, class_permutation(table.classes, generator)) for table in tables)):
        after = forward(graph.model)
    return same_outputs(after, before)
