"""Apply a pair (R, S) to a group: every slot in place at full size, then torch-pruning cuts.

Only the kept places are written, and of those only the ones that a merge changes, so that a selection leaves every
tensor bit for bit as torch-pruning would cut it. Gradients are not written here: `history.lineage` carries them.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, Protocol

import torch_pruning as tp
from torch_pruning import ops
from torch_pruning.dependency.group import Group

from intrafusion.groups.draft import Draft, Mix
from intrafusion.groups.kinds.base import Slot
from intrafusion.groups.kinds.filters import filters_of
from intrafusion.groups.snapshot import frozen_parameters
from intrafusion.groups.table import GroupTable
from intrafusion.ot import Pair


def apply_pair(table: GroupTable, pair: Pair) -> None:
    """Write the fused channels of `pair` into the kept places of the group's tensors.

    pair.rows: [k, n], pair.columns: [n, k]. Every value is computed in float64 before any is written.
    Raises ValueError if a new value is not finite; the network is unchanged then.
    """
    draft = Draft()
    rows, columns = Mix.of(pair.rows, pair.kept), Mix.of(pair.columns.T, pair.kept)
    for slot in table.slots:
        if len(rows.places) or len(columns.places):
            slot.kind.write(draft, slot, rows, columns, table.slots)
    carrier = shift_carrier(table)
    if pair.shift is not None and carrier is not None:
        filters_of(carrier.owner).add_shift(draft, carrier, pair.kept, pair.shift)
    draft.commit()


class Rewrite(Protocol):
    """What is written into a group's layers besides its pair, at full size, and into other networks alike.

    Written out in tensors: a network's own method object is not held by it.
    """

    def before_(self, graph: tp.DependencyGraph, table: GroupTable, change: Any = None) -> None:
        """Before the pair is applied. change: a `history.lineage.Change`, told what this does to gradients."""

    def after_(self, graph: tp.DependencyGraph, table: GroupTable) -> None:
        """When the pair has been applied, before the cut."""


def write_(
    graph: tp.DependencyGraph, table: GroupTable, pair: Pair | None, rewrite: Rewrite | None, change: Any = None
) -> None:
    """Write all that is to become of a group, before it is cut; change: as in `Rewrite`, told of both."""
    if rewrite is not None:
        rewrite.before_(graph, table, change)
    if pair is not None:
        apply_pair(table, pair)
        if change is not None:
            change.mixed(table, pair)
    if rewrite is not None:
        rewrite.after_(graph, table)


def cut_(graph: tp.DependencyGraph, group: Group, table: GroupTable, *, record_history: bool = False) -> None:
    """Torch-Pruning cuts; what it leaves wrong is put right.

    It makes a cut parameter trainable, and forgets where the parts of what is split begin now (it notes that on
    another object), so that a next cut of it would miss.
    """
    frozen = frozen_parameters(table.modules())
    Group.prune(group, record_history=record_history)
    for module, name in frozen:
        module.get_parameter(name).requires_grad_(False)
    for node in graph.module2node.values():
        sizes = getattr(node.module, "split_sizes", None)
        if node.type == ops.OPTYPE.SPLIT and sizes and None not in sizes:
            node.module.offsets = [0, *accumulate(sizes)]


def shift_carrier(table: GroupTable) -> Slot | None:
    """The producer that a pair's shift is added to (one only, or a residual stream would get it several times)."""
    for slot in table.slots:
        if slot.produces and filters_of(slot.owner).can_shift(slot):
            return slot
    return None
