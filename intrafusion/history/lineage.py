"""What became of every parameter: fusion, refits and cuts replace them, and an optimizer still holds the old ones.

A `Lineage` remembers, for each old parameter, what it has become and the maps that carry a gradient there. It holds no
parameter itself: where nobody else does, the record is gone.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from torch_pruning import _helpers, ops

from intrafusion.groups.batchnorm import read
from intrafusion.groups.table import GroupTable, batchnorm_of
from intrafusion.history.cotangent import Cotangent, Cut, Mixing, mixings
from intrafusion.ot import Pair

Address = tuple[nn.Module, str]
"""Where a parameter lives: the module that holds it, and its name there."""


@dataclass(frozen=True)
class Link:
    """How one change carries a parameter's gradient to the next parameter, or why no map is known."""

    map: Cotangent | None
    problem: str = ""


@dataclass(frozen=True)
class _Descent:
    """A later parameter (None: there is none any more), held weakly, and all the links that lead there."""

    successor: Callable[[], nn.Parameter | None] | None
    links: tuple[Link, ...]


class Lineage:
    """The history of a network's parameters. graph: torch-pruning's, of that network."""

    def __init__(self, graph: tp.DependencyGraph) -> None:
        self._graph = graph
        self._descents: Any = WeakTensorKeyDictionary()
        self._origins: Any = WeakTensorKeyDictionary()
        self._born: Any = WeakTensorKeyDictionary()

    @contextmanager
    def recording(self) -> Iterator[Change]:
        """Record what happens to the parameters inside; gradients are carried at the end, nothing if it fails."""
        change = Change(self._graph)
        yield change
        for address, old, new in change.replaced():
            if old is None:
                self._born[new] = None
                continue
            link = change.link(address, old, new)
            if new is not None:
                if old in self._born:
                    self._born[new] = None
                new.grad = None if old.grad is None or link.map is None else link.map(old.grad)
            self._add(old, new, link)

    def is_born(self, parameter: nn.Parameter) -> bool:
        """True if no parameter came before this one: a bias that a refit needed."""
        return parameter in self._born

    def successors(
        self, parameter: nn.Parameter, present: set[int]
    ) -> list[tuple[nn.Parameter, tuple[Link, ...]]] | None:
        """What is now in the network instead of `parameter`, with the links that lead there; itself if it still is.

        present: the ids of the network's parameters. Several for a tied weight that was untied, none if it was removed.
        None: nothing is known about it.
        """
        found: dict[int, tuple[nn.Parameter, tuple[Link, ...]]] = {}
        if id(parameter) in present:
            found[id(parameter)] = (parameter, ())
        removed = False
        for descent in self._descents.get(parameter, ()):
            last = descent.successor() if descent.successor else None
            removed = removed or descent.successor is None
            if last is not None and id(last) in present:
                found.setdefault(id(last), (last, descent.links))
        return list(found.values()) if found or removed else None

    def _add(self, old: nn.Parameter, new: nn.Parameter | None, link: Link) -> None:
        """Extend every record that leads to `old`: no parameter in between is needed any more."""
        successor = None if new is None else weakref.ref(new)
        earlier = [one for one in (origin() for origin in self._origins.get(old, ())) if one is not None]
        for origin in earlier:
            records = [d for d in self._descents[origin] if d.successor is None or d.successor() is not None]
            links = [d.links for d in records if d.successor is not None and d.successor() is old]
            self._descents[origin] = [*records, *(_Descent(successor, (*before, link)) for before in links)]
        self._descents[old] = [*self._descents.get(old, ()), _Descent(successor, (link,))]
        if new is not None:
            self._origins[new] = [*(weakref.ref(one) for one in earlier), weakref.ref(old)]


class Change:
    """One all-or-nothing change of a network, and what it does to gradients."""

    def __init__(self, graph: tp.DependencyGraph) -> None:
        self._graph = graph
        self._before: dict[Any, tuple[dict[str, Any], dict[str, Any]]] = {
            m: (dict(m._parameters), dict(m._buffers)) for m in graph.model.modules()
        }
        self._mixings: dict[Address, list[Mixing]] = defaultdict(list)
        self._cuts: dict[Address, list[Cut]] = defaultdict(list)
        self._problems: dict[Address, str] = {}
        self._own_scales: dict[Address, tuple[int, Tensor, Tensor]] = {}

    def mixed(self, table: GroupTable, pair: Pair | None) -> None:
        """A pair was applied to a group (None: it is only cut)."""
        if pair is None:
            return
        for slot, name, mixing in mixings(table, pair):
            address = (slot.owner, name) if name else self._address(slot.owner)
            if address[0]._parameters.get(address[1]) is not None:
                self._mixings[address].append(mixing)

    def mixes(self, layer: nn.Module, name: str, axis: int, at: Tensor, kept: Tensor, weights: Tensor) -> None:
        """Of channels `at` [r] of a layer's tensor, gradients of those `kept` [k] become `weights` [k, r] times all."""
        self._mixings[layer, name].append(Mixing(weights.double().cpu(), kept.cpu(), at.cpu()[:, None], axis))

    def scaled(self, layer: nn.Module, name: str, axis: int, before: Tensor, after: Tensor) -> None:
        """A tensor was in other units along an axis: what it multiplied was `before` as large, and is `after` now."""
        self._own_scales[layer, name] = axis, before, after

    @contextmanager
    def cutting(self, group: Any) -> Iterator[None]:
        """Inside, torch-pruning cuts `group`; what it keeps of each tensor is read off copies that hold numbers.

        The copies go through the very functions that cut the layers, whatever their kind.
        """
        before = {(m, n): p for m in self._before for n, p in m._parameters.items() if p is not None}
        items = [(dep, list(_helpers.to_plain_idxs(idxs))) for dep, idxs in group.items]
        free = {id(p): self._address(p) for p in self._graph._param_to_name if isinstance(p, nn.Parameter)}
        targets = [dep.target.module for dep, _ in items]  # a cut of a free parameter replaces the target
        shells = {t: _Shell(t) for t in dict.fromkeys(t for t in targets if isinstance(t, nn.Module))}
        yield
        axes: dict[int, list[Address]] = defaultdict(list)
        for address, old in before.items():
            new = address[0]._parameters.get(address[1])
            if new is None or new is old or new.shape == old.shape:
                continue
            if new.dim() != old.dim():
                self._problems[address] = "it was cut to another number of dimensions"
                continue
            for axis in range(old.dim()):
                if old.shape[axis] == new.shape[axis]:
                    continue
                kept = self._told(address, axis, old.shape[axis], new.shape[axis], zip(items, targets, strict=True))
                if kept is None:
                    axes[axis].append(address)
                else:
                    self._cuts[address].append(Cut(axis, kept))
        for axis, changed in axes.items():
            numbers = self._numbers(axis, items, targets, shells, free)
            for address in changed:
                kept = numbers.get(address)
                expected = address[0]._parameters[address[1]]
                if kept is None or expected is None or len(kept) != expected.shape[axis]:
                    self._problems[address] = f"how its {type(address[0]).__name__} is cut could not be followed"
                    continue
                self._cuts[address].append(Cut(axis, kept))

    def _told(self, address: Address, axis: int, old: int, new: int, cut: Iterable) -> Tensor | None:
        """What is left of a linear layer's or an ordinary convolution's weight, by what torch-pruning was told to cut.

        None for anything else, and where that is not plain: then only a trial tells.
        """
        layer, name = address
        if not isinstance(layer, (nn.Linear, ops.TORCH_CONV)) or getattr(layer, "groups", 1) > 1 or name != "weight":
            return None
        outputs = axis == int(getattr(layer, "transposed", False))
        found = {
            tuple(sorted({int(i) for i in idxs}))
            for (dep, idxs), target in cut
            if target is layer
            and type(dep.handler.__self__).__module__.startswith("torch_pruning.")
            and self._graph.is_out_channel_pruning_fn(dep.handler) == outputs
        }
        if len(found) != 1 or axis > 1:
            return None
        (removed,) = found
        if not removed or removed[-1] >= old or old - len(removed) != new:
            return None
        left = torch.ones(old, dtype=torch.bool)
        left[list(removed)] = False
        return left.nonzero().flatten()

    def replaced(self) -> Iterator[tuple[Address, nn.Parameter | None, nn.Parameter]]:
        """(address, parameter before, parameter now) wherever it is another object now."""
        for module, (parameters, _) in self._before.items():
            for name in dict.fromkeys([*parameters, *module._parameters]):
                old, new = parameters.get(name), module._parameters.get(name)
                if old is not new:
                    yield (module, name), old, new  # type: ignore[misc]

    def link(self, address: Address, old: nn.Parameter, new: nn.Parameter | None) -> Link:
        if new is None:
            return Link(None)
        if address in self._problems:
            return Link(None, self._problems[address])
        mixed, cuts = self._mixings.get(address, []), self._cuts.get(address, [])
        axis, before, after = self._scales(address)
        if before is not None and after is not None:
            at = [cut for cut in cuts if cut.axis == axis]
            there = before.index_select(0, at[0].kept.to(before.device)) if at else before
            if mixed or not torch.equal(there, after):
                return Link(Cotangent(mixed, cuts, axis, before, after))
        return Link(Cotangent(mixed, cuts))

    def _scales(self, address: Address) -> tuple[int, Tensor | None, Tensor | None]:
        """(axis, scale before, scale now) of the coordinates that a parameter is carried in."""
        module, name = address
        if address in self._own_scales:
            return self._own_scales[address]
        if isinstance(module, ops.TORCH_BATCHNORM):
            if name != "weight" or module.running_mean is None:
                return 0, None, None
            return 0, self._scale_before(module).sign(), read(module).scale.sign()
        bn = batchnorm_of(self._graph, module) if name in ("weight", "bias") else None
        if bn is None:
            return 0, None, None
        axis = 1 if name == "weight" and getattr(module, "transposed", False) else 0
        return axis, self._scale_before(bn), read(bn).scale

    def _scale_before(self, bn: Any) -> Tensor:
        """Scale of a batch-norm as it was; neither a fusion nor a cut writes into a tensor."""
        parameters, buffers = self._before[bn]
        var = buffers["running_var"].double()
        gamma = parameters["weight"].detach().double() if bn.affine else torch.ones_like(var)
        return gamma / (var + bn.eps).sqrt()

    def _address(self, parameter: nn.Parameter) -> Address:
        path, _, name = self._graph._param_to_name[parameter].rpartition(".")
        return self._graph.model.get_submodule(path), name

    def _numbers(self, axis: int, items: list, targets: list, shells: dict, free: dict) -> dict[Address, Tensor]:
        """For every tensor that the group cuts, the numbers along `axis` of the entries that stay."""
        copies: dict[Any, Any] = {target: shell.numbered(axis) for target, shell in shells.items()}
        found: dict[Address, Tensor] = {}
        for (dep, idxs), target in zip(items, targets, strict=True):
            dep.handler.__self__.pruning_dim = dep.target.pruning_dim
            try:
                if isinstance(target, nn.Module):
                    dep.handler(copies[target], idxs)
                elif axis < target.dim():
                    found[free[id(target)]] = _read(dep.handler(_numbered(target, axis), idxs), axis)
            except Exception:  # a customised pruner may ask anything of its layer; its parameters then have no map
                copies[target] = None
        for shell, copy in ((shells[t], copies[t]) for t in shells):
            if copy is not None:
                found.update(shell.read(copy, axis))
        return found


class _Shell:
    """A layer as it was before a cut, without its weights."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.state = {k: v for k, v in module.__dict__.items() if k not in ("_parameters", "_buffers", "_modules")}
        self.parameters, self.buffers = dict(module._parameters), dict(module._buffers)
        self.children = {name: _Shell(child) for name, child in module._modules.items() if child is not None}

    def numbered(self, axis: int) -> Any:
        copy = object.__new__(type(self.module))
        copy.__dict__.update(self.state)
        numbers = {n: None if p is None else _numbered(p, axis) for n, p in self.parameters.items()}
        modules = {name: child.numbered(axis) for name, child in self.children.items()}
        copy.__dict__.update(_parameters=numbers, _buffers=dict(self.buffers), _modules=modules)
        return copy

    def read(self, copy: Any, axis: int) -> Iterator[tuple[Address, Tensor]]:
        for name, parameter in copy._parameters.items():
            if parameter is not None and axis < parameter.dim():
                yield (self.module, name), _read(parameter, axis)
        for name, child in self.children.items():
            yield from child.read(copy._modules[name], axis)


def _numbered(parameter: Tensor, axis: int) -> nn.Parameter:
    """As large as the parameter, but holding each entry's number along `axis` (float32 is exact up to 2^24)."""
    if axis >= parameter.dim():
        return nn.Parameter(torch.zeros((), device=parameter.device).expand(parameter.shape), requires_grad=False)
    numbers = torch.arange(parameter.shape[axis], dtype=torch.float32, device=parameter.device)
    shape = [1] * parameter.dim()
    shape[axis] = -1
    return nn.Parameter(numbers.reshape(shape).expand(parameter.shape), requires_grad=False)


def _read(numbered: Tensor, axis: int) -> Tensor:
    return (
        numbered.detach().movedim(axis, 0).flatten(1)[:, 0].long() if numbered.dim() > 1 else numbered.detach().long()
    )
