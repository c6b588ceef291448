"""Put the channels of one network in the order of another, group by group: permutations, or plans between widths.

Networks of one architecture compute the same function in many orders of their channels, and training ends in any of
them; only in a common order do their weights mean the same, so that they can be averaged or interpolated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.average.couplings import Couplings, couplings_of
from intrafusion.average.matching import Link, Links, WeightMatching, comparable, solve_group
from intrafusion.average.responses import responses
from intrafusion.groups.apply import apply_pair
from intrafusion.groups.places import CouplingGroup, State, fill_, load_state_, permuted, state_of, take
from intrafusion.ot import Pair
from intrafusion.running import copy_of, run_model

BY = ("weights", "activations", "matching")
"""How channels are compared: see :func:`align`."""

COUPLINGS = ("assignment", "plan")
"""One-to-one, or soft."""

_SWEEPS = 50


@dataclass(frozen=True, eq=False)
class GroupAlignment:
    """How one group's n channels became the k of the reference.

    tensors: names of the parameters and buffers that move with it. order: [k], channel order[j] took place j (one to
    one); plan: [n, k] otherwise. cost: mean squared distance of coupled channels when they were coupled (filters with
    batch-norm folded in, or standardised activations). reason: why the group was left in its order ('' if it was not).
    """

    name: str
    tensors: tuple[str, ...]
    n: int
    k: int
    order: Tensor | None
    plan: Tensor | None
    cost: float
    reason: str = ""

    @property
    def coupling(self) -> Tensor:
        """[n, k] float64, the mass that goes from each channel to each place; sums to 1."""
        if self.plan is not None:
            return self.plan
        assert self.order is not None
        coupling = torch.zeros(self.n, self.k, dtype=torch.float64)
        coupling[self.order, torch.arange(self.k)] = 1.0 / self.k
        return coupling

    @property
    def is_identity(self) -> bool:
        return self.order is not None and torch.equal(self.order, torch.arange(self.k))


@dataclass(frozen=True, eq=False)
class Alignment:
    """The coupling of every group of a network with those of a reference, in forward order.

    by, coupling: as asked for. distance: Σ ‖A - π(B)‖² / Σ ‖A‖² over all tensors with batch-norm folded in, 0 for a
    permuted copy. sweeps: of the coordinate descent, 0 if there was nothing to improve.
    """

    groups: tuple[GroupAlignment, ...]
    by: str
    coupling: str
    distance: float
    sweeps: int
    _source: Couplings = field(repr=False)
    _target: Couplings = field(repr=False)
    _retrace: Callable[[nn.Module], Couplings] = field(repr=False)

    def __getitem__(self, name: str) -> GroupAlignment:
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(f"no group is called {name!r}: {', '.join(group.name for group in self.groups)}")

    @property
    def unaligned(self) -> dict[str, str]:
        """Groups that stay in their order, and why."""
        return {group.name: group.reason for group in self.groups if group.reason}

    def apply(self, model: nn.Module) -> nn.Module:
        """The network in the channels of the reference: a new one; the function is the same if no widths differ.

        model: the network that was aligned, or one with the same tensors. One-to-one couplings move every entry as it
        is. Plans merge: rows are the average of their members by mass (with batch-norm: of the folded filters, as one
        real batch-norm again), consumers read each channel from where its mass went. Raises ValueError if the network
        has other tensors.
        """
        state = state_of(model)
        if not same_shapes(state, state_of(self._source.model)):
            raise ValueError("the network has not the tensors of the one that was aligned: align it first")
        if all(group.order is not None for group in self.groups):
            aligned = copy_of(model)
            orders = {group.name: group.order for group in self.groups if group.order is not None}
            load_state_(aligned, permuted(state, self._source.groups, orders))
            return aligned
        links = {group.name: Link(group.order, group.plan) for group in self.groups}
        narrower = any(group.n != group.k for group in self.groups)
        aligned = copy_of(self._target.model if narrower else model)
        load_state_(aligned, _merge_(self._retrace(model), self._target, links))
        for module, like in zip(aligned.modules(), model.modules(), strict=True):
            module.training = like.training
        for parameter, like in zip(aligned.parameters(), model.parameters(), strict=True):
            parameter.requires_grad_(like.requires_grad)
        return aligned


def align(
    model: nn.Module,
    reference: nn.Module,
    example_inputs: Any,
    *,
    by: str = "matching",
    coupling: str = "assignment",
    batches: Iterable | None = None,
    forward_fn: Callable | None = None,
    seed: int = 0,
) -> Alignment:
    """Couple the channels of `model` with those of `reference`. Neither is touched; see `Alignment.apply`.

    model, reference: networks of one architecture; the model may be wider. example_inputs: a tensor with its batch
    axis, or a tuple or dictionary of inputs. forward_fn(network, inputs): how to call them, if not with the inputs.
    by: `weights`, once in forward order, each layer's input moved before its filters are compared;
        `activations`, the correlation of the channels on `batches` of inputs (default: the example inputs);
        `matching`, coordinate descent on the distance of all weights until no group changes, from the given order and
        from that of `weights`, of which the nearer end counts.
    coupling: `assignment`, one to one; `plan`, exact transport between masses in proportion to the channels' norms
        (attention heads stay one to one). Groups of different widths are coupled by a plan either way, of uniform
        masses for `assignment`.
    seed: of the order in which coordinate descent visits the groups.

    Groups that cannot be moved without changing the function keep their order and say why (`Alignment.unaligned`).
    Raises TypeError or ValueError for unknown settings, networks of different architectures and weights that are not
    finite (naming the tensor), and a reference that is wider than the model (naming the group).
    """
    check_settings(by, coupling)
    check_network(model, "the model")
    check_network(reference, "the reference")
    check_same_tensors(state_of(model), state_of(reference), "the model", "the reference")
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    trace = partial(couplings_of, example_inputs=inputs, forward_fn=forward_fn)
    of = trace(model)
    at = of if same_shapes(state_of(model), state_of(reference)) else trace(reference)
    _check_widths(of, at)
    device = next(iter(state_of(model).values())).device
    views = [
        {key: tensor.to(device) for key, tensor in comparable(state_of(net), traced).items()}
        for net, traced in ((reference, at), (model, of))
    ]

    soft = coupling == "plan"
    if by == "activations":
        run = partial(run_model, forward_fn=forward_fn)
        given = [inputs] if batches is None else [(b,) if isinstance(b, Tensor) else b for b in batches]
        rows = [responses(net, run, given, traced) for net, traced in ((model, of), (reference, at))]
        match = WeightMatching(views[0], views[1], at.groups, of.groups, soft=soft)
        couple_rows(match, rows[0], rows[1], of.groups, at.groups, soft=soft)
    else:
        match = best_match(views[0], views[1], of, at, by=by, soft=soft, seed=seed)
    groups = tuple(_result(a, b, match.links[a.name]) for a, b in zip(of.groups, at.groups, strict=True))
    return Alignment(groups, by, coupling, match.distance(), match.sweeps, of, at, trace)


def best_match(
    reference: State,
    model: State,
    of: Couplings,
    at: Couplings | None = None,
    *,
    by: str,
    soft: bool = False,
    seed: int,
) -> WeightMatching:
    """Couple all groups by `weights` or `matching`. at: the reference's groups, if it has other widths."""
    at = of if at is None else at
    match = WeightMatching(reference, model, at.groups, of.groups, soft=soft)
    match.forward_pass()
    if by == "weights":
        return match
    match.descend(seed=seed, sweeps=_SWEEPS)
    if any(a.n != b.n for a, b in zip(of.groups, at.groups, strict=True)) or match.is_exact:
        return match
    other = WeightMatching(reference, model, at.groups, of.groups, soft=soft)
    other.links.update({group.name: Link(order=torch.arange(group.n)) for group in of.groups})
    other.descend(seed=seed, sweeps=_SWEEPS)
    return other if other.distance() < match.distance() else match


def couple_rows(
    match: WeightMatching,
    model: dict[str, Tensor],
    reference: dict[str, Tensor],
    of: Sequence[CouplingGroup],
    at: Sequence[CouplingGroup],
    *,
    soft: bool,
) -> None:
    """Couple every group by feature rows; those without any by their weights, when all others are coupled."""
    for source, target in zip(of, at, strict=True):
        if source.reason or source.name not in model or source.name not in reference:
            continue
        x, y = model[source.name], reference[target.name]
        cost = (x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)[None, :] - 2 * x @ y.T).clamp(min=0)
        match.links[source.name] = solve_group(source, target, cost, match.masses(source.name) if soft else None)
    match.forward_pass(only_new=True)


def _result(source: CouplingGroup, target: CouplingGroup, link: Link) -> GroupAlignment:
    return GroupAlignment(
        source.name, source.tensors, source.n, target.n, link.order, link.plan, link.cost, source.reason
    )


def check_settings(by: str, coupling: str) -> None:
    """Raises ValueError for a comparison or a coupling that is not known."""
    for name, value, allowed in (("by", by, BY), ("coupling", coupling, COUPLINGS)):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}: choose one of {', '.join(map(repr, allowed))}")


def check_network(model: Any, name: str) -> None:
    """Raises TypeError for what is no network, ValueError, naming the tensor, for one that holds NaN or infinity."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} must be an nn.Module, not {type(model).__name__}")
    for key, tensor in state_of(model).items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{key!r} of {name} holds NaN or infinite values")


def same_shapes(first: State, second: State) -> bool:
    return {k: t.shape for k, t in first.items()} == {k: t.shape for k, t in second.items()}


def check_same_tensors(first: State, second: State, one: str, other: str) -> None:
    """Raises ValueError, naming a tensor, if one network has tensors that the other has not."""
    if missing := sorted(set(first) ^ set(second)):
        where = one if missing[0] in first else other
        raise ValueError(f"the networks have different architectures: only {where} has {missing[0]!r}")


def _check_widths(of: Couplings, at: Couplings) -> None:
    """The model's groups must be those of the reference, nowhere narrower."""
    model, reference = state_of(of.model), state_of(at.model)
    reached = {(place.key, place.axis) for group in of.groups for place in group.places if not group.reason}
    for key, tensor in model.items():
        other = reference[key]
        fixed = [axis for axis in range(tensor.dim()) if (key, axis) not in reached]
        if tensor.dim() != other.dim() or any(tensor.shape[axis] != other.shape[axis] for axis in fixed):
            shapes = f"{tuple(tensor.shape)} in the model, {tuple(other.shape)} in the reference"
            raise ValueError(f"the networks have different architectures: {key!r} is {shapes}")
    if [group.name for group in of.groups] != [group.name for group in at.groups]:
        raise ValueError("the networks have different architectures: their channels are coupled in different groups")
    for source, target in zip(of.groups, at.groups, strict=True):
        here = [(place.key, place.axis) for place in source.places]
        if here != [(place.key, place.axis) for place in target.places]:
            raise ValueError(f"the networks have different architectures: group {source.name!r} has other layers")
        if source.n == target.n:
            continue
        if source.rigid:
            raise ValueError(
                f"group {source.name!r} has {source.n} and {target.n} channels, but its channels cannot be merged"
            )
        counts = [
            (int((source.classes == label).sum()), int((target.classes == label).sum()))
            for label in torch.cat([source.classes, target.classes]).unique()
        ]
        if any(n < k or (n > 0 and k == 0) for n, k in counts):
            raise ValueError(
                f"group {source.name!r} is narrower in the model ({source.n} channels) than in the reference "
                f"({target.n}): align the wider network to the narrower one"
            )


def _merge_(couplings: Couplings, at: Couplings, links: Links) -> State:
    """Merge the channels of a traced network in place, at full size, and read its state out at the reference's widths.

    From the last group to the first, so that a layer's rows are merged before the columns of its inputs are.
    """
    kept = {a.name: _kept(a, b, links[a.name]) for a, b in zip(couplings.groups, at.groups, strict=True)}
    by_table: dict[str, list[CouplingGroup]] = {}
    for group in couplings.groups:
        if links[group.name].order is None:
            by_table.setdefault(group.table, []).append(group)
    for name, parts in reversed(list(by_table.items())):
        table = couplings.tables[name]
        matrices = torch.eye(table.n, dtype=torch.float64).repeat(2, 1, 1)
        stays = torch.ones(table.n, dtype=torch.bool)
        for part in parts:
            roots, link = part.roots, links[part.name]
            assert roots is not None
            places = roots[kept[part.name]]
            stays[roots] = False
            stays[places] = True
            matrices[0][places[:, None], roots[None, :]] = link.rows()
            matrices[1][roots[:, None], places[None, :]] = link.columns()
        where = stays.nonzero().flatten()
        apply_pair(table, Pair(matrices[0][where], matrices[1][:, where], where))
    return _read_out(state_of(couplings.model), couplings, at, kept)


def _kept(source: CouplingGroup, target: CouplingGroup, link: Link) -> Tensor:
    """[k] which of the n places hold the channels of the reference: those assigned, or the first of each class."""
    if link.order is not None:
        return link.order
    kept = torch.empty(target.n, dtype=torch.long)
    for label in target.classes.unique():
        places = (target.classes == label).nonzero().flatten()
        kept[places] = (source.classes == label).nonzero().flatten()[: len(places)]
    return kept


def _read_out(state: State, of: Couplings, at: Couplings, kept: dict[str, Tensor]) -> State:
    shapes, index = state_of(at.model), {}
    for source, target in zip(of.groups, at.groups, strict=True):
        for place, there in zip(source.places, target.places, strict=True):
            key = (place.key, place.axis)
            if key not in index:
                index[key] = (place, torch.arange(there.length(shapes[place.key])))
            fill_(index[key][1], there, place.local[kept[source.name]])
    state = dict(state)
    for (key, _), (place, entries) in index.items():
        state[key] = take(state[key], place, entries)
    return state
