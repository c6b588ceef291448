"""A torch-pruning group as a table of slots, and which of its channels may be mixed.

Torch-Pruning describes a group as (dependency, indices) pairs. Here every item that has channels of its own becomes a
`Slot`: which layer, what its channels do there (`groups.kinds`), and for each root channel the local indices it
occupies (several behind a flatten, none where a concat covers only part of the group). Fusion, cost and scoring are
then loops over slots.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch_pruning import ops

from intrafusion.groups.kinds.base import Owner, Reached, Slot, kind_of
from intrafusion.groups.reach import channels_of, reach


@dataclass(frozen=True, eq=False)
class GroupTable:
    """A whole group in root coordinates.

    n: number of root channels; classes: [n] int64, root channels with different labels never mix.
    unsupported: why this group can only be cut, not fused ('' if it can be fused). immovable: why its channels cannot
    even change places ('' if they can). reach: by (layer, torch-pruning's handler), [n, m] the local channels of each
    root channel as in `Slot`, of every item of the group, those without a slot too.
    """

    name: str
    n: int
    slots: tuple[Slot, ...]
    classes: Tensor
    unsupported: str = ""
    immovable: str = ""
    reach: dict[tuple[Owner, Callable], Tensor] = field(default_factory=dict, repr=False)

    def coupled(self, owner: Owner, handler: Callable, roots: Tensor) -> set[int] | None:
        """The channels of a layer that go with `roots` (numbers, or a mask [n]); None if it is not reached so."""
        local = self.reach.get((owner, handler))
        return None if local is None else set(local[roots].flatten().tolist()) - {-1}

    def modules(self) -> list[nn.Module]:
        """Every module whose tensors a fusion or a cut of this group may change."""
        found: dict[nn.Module, None] = {}
        for owner, _ in self.reach:
            if isinstance(owner, nn.Module):
                found.update(dict.fromkeys(owner.modules()))
        found.update(dict.fromkeys(slot.partner for slot in self.slots if slot.partner is not None))
        return list(found)


def tabulate(graph: tp.DependencyGraph, root: Owner, handler: Callable, channel_groups: int = 1) -> GroupTable:
    """Read the group that contains `root` (through `handler`) off the dependency graph, at its present width.

    channel_groups: torch-pruning's own number of chunks of the root (heads, grouped convolutions).
    Returns a table even if the group cannot be fused; see `GroupTable.unsupported`.
    """
    name = module_name(graph, root)
    n = channels_of(graph, root, handler)
    items = reach(graph, root, handler, n)
    layers = [layer for layer in graph._module2name if isinstance(layer, nn.Module)]
    uses = Counter(id(p) for layer in layers for p in layer._parameters.values() if p is not None)
    slots, problems = [], []
    for item in items:
        made = _slot(graph, item.owner, item.handler, item.local, uses) if item.is_whole else _shared(graph, item.owner)
        if isinstance(made, str):
            problems.append(made)
        elif made is not None:
            slots.append(made)
    rigid = [f"{slot.name!r} {slot.kind.rigid}" for slot in slots if slot.kind.rigid]
    tied = torch.cat([item.tied for item in items]).unique()
    classes = _coupling_classes(slots, tied, n, channel_groups)
    local = {(item.owner, item.handler): item.local for item in items}
    return GroupTable(name, n, tuple(slots), classes, _listed([*problems, *rigid]), _listed(problems), local)


def ties(table: GroupTable) -> Tensor | None:
    """[n] labels: root channels that reach a common channel of some layer, and so can only go together, have the same.

    None if there are no such channels.
    """
    edges = []
    for local in table.reach.values():
        width = int(local.max()) + 1
        roots, columns = (local >= 0).nonzero(as_tuple=True)
        channels = local[roots, columns]
        if len(channels) > len(channels.unique()):
            edges.append((roots, channels, width))
    if not edges:
        return None
    sizes = [table.n, *(width for _, _, width in edges)]
    starts = np.cumsum(sizes)
    rows = torch.cat([roots for roots, _, _ in edges]).numpy()
    columns = np.concatenate([start + ids.numpy() for start, (_, ids, _) in zip(starts, edges, strict=False)])
    links = coo_array((np.ones(len(rows)), (rows, columns)), shape=(starts[-1], starts[-1]))
    return torch.from_numpy(connected_components(links, directed=False)[1][: table.n].astype(np.int64))


def module_name(graph: tp.DependencyGraph, owner: Owner) -> str:
    """The dotted name of a layer or free parameter of the graph."""
    if isinstance(owner, nn.Parameter):
        return graph._param_to_name.get(owner, "parameter")
    return graph._module2name.get(owner, type(owner).__name__)


def batchnorm_of(graph: tp.DependencyGraph, layer: Owner) -> Any:
    """The batch-norm that reads `layer` and nothing else, if nothing else reads `layer`; it can be folded into it."""
    node, kind = graph.module2node.get(layer), kind_of(layer)
    if node is None or kind is None or not kind.can_fold(layer):
        return None
    readers = {reader.module for reader in node.outputs}
    if len(readers) != 1:
        return None
    (bn,) = readers
    if not isinstance(bn, ops.TORCH_BATCHNORM) or bn.running_mean is None:
        return None
    sources = {source.module for source in graph.module2node[bn].inputs}
    return bn if sources == {layer} else None


def foldable_pairs(graph: tp.DependencyGraph, group: Any) -> list[tuple[nn.Module, nn.Module, int]]:
    """``(layer, batch-norm that can be folded into it, axis of the layer's output channels)`` of a group."""
    layers = dict.fromkeys(item[0].target.module for item in group)
    found = [(layer, batchnorm_of(graph, layer), kind_of(layer)) for layer in layers]
    return [(layer, bn, kind.output_axis(layer)) for layer, bn, kind in found if bn is not None and kind is not None]


def _slot(
    graph: tp.DependencyGraph, owner: Owner, fn: Callable, local: Tensor, uses: Counter[int]
) -> Slot | str | None:
    """The slot of one item, or why the group cannot be fused; None if the layer has no part in it."""
    name, node, kind = module_name(graph, owner), graph.module2node[owner], kind_of(owner)
    customised = type(owner) in graph.CUSTOMIZED_PRUNERS or node.type == ops.OPTYPE.CUSTOMIZED
    ours = kind is not None and kind.pruner is not None
    if customised and not ours and _has_tensors(owner):
        return f"{name!r} has a customised pruner, which can cut but not fuse"
    if kind is None or (ours and not customised):
        called = f"{name!r} ({type(owner).__name__})"
        return f"{called} is a layer that fusion does not understand" if _has_tensors(owner) else None
    pruner: Any = graph.get_pruner_of_module(owner)
    tied = not isinstance(owner, nn.Parameter) and uses[id(getattr(owner, "weight", None))] > 1
    outputs = fn == pruner.prune_out_channels
    return kind.slot(Reached(name, owner, node, outputs, local, tied, batchnorm_of(graph, owner)))


def _shared(graph: tp.DependencyGraph, owner: Owner) -> str | None:
    if not _has_tensors(owner):
        return None
    return f"{module_name(graph, owner)!r} shares channels between heads (grouped-query attention)"


def _has_tensors(owner: Owner) -> bool:
    if isinstance(owner, nn.Parameter):
        return True
    return next(owner.parameters(), None) is not None or next(owner.buffers(), None) is not None


def _listed(reasons: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(reasons))


def _coupling_classes(slots: list[Slot], tied: Tensor, n: int, channel_groups: int) -> Tensor:
    """[n] labels: same layers, same number of copies, same chunk everywhere; a tied channel is alone."""
    signature = [torch.arange(n) // max(1, n // max(1, channel_groups))]
    for slot in slots:
        signature.append((slot.local >= 0).sum(dim=1))
        if slot.chunks > 1:
            chunk = torch.div(slot.local, slot.size // slot.chunks, rounding_mode="floor")
            signature.extend(torch.where(slot.local >= 0, chunk, -1).unbind(dim=1))
    alone = torch.zeros(n, dtype=torch.long)
    alone[tied] = torch.arange(1, len(tied) + 1)
    return _labels(torch.stack([*signature, alone], dim=1))


def _labels(rows: Tensor) -> Tensor:
    """[n] the number of each row's first equal in sorted order."""
    varying = rows[:, (rows != rows[:1]).any(dim=0)]
    if varying.shape[1] == 0:
        return torch.zeros(len(rows), dtype=torch.long)
    return varying.unique(dim=0, return_inverse=True)[1]
