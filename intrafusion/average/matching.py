"""Which channels of one network are those of another: costs from the weights, solved group by group.

Two networks are compared with batch-norm folded in (a filter and its batch-norm's scale are one filter), as

    D = Σ_T ‖ A_T - π(B)_T ‖²        over all tensors T; π moves the channels of every group of B

For one group, with all others held, D is linear in its coupling: the cost of putting channel i of B in the place of
channel j of A is the squared distance of all their weights. That is an assignment (or transport) problem, solved
exactly, and going round the groups can only lower D (Ainsworth et al. 2023, section 3.2, and Singh & Jaggi 2020 for
plans). A layer that reads and writes one group makes D quadratic there; a new coupling of such a group is then taken
only if D is lower with it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from intrafusion.average.couplings import Couplings
from intrafusion.groups.batchnorm import row_average
from intrafusion.groups.kinds.base import Place
from intrafusion.groups.layout import from_channels, gather, to_channels
from intrafusion.groups.places import CouplingGroup, State, move
from intrafusion.ot import solve
from intrafusion.ot.assignment import assign_blocks

_EXACT = 1e-12
"""Squared distance, relative to the reference, at which two networks are the same up to rounding."""
_IN_DOUBLE = 2**20
"""Larger weights are compared in float32 (they are moved exactly in any case)."""


@dataclass(frozen=True)
class Link:
    """How a group's n channels become the k of the reference.

    order: [k] one to one: channel order[j] takes place j. plan: [n, k] masses that sum to 1, if not one to one.
    cost: mean squared distance between coupled channels when the coupling was found.
    """

    order: Tensor | None = None
    plan: Tensor | None = None
    cost: float = 0.0

    def rows(self) -> Tensor:
        """[k, n] what each new channel is made of: the members' average by mass."""
        assert self.plan is not None
        return self.plan.T / self.plan.sum(dim=0).clamp(min=1e-300)[:, None]

    def columns(self) -> Tensor:
        """[n, k] from what each old channel is read: its mass is shared out whole."""
        assert self.plan is not None
        return self.plan / self.plan.sum(dim=1).clamp(min=1e-300)[:, None]

    def same(self, other: Link) -> bool:
        if self.order is not None and other.order is not None:
            return torch.equal(self.order, other.order)
        if self.plan is not None and other.plan is not None:
            return torch.allclose(self.plan, other.plan, rtol=0, atol=1e-12)
        return False


Links = dict[str, Link]


def comparable(state: State, couplings: Couplings) -> State:
    """The tensors that are compared: batch-norm folded into its layer, or as scale and shift where it stands alone.

    A folded layer's weight is a·W and its batch-norm's `running_mean` holds the shift a (b - mean) + beta; that of a
    batch-norm alone holds beta - a·mean, and its `running_var` the scale a.
    """
    view = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    for fold in couplings.folds:
        scale, shift = _affine(view, fold.norm, fold.eps, view.pop(f"{fold.layer}.bias", None))
        weight = view[f"{fold.layer}.weight"]
        shape = [-1 if axis == fold.axis else 1 for axis in range(weight.dim())]
        view[f"{fold.layer}.weight"] = weight * scale.to(weight.dtype).reshape(shape)
        view[f"{fold.norm}.running_mean"] = shift
    for norm, eps in couplings.alone:
        scale, shift = _affine(view, norm, eps, None)
        view[f"{norm}.running_mean"], view[f"{norm}.running_var"] = shift, scale
    return view


def _affine(view: State, norm: str, eps: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    mean, var = view[f"{norm}.running_mean"].double(), view.pop(f"{norm}.running_var").double()
    gamma, beta = view.pop(f"{norm}.weight", None), view.pop(f"{norm}.bias", None)
    scale = (torch.ones_like(var) if gamma is None else gamma.double()) / (var + eps).sqrt()
    inside = -mean if bias is None else bias.double() - mean
    return scale, scale * inside + (0.0 if beta is None else beta.double())


class WeightMatching:
    """Couples the groups of one network with those of a reference by their weights.

    reference, model: what `comparable` gives for both; at, of: their coupling groups, in the same order. soft: plans
    with masses in proportion to the channels' norms, instead of one-to-one couplings. Groups of different widths are
    always coupled by a plan, with uniform masses unless `soft`.
    """

    def __init__(
        self, reference: State, model: State, at: Sequence[CouplingGroup], of: Sequence[CouplingGroup], soft: bool
    ) -> None:
        self._a, self._b, self._soft = reference, model, soft
        self._at, self._of = {g.name: g for g in at}, {g.name: g for g in of}
        self._by_tensor: dict[str, list[tuple[str, int]]] = {}
        for group in of:
            for number, place in enumerate(group.places):
                self._by_tensor.setdefault(place.key, []).append((group.name, number))
        self.sweeps = 0
        self.links: Links = {g.name: Link(order=torch.arange(g.n)) for g in of if g.reason}
        self._measured: tuple[tuple[Link, ...], float] | None = None
        self._known: dict[tuple[str, int], tuple[tuple[Link | None, ...], Tensor]] = {}

    @property
    def free(self) -> list[str]:
        """Names of the groups that may be coupled, in forward order."""
        return [name for name, group in self._of.items() if not group.reason]

    def forward_pass(self, *, only_new: bool = False) -> None:
        """Couple every group once, in forward order, by what produces its channels, with its inputs moved before.

        only_new: leave the groups that are coupled already.
        Layers whose inputs are not coupled yet (blocks that add to a stream) have no say, unless no other layer has.
        """
        for name in self.free:
            if only_new and name in self.links:
                continue
            makers = [
                number
                for number, place in enumerate(self._of[name].places)
                if not place.reads and place.key in self._b and self._settled(name, place)
            ]
            self.links[name] = self._solve(name, self._cost(name, makers) if makers else self._norms(name))

    def descend(self, *, seed: int, sweeps: int) -> None:
        """Coordinate descent over the groups, in a random order, until none changes."""
        generator = torch.Generator().manual_seed(seed)
        names = self.free
        changed = not self.is_exact
        while changed and self.sweeps < sweeps:
            self.sweeps += 1
            changed = False
            for index in torch.randperm(len(names), generator=generator).tolist():
                changed |= self._improve(names[index])

    @property
    def is_exact(self) -> bool:
        """Are the networks the same in this coupling, up to rounding?"""
        return self.distance() <= _EXACT

    @property
    def tensors(self) -> list[str]:
        """Names of the tensors that are compared."""
        return list(self._a)

    def distance(self, keys: Sequence[str] | None = None) -> float:
        """D, in units of the reference's own Σ ‖A‖², over all tensors or the given ones."""
        links = tuple(self.links.values())
        known = self._measured if keys is None else None
        if known is not None and len(known[0]) == len(links) and all(map(operator.is_, known[0], links)):
            return known[1]
        apart = size = 0.0
        for key in self._a if keys is None else keys:
            if key not in self._b:
                continue
            a = self._a[key].double()
            apart += float((a - self.moved(key).double()).square().sum())
            size += float(a.square().sum())
        relative = apart / max(size, 1e-300)
        if keys is None:
            self._measured = (links, relative)
        return relative

    def moved(self, key: str, except_axis: int | None = None) -> Tensor:
        """A tensor of the model in the channels of the reference, along all axes but one."""
        tensor, axes = self._b[key], {}
        for name, number in self._by_tensor.get(key, []):
            place = self._of[name].places[number]
            if place.axis != except_axis and name in self.links:
                axes.setdefault(place.axis, []).append((self.links[name], place, self._at[name].places[number]))
        for axis in sorted(axes):
            if all(link.order is not None for link, _, _ in axes[axis]):
                for link, place, _ in axes[axis]:
                    tensor = move(tensor, (place, link.order))
            else:
                tensor = _mixed(tensor, self._a[key], axes[axis])
        return tensor

    def _improve(self, name: str) -> bool:
        old, group = self.links[name], self._of[name]
        numbers = [number for number, place in enumerate(group.places) if place.key in self._b]
        new = self._solve(name, self._cost(name, numbers))
        if new.same(old):
            return False
        keys = list(dict.fromkeys(group.places[number].key for number in numbers))
        before = self.distance(keys) if len(keys) < len(numbers) else None  # some tensor has the group on both sides
        self.links[name] = new
        if before is not None and not self.distance(keys) < before * (1 - 1e-9):
            self.links[name] = old
            return False
        return True

    def _settled(self, name: str, place: Place) -> bool:
        """Are the channels along the tensor's other axes coupled already?"""
        others = [other for other, n in self._by_tensor[place.key] if self._of[other].places[n].axis != place.axis]
        return all(other in self.links for other in others)

    def _cost(self, name: str, numbers: Sequence[int]) -> Tensor:
        """[n, k] squared distances of the model's channels to the reference's, summed over places."""
        return torch.stack([self._place_cost(name, number) for number in numbers]).sum(dim=0)

    def _place_cost(self, name: str, number: int) -> Tensor:
        place = self._of[name].places[number]
        others = [o for o, n in self._by_tensor[place.key] if self._of[o].places[n].axis != place.axis]
        links = tuple(self.links.get(other) for other in others)
        known = self._known.get((name, number))
        if known is not None and all(a is b for a, b in zip(known[0], links, strict=True)):
            return known[1]
        x = _channels(self.moved(place.key, except_axis=place.axis), place)
        y = _channels(self._a[place.key], self._at[name].places[number])
        cost = _squared_distances(x, y)
        if x.shape[1] > 1:
            self._known[name, number] = (links, cost)
        return cost

    def _norms(self, name: str) -> Tensor:
        """[n, k] distances of the channels' norms in every layer: all that can be compared across unknown inputs."""
        x, y = (
            torch.stack([_channels(view[p.key], p).norm(dim=1) for p in group.places if p.key in view], dim=1)
            for view, group in ((self._b, self._of[name]), (self._a, self._at[name]))
        )
        return _squared_distances(x, y)

    def masses(self, name: str) -> tuple[Tensor, Tensor]:
        """([n], [k]) the norm of every channel's weights, in the model and in the reference."""
        return _norm(self._b, self._of[name]), _norm(self._a, self._at[name])

    def _solve(self, name: str, cost: Tensor) -> Link:
        return solve_group(self._of[name], self._at[name], cost, self.masses(name) if self._soft else None)


def solve_group(
    source: CouplingGroup, target: CouplingGroup, cost: Tensor, masses: tuple[Tensor, Tensor] | None
) -> Link:
    """The best coupling of a group's channels for one cost [n, k]: one to one, or a plan.

    masses: ([n], [k]) of the plan; None for one-to-one couplings (uniform masses if the widths differ).
    """
    if source.n == target.n and (masses is None or source.rigid):
        order, mean = assign_blocks(cost, source.blocks, source.classes)
        return Link(order=order, cost=mean)
    a, b = masses if masses is not None else (torch.ones(source.n), torch.ones(target.n))
    plan, total = torch.zeros(source.n, target.n, dtype=torch.float64), 0.0
    for label in target.classes.unique():
        members = (source.classes == label).nonzero().flatten()
        places = (target.classes == label).nonzero().flatten()
        share = len(places) / target.n
        block, paid = solve(cost[members][:, places].double().cpu(), a[members], b[places])
        plan[members[:, None], places[None, :]] = share * block
        total += share * paid
    one_to_one = source.n == target.n and bool((plan > 0).sum(dim=0).eq(1).all() and (plan > 0).sum(dim=1).eq(1).all())
    return Link(order=plan.argmax(dim=0), cost=total) if one_to_one else Link(plan=plan, cost=total)


def _channels(tensor: Tensor, place: Place) -> Tensor:
    """[n, d] what a tensor has for each channel of a group."""
    tensor = tensor if tensor.numel() > _IN_DOUBLE else tensor.double()
    return gather(to_channels(tensor, place.axis, place.chunks), place.local.to(tensor.device))


def _norm(view: State, group: CouplingGroup) -> Tensor:
    norms = [_channels(view[p.key], p).double().square().sum(dim=1).cpu() for p in group.places if p.key in view]
    return torch.stack(norms).sum(dim=0).sqrt()


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    x, y = (x, y) if x.dtype == y.dtype else (x.double(), y.double())
    squares = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)[None, :]
    return squares.addmm_(x, y.T, alpha=-2).clamp_(min=0).double()


def _mixed(tensor: Tensor, like: Tensor, parts: Sequence[tuple[Link, Place, Place]]) -> Tensor:
    """A tensor with the channels along one axis merged by plans. like: the reference's tensor, for the axis' length."""
    _, first, target = parts[0]
    matrix = to_channels(tensor.double(), first.axis, first.chunks)
    length = target.length(like)
    mixed = matrix.clone() if length == len(matrix) else matrix.new_zeros(length, matrix.shape[1])
    for link, place, there in parts:
        values = gather(matrix, place.local.to(matrix.device))
        if link.order is not None:
            values = values[link.order]
        else:
            weights = link.columns().T if place.reads else link.rows()
            values = (row_average(weights) if place.averaged else weights).to(values) @ values
        spread = values.unflatten(1, (place.local.shape[1], matrix.shape[1]))
        local = there.local.to(matrix.device)
        mixed[local[local >= 0]] = spread[local >= 0]
    shape = list(tensor.shape)
    shape[first.axis] = length // (first.chunks if first.axis else 1)
    return from_channels(mixed, torch.empty(shape, device="meta"), first.axis, first.chunks)
