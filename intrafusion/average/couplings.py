"""A network as a table of coupling groups: which entries of which tensors move when a channel moves.

    group -> [(tensor name, axis, index map)]

The table is read off torch-pruning's dependency graph, so it needs no list of known architectures, and is checked: a
network permuted by it must compute the same function. What is not understood stays where it is, with a reason.
(Tables of this kind, written by hand per architecture: Ainsworth et al. 2023, Git Re-Basin.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning import ops

from intrafusion.groups.kinds.base import Inner, Place, Side, Slot, kind_of, making_classes, torch_pruners
from intrafusion.groups.padding import PaddingGraph
from intrafusion.groups.permutation_check import is_output
from intrafusion.groups.places import CouplingGroup, State, permuted, random_orders, state_of
from intrafusion.groups.table import GroupTable, tabulate
from intrafusion.running import call_order, copy_of, evaluating, run_model

OUTPUT = "these are the network's outputs: their order is the caller's"
_ALONE = "no two of its channels may change places"
_BROKEN = "exchanging its channels changes the network's output"


@dataclass(frozen=True)
class Fold:
    """A batch-norm that reads one layer alone: their two affine maps are one. Names of the two layers."""

    layer: str
    axis: int
    chunks: int
    norm: str
    eps: float


@dataclass(frozen=True)
class Couplings:
    """The coupling groups of one network in forward order, and what is needed to merge along them.

    model: the traced copy of the network, in eval mode. folds: (layer, batch-norm) pairs. alone: (batch-norm, eps) of
    those that read no layer alone. tables: the torch-pruning group behind every group that has one.
    """

    groups: tuple[CouplingGroup, ...]
    folds: tuple[Fold, ...]
    alone: tuple[tuple[str, float], ...]
    model: nn.Module = field(repr=False)
    graph: tp.DependencyGraph = field(repr=False)
    tables: dict[str, GroupTable] = field(repr=False)

    def __getitem__(self, name: str) -> CouplingGroup:
        return next(group for group in self.groups if group.name == name)


def couplings_of(model: nn.Module, example_inputs: Any, *, forward_fn: Callable | None = None) -> Couplings:
    """Trace a network and read its coupling groups off the dependency graph. The network is not touched.

    example_inputs: a tensor (with its batch axis), or a tuple or dictionary of inputs. forward_fn(model, inputs): how
    to call the network, if not with the inputs. Raises ValueError if it cannot be traced.
    """
    example = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    model = copy_of(model).eval()
    model.requires_grad_(True)  # torch-pruning follows the autograd graph
    with torch.enable_grad():
        try:
            graph = PaddingGraph().build_dependency(
                model, example, forward_fn=forward_fn, customized_pruners=torch_pruners(), verbose=False
            )
        except Exception as error:
            raise ValueError(f"the network cannot be traced on the example inputs: {error}") from error

    def forward(network: nn.Module) -> list[Tensor]:
        return run_model(network, example, forward_fn)

    order = call_order(lambda: forward(model), model, making_classes())
    reader = _Reader(graph, order)
    groups = _distinct(sorted(reader.read(), key=lambda group: group.position))
    groups = _without_broken(groups, model, example, forward_fn)
    folds, alone = _batchnorms(model, reader.tables.values())
    return Couplings(groups, folds, alone, model, graph, reader.tables)


class _Reader:
    """Reads group after group, each tensor's channels into one group only."""

    def __init__(self, graph: tp.DependencyGraph, order: list[str]) -> None:
        self.graph = graph
        self.tables: dict[str, GroupTable] = {}
        self._position = {name: at for at, name in enumerate(order)}
        self._tensors = dict(_named_tensors(graph.model))
        self._keys = {id(tensor): key for key, tensor in self._tensors.items()}
        self._claimed: dict[tuple[str, int], Tensor] = {}

    def read(self) -> Iterator[CouplingGroup]:
        """Groups from the widest root on: where channels are padded with zeros, only the widest layer sees them all.

        Channels that pass through different layers (split, or padded) are different groups.
        """
        names = self.graph._module2name
        roots = [(m, names[m]) for m in self.graph.module2node if names.get(m) in self._position]
        roots.sort(key=lambda root: (-self._outputs(root[0]), self._position[root[1]]))
        for root, name in roots:
            kind = kind_of(root)
            inner = kind.inner(name, root) if kind is not None else None
            if inner is not None:
                yield _inner_group(inner, self._position[name])
            elif not self._is_claimed(root):
                yield from self._groups(root, name)

    def _outputs(self, layer: Any) -> int:
        return self.graph.get_out_channels(layer) or 0

    def _is_claimed(self, layer: Any) -> bool:
        kind, key = kind_of(layer), self._keys.get(id(layer.weight))
        return kind is None or key is None or (key, kind.output_axis(layer)) in self._claimed

    def _groups(self, root: Any, name: str) -> Iterator[CouplingGroup]:
        pruner: Any = self.graph.get_pruner_of_module(root)
        try:
            table, heads = self._table(root, pruner.prune_out_channels)
            places = self._places(table)
        except Exception as error:  # torch-pruning's own, of many kinds
            reason = f"it cannot be followed: {error}"
            yield CouplingGroup.fixed(name, self._outputs(root), self._position[name], reason)
            return
        self.tables[name] = table
        rigid = heads > 1 or _is_rigid(table)
        claimed_twice = self._claim(places)
        reason = table.immovable or (OUTPUT if is_output(self.graph, table) else "") or claimed_twice
        for roots in [torch.arange(table.n)] if reason else _by_presence(places, table.n):
            part = tuple(
                replace(place, local=place.local[roots]) for place in places if bool((place.local[roots] >= 0).any())
            )
            whole = len(roots) == table.n
            blocks = torch.arange(len(roots)).unflatten(0, (heads if whole else 1, -1))
            first = self._first_producer(part, name)
            classes, position = table.classes[roots], self._position[first]
            group = CouplingGroup(first, len(roots), part, classes, blocks, position, reason, rigid, roots, name)
            yield group if reason or group.can_move else replace(group, reason=_ALONE)

    def _first_producer(self, places: tuple[Place, ...], root: str) -> str:
        """What a group is called: unlike the root, it does not depend on the widths."""
        names = [place.key.rpartition(".")[0] for place in places if place.side is Side.MAKES]
        names = [name for name in names if name in self._position]
        return min(names or [root], key=lambda name: self._position[name])

    def _table(self, root: Any, handler: Callable) -> tuple[GroupTable, int]:
        """The group behind a root. Packed queries, keys and values are seen from the layer that reads the heads."""
        table = tabulate(self.graph, root, handler)
        if table.immovable or len(table.classes.unique()) < table.n:
            return table, 1
        for slot in table.slots:
            if not slot.reads or slot.size >= table.n:
                continue
            pruner: Any = self.graph.get_pruner_of_module(slot.owner)
            seen = tabulate(self.graph, slot.owner, pruner.prune_in_channels)
            if not seen.immovable and len(seen.classes.unique()) < seen.n:
                return seen, self._heads(slot, seen.n)
        return table, 1

    def _heads(self, reader: Slot, n: int) -> int:
        parent = self.graph.model.get_submodule(reader.name.rpartition(".")[0])
        heads = getattr(parent, "num_heads", 1)
        return heads if isinstance(heads, int) and heads > 0 and n % heads == 0 else 1

    def _claim(self, places: tuple[Place, ...]) -> str:
        taken: dict[tuple[str, int], Tensor] = {}
        for place in places:
            there = place.local[place.local >= 0]
            mask = taken.get((place.key, place.axis))
            if mask is None:
                length = place.length(self._tensors[place.key])
                mask = taken[place.key, place.axis] = torch.zeros(length, dtype=torch.bool)
            if int(there.max()) >= len(mask):
                return f"{place.key!r} has fewer channels than are coupled with it"
            if mask[there].any():
                return f"{place.key!r} is reached twice"
            mask[there] = True
        for at, mask in taken.items():
            if at in self._claimed and (self._claimed[at] & mask).any():
                return f"{at[0]!r} belongs to another group too"
        for at, mask in taken.items():
            self._claimed[at] = self._claimed.get(at, torch.zeros_like(mask)) | mask
        return ""

    def _places(self, table: GroupTable) -> tuple[Place, ...]:
        """Every place of the group once, under the tensor's first name."""
        found = [replace(place, key=self._keys[id(place.tensor)]) for slot in table.slots for place in slot.places]
        unique = {(place.key, place.axis, place.side): place for place in found}
        return tuple(sorted(unique.values(), key=lambda place: (place.key, place.axis)))


def _inner_group(inner: Inner, position: int) -> CouplingGroup:
    """Channels inside one layer, which may be exchanged but not merged."""
    if inner.reason or inner.classes is None or inner.blocks is None:
        return CouplingGroup.fixed(inner.name, inner.n, position, inner.reason)
    return CouplingGroup(inner.name, inner.n, inner.places, inner.classes, inner.blocks, position, rigid=True)


def _is_rigid(table: GroupTable) -> bool:
    """Channels that can be permuted but not merged: of attention, and where a layer produces some of them only."""
    partial = (slot.partner is not None and bool((slot.local[:, 0] < 0).any()) for slot in table.slots)
    return any(partial) or any(slot.kind.rigid for slot in table.slots)


def _distinct(groups: list[CouplingGroup]) -> tuple[CouplingGroup, ...]:
    """Parts of one layer's channels that go different ways are numbered."""
    seen: dict[str, int] = {}
    for group in groups:
        seen[group.name] = seen.get(group.name, 0) + 1
    several = {name: iter(range(1, count + 1)) for name, count in seen.items() if count > 1}
    return tuple(
        replace(group, name=f"{group.name}#{next(several[group.name])}") if group.name in several else group
        for group in groups
    )


def _by_presence(places: tuple[Place, ...], n: int) -> list[Tensor]:
    """The channels that lie in the same places, one tensor of channel numbers per set."""
    there = torch.stack([torch.ones(n, dtype=torch.long), *((p.local >= 0).sum(dim=1) for p in places)], dim=1)
    _, label = there.unique(dim=0, return_inverse=True)
    return [(label == value).nonzero().flatten() for value in range(int(label.max()) + 1)]


def _named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _batchnorms(model: nn.Module, tables: Any) -> tuple[tuple[Fold, ...], tuple[tuple[str, float], ...]]:
    folds: dict[str, Fold] = {}
    names = {module: name for name, module in model.named_modules()}
    for table in tables:
        for slot in table.slots:
            if slot.partner is not None:
                norm = names[slot.partner]
                folds[norm] = Fold(slot.name, slot.axis, slot.chunks, norm, slot.partner.eps)
    alone = [
        (name, module.eps)
        for module, name in names.items()
        if isinstance(module, ops.TORCH_BATCHNORM) and module.running_mean is not None and name not in folds
    ]
    return tuple(folds.values()), tuple(alone)


def _without_broken(
    groups: tuple[CouplingGroup, ...], model: nn.Module, example: Any, forward_fn: Callable | None
) -> tuple[CouplingGroup, ...]:
    """Groups whose permutation changes the function become fixed, with a reason."""
    check = _Check(model, example, forward_fn)
    if check.holds(groups):
        return groups
    return tuple(group if group.reason or check.holds((group,)) else replace(group, reason=_BROKEN) for group in groups)


class _Check:
    """Does a network compute the same when the channels of some groups change places? In float64, where that is sharp.

    A network that only runs in its own dtype is checked there.
    """

    def __init__(self, model: nn.Module, example: Any, forward_fn: Callable | None) -> None:
        self._forward_fn = forward_fn
        try:
            self._network, self._example, self._tolerance = copy_of(model).double(), _double(example), 1e-7
            before = self._run({})
        except (RuntimeError, TypeError, ValueError):
            self._network, self._example, self._tolerance = copy_of(model), example, 1e-3
            before = self._run({})
        self._state, self._before = state_of(self._network), before

    def holds(self, groups: tuple[CouplingGroup, ...]) -> bool:
        orders = random_orders(groups, torch.Generator().manual_seed(0))
        after = self._run(permuted(self._state, groups, orders))
        return all(self._close(a, b) for a, b in zip(after, self._before, strict=True))

    def _run(self, state: State) -> list[Tensor]:
        tensors = dict(_named_tensors(self._network))
        kept = {name: tensors[name].data for name in state}
        try:
            for name, value in state.items():
                tensors[name].data = value
            with torch.no_grad(), evaluating(self._network):
                return run_model(self._network, self._example, self._forward_fn)
        finally:
            for name, value in kept.items():
                tensors[name].data = value

    def _close(self, after: Tensor, before: Tensor) -> bool:
        if not before.is_floating_point() or not torch.isfinite(before).all():
            return True
        return bool((after - before).abs().max() <= self._tolerance * before.abs().max())


def _double(example: Any) -> Any:
    def widen(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {key: widen(v) for key, v in example.items()} if isinstance(example, dict) else tuple(map(widen, example))
