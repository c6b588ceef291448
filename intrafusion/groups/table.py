"""A torch-pruning group as a table of slots, and which of its channels may be mixed.

Torch-Pruning describes a group as (dependency, indices) pairs. Here every parameterised item becomes a `Slot`:
which module, what its channels do there, and for each root channel the local indices it occupies (several behind a
flatten, none where a concat covers only part of the group). Fusion, cost and scoring are then loops over slots.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning import ops

Owner = Any
"""An nn.Module or a free nn.Parameter; torch types a module's attributes too loosely to say more."""


class Role(Enum):
    """What the channels of a group are to a layer, and so which map applies to it."""

    PRODUCER = "output rows"
    CONSUMER = "input columns"
    DEPTHWISE = "depthwise filters"
    BATCHNORM = "batch-norm"
    NORM = "normalisation"
    GAIN = "multiplicative parameter"
    SHIFT = "additive parameter"


@dataclass(frozen=True)
class Slot:
    """One layer's part in a group.

    local: [n, m] int64, the local channels that root channel i occupies here, padded with -1.
    chunks: how many equal chunks the local channels fall into (groups of a convolution or a GroupNorm); channels
    of different chunks never mix. partner: the batch-norm that alone reads this producer's output, if any.
    """

    name: str
    owner: Any
    role: Role
    size: int
    local: Tensor
    chunks: int = 1
    axis: int = 0
    partner: Any = None


@dataclass(frozen=True)
class GroupTable:
    """A whole group in root coordinates.

    n: number of root channels; classes: [n] int64, root channels with different labels never mix.
    unsupported: why this group can only be cut, not fused ('' if it can be fused).
    """

    name: str
    n: int
    slots: tuple[Slot, ...]
    classes: Tensor
    unsupported: str = ""
    removable: dict[tuple[Any, Callable], dict[int, set[int]]] = field(default_factory=dict, repr=False)

    def modules(self) -> list[nn.Module]:
        """Every module whose tensors a fusion or a cut of this group may change."""
        found: dict[nn.Module, None] = {}
        for owner, _ in self.removable:
            if isinstance(owner, nn.Module):
                found.update(dict.fromkeys(owner.modules()))
        found.update(dict.fromkeys(slot.partner for slot in self.slots if slot.partner is not None))
        return list(found)


def tabulate(
    graph: tp.DependencyGraph,
    root: Owner,
    handler: Callable,
    channel_groups: int = 1,
    skip: tuple[type, ...] = (),
) -> GroupTable:
    """Read the group that contains `root` (through `handler`) off the dependency graph, at its present width.

    channel_groups: torch-pruning's own number of chunks of the root (heads, grouped convolutions). skip: kinds of
    layers that the caller sees to; they get no slot.
    Returns a table even if the group cannot be fused; see `GroupTable.unsupported`.
    """
    name = module_name(graph, root)
    n = channels_of(graph, root, handler)
    pairs = _walk(graph, root, handler, n)
    slots, problems = [], []
    for (owner, fn), reached in pairs.items():
        if not _has_parameters(owner) or isinstance(owner, skip):
            continue
        slot, problem = _slot(graph, owner, fn, reached, n)
        if problem:
            problems.append(problem)
        elif slot is not None:
            slots.append(slot)
    tied = _tied_channels(pairs.values(), n)
    classes = _coupling_classes(slots, tied, n, channel_groups)
    removable = {key: _by_root(reached) for key, reached in pairs.items()}
    return GroupTable(name, n, tuple(slots), classes, "; ".join(dict.fromkeys(problems)), removable)


def module_name(graph: tp.DependencyGraph, owner: Owner) -> str:
    """The dotted name of a layer or free parameter of the graph."""
    if isinstance(owner, nn.Parameter):
        return graph._param_to_name.get(owner, "parameter")
    return graph._module2name.get(owner, type(owner).__name__)


def channels_of(graph: tp.DependencyGraph, owner: Owner, handler: Callable) -> int:
    """Number of channels that `handler` would prune from `owner`."""
    outputs = graph.is_out_channel_pruning_fn(handler)
    n = graph.get_out_channels(owner) if outputs else graph.get_in_channels(owner)
    return n or 0


def batchnorm_of(graph: tp.DependencyGraph, layer: Owner) -> Any:
    """The batch-norm that reads `layer` and nothing else, if nothing else reads `layer`; it can be folded into it."""
    node = graph.module2node.get(layer)
    if node is None or not isinstance(layer, (ops.TORCH_CONV, nn.Linear)) or _is_grouped_transposed(layer):
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
    pairs = [(layer, batchnorm_of(graph, layer)) for layer in layers]
    return [(layer, bn, int(getattr(layer, "transposed", False))) for layer, bn in pairs if bn is not None]


def _walk(graph: tp.DependencyGraph, root: Owner, handler: Callable, n: int) -> dict:
    """All (local, root) index pairs that each (layer, handler) of the group receives.

    The same walk as `DependencyGraph.get_pruning_group`, but every pair is kept: torch-pruning's merged items
    remember only the first root of a local channel, which hides the ties of shared consumers.
    """
    from torch_pruning._helpers import _HybridIndex
    from torch_pruning.dependency import index_mapping

    index_mapping.update_index_mapping(graph)
    if isinstance(root, ops.TORCH_CONV) and root.groups == root.out_channels and root.out_channels > 1:
        handler = tp.prune_depthwise_conv_out_channels
    start = [_HybridIndex(idx=i, root_idx=i) for i in range(n)]
    pairs: dict[tuple[Owner, Callable], set] = defaultdict(set)
    pairs[root, handler].update(start)
    stack = [(graph.module2node[root], handler, start)]
    while stack:
        node, fn, idxs = stack.pop()
        for dep in node.dependencies:
            if not dep.is_triggered_by(fn):
                continue
            mapped = idxs
            for mapping in dep.index_mapping:
                if mapping is not None:
                    mapped = mapping(mapped)
            known = pairs[dep.target.module, dep.handler]
            fresh = [index for index in mapped if index not in known]
            if fresh:
                known.update(fresh)
                stack.append((dep.target, dep.handler, fresh))
    ignored = {id(parameter) for parameter in graph.ignored_params}
    return {key: reached for key, reached in pairs.items() if reached and id(key[0]) not in ignored}


def _slot(graph: tp.DependencyGraph, owner: Owner, fn: Callable, reached: set, n: int) -> tuple[Slot | None, str]:
    """The slot of one item, or why there is none."""
    name = module_name(graph, owner)
    if any(index.root_idx is None for index in reached):
        return None, f"{name!r} shares channels between heads (grouped-query attention)"
    node = graph.module2node[owner]
    kind = ops.module2type(owner)
    if type(owner) in graph.CUSTOMIZED_PRUNERS or node.type == ops.OPTYPE.CUSTOMIZED:
        return None, f"{name!r} has a customised pruner, which can cut but not fuse"
    local = _local_table(reached, n)
    make = _SlotMaker(name, owner, local)
    pruner: Any = graph.get_pruner_of_module(owner)
    if kind == ops.OPTYPE.DEPTHWISE_CONV and owner.in_channels == owner.out_channels:
        return make(Role.DEPTHWISE, owner.out_channels, partner=batchnorm_of(graph, owner)), ""
    if kind in (ops.OPTYPE.CONV, ops.OPTYPE.DEPTHWISE_CONV, ops.OPTYPE.LINEAR):
        if _shares_weight(graph.model, owner):
            return None, f"{name!r} ties its weight to another layer (torch-pruning unties them)"
        conv = kind != ops.OPTYPE.LINEAR
        if _is_grouped_transposed(owner):
            return None, f"{name!r} is a grouped transposed convolution, which torch-pruning cuts at the wrong channels"
        chunks = owner.groups if conv else 1
        if fn == pruner.prune_out_channels:
            axis = 1 if conv and owner.transposed else 0
            size = owner.out_channels if conv else owner.out_features
            return make(Role.PRODUCER, size, chunks, axis, batchnorm_of(graph, owner)), ""
        axis = 0 if conv and owner.transposed else 1
        return make(Role.CONSUMER, owner.in_channels if conv else owner.in_features, chunks, axis), ""
    if kind == ops.OPTYPE.BN:
        return make(Role.BATCHNORM, owner.num_features), ""
    if kind == ops.OPTYPE.LN:
        if len(owner.normalized_shape) < -node.pruning_dim:
            return None, f"{name!r} normalises over a dimension that torch-pruning does not cut"
        return make(Role.NORM, owner.normalized_shape[node.pruning_dim], axis=node.pruning_dim), ""
    if kind == ops.OPTYPE.GN:
        return make(Role.NORM, owner.num_channels, owner.num_groups), ""
    if kind == ops.OPTYPE.IN:
        if owner.track_running_stats:
            return None, f"{name!r} is an instance-norm with running statistics, which torch-pruning cannot cut"
        return make(Role.NORM, owner.num_features), ""
    if kind == ops.OPTYPE.PRELU:
        return (make(Role.GAIN, owner.num_parameters) if owner.num_parameters > 1 else None), ""
    if kind == ops.OPTYPE.EMBED:
        if _shares_weight(graph.model, owner):
            return None, f"{name!r} ties its weight to another layer (torch-pruning unties them)"
        return make(Role.SHIFT, owner.embedding_dim, axis=1), ""
    if kind == ops.OPTYPE.PARAMETER:
        multiplied = any("mul" in str(getattr(reader.module, "_grad_fn", "")).lower() for reader in node.outputs)
        role = Role.GAIN if multiplied else Role.SHIFT
        return make(role, owner.shape[node.pruning_dim], axis=node.pruning_dim), ""
    return None, f"{name!r} ({type(owner).__name__}) is a layer that fusion does not understand"


@dataclass(frozen=True)
class _SlotMaker:
    name: str
    owner: Any
    local: Tensor

    def __call__(self, role, size, chunks=1, axis=0, partner=None) -> Slot:
        return Slot(self.name, self.owner, role, size, self.local, chunks, axis, partner)


def _is_grouped_transposed(layer: Owner) -> bool:
    """Torch-Pruning scores and cuts such a layer's outputs as if it were not grouped."""
    return isinstance(layer, ops.TORCH_CONV) and layer.transposed and layer.groups > 1


def _has_parameters(owner: Owner) -> bool:
    if isinstance(owner, nn.Parameter):
        return True
    return next(owner.parameters(), None) is not None or next(owner.buffers(), None) is not None


def _shares_weight(model: nn.Module, owner: Owner) -> bool:
    others = (m for m in model.modules() if m is not owner)
    return any(p is owner.weight for m in others for p in m._parameters.values())


def _by_root(reached: set) -> dict[int, set[int]]:
    table = defaultdict(set)
    for index in reached:
        table[index.root_idx].add(index.idx)
    return dict(table)


def _local_table(reached: set, n: int) -> Tensor:
    """[n, m] local channels per root channel, increasing, padded with -1."""
    by_root = _by_root(reached)
    m = max(len(locals_) for locals_ in by_root.values())
    table = torch.full((n, m), -1, dtype=torch.long)
    rows = torch.tensor([r for r, ls in by_root.items() for _ in ls])
    columns = torch.tensor([j for ls in by_root.values() for j in range(len(ls))])
    table[rows, columns] = torch.tensor([local for ls in by_root.values() for local in sorted(ls)])
    return table


def _tied_channels(all_reached: Iterable[set], n: int) -> set[int]:
    """Root channels that share a local channel with another root: they must be kept or cut together."""
    tied: set[int] = set()
    for reached in all_reached:
        owner_of: dict[int, int] = {}
        for index in reached:
            if index.root_idx is None:
                continue
            first = owner_of.setdefault(index.idx, index.root_idx)
            if first != index.root_idx:
                tied.update((first, index.root_idx))
    return tied


def _coupling_classes(slots: list[Slot], tied: set[int], n: int, channel_groups: int) -> Tensor:
    """[n] labels: same layers, same number of copies, same chunk everywhere; a tied channel is alone."""
    signature = [torch.arange(n) // max(1, n // max(1, channel_groups))]
    for slot in slots:
        signature.append((slot.local >= 0).sum(dim=1))
        if slot.chunks > 1:
            chunk = torch.div(slot.local, slot.size // slot.chunks, rounding_mode="floor")
            signature.extend(torch.where(slot.local >= 0, chunk, -1).unbind(dim=1))
    alone = torch.zeros(n, dtype=torch.long)
    for label, root in enumerate(sorted(tied), start=1):
        alone[root] = label
    return torch.stack([*signature, alone], dim=1).unique(dim=0, return_inverse=True)[1]
