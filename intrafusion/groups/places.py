"""Which entries of which tensors move when a channel moves, and moving them: tensors in, tensors out.

A network's parameters and buffers are a `State`; a `CouplingGroup` says where its channels lie in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from intrafusion.groups.kinds.base import Place
from intrafusion.groups.layout import from_channels, to_channels

State = dict[str, Tensor]
"""A network's parameters and buffers by name, each tensor once."""

_AT_ONCE = 2**18
"""So many numbers of a large tensor are moved at once: they fit in a cache."""


@dataclass(frozen=True, eq=False)
class CouplingGroup:
    """Channels that can only change places together with all that produces and reads them.

    n: number of channels. classes: [n] int64, channels with different labels never change places. blocks: [h, n / h]
    int64, the channels of each head of an attention layer: heads may change places as wholes, their channels inside
    them (other groups are one block). position: of the first layer in the forward pass. reason: why the channels must
    stay where they are ('' if they may move). rigid: they may change places, but not be merged. roots: [n] the
    channels' numbers in torch-pruning's group `table`.
    """

    name: str
    n: int
    places: tuple[Place, ...]
    classes: Tensor
    blocks: Tensor
    position: int
    reason: str = ""
    rigid: bool = False
    roots: Tensor | None = None
    table: str = ""

    @classmethod
    def fixed(cls, name: str, n: int, position: int, reason: str) -> CouplingGroup:
        """A group of which nothing is known but that it must be left alone."""
        return cls(name, n, (), torch.arange(n), torch.arange(n)[None], position, reason)

    @property
    def can_move(self) -> bool:
        return len(self.blocks) > 1 or len(self.classes.unique()) < self.n

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors that a permutation moves."""
        return tuple(dict.fromkeys(place.key for place in self.places))


def state_of(model: nn.Module) -> State:
    """Detached parameters and buffers by name, without copies; a tensor with two names appears once."""
    return {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def load_state_(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy `state` into the network's own tensors, in their dtype."""
    with torch.no_grad():
        for name, tensor in state_of(model).items():
            tensor.copy_(state[name])


def permuted(state: State, groups: Sequence[CouplingGroup], orders: Mapping[str, Tensor]) -> State:
    """The state with the channels of each group in another order; groups without an order stay.

    orders: [n] per group name: channel orders[i] takes the place of channel i. Tensors that do not move are shared.
    """
    moves: dict[str, list[tuple[Place, Tensor]]] = {}
    for group in groups:
        order = orders.get(group.name)
        if order is None or torch.equal(order, torch.arange(group.n)):
            continue
        for place in group.places:
            moves.setdefault(place.key, []).append((place, order))
    return {**state, **{key: move(state[key], *several) for key, several in moves.items()}}


def move(tensor: Tensor, *moves: tuple[Place, Tensor]) -> Tensor:
    """A new tensor with its channels in other orders. moves: places, on any axes, each with its order [n]."""
    by_axis: dict[int, tuple[Place, Tensor]] = {}
    for place, order in moves:
        _, index = by_axis.setdefault(place.axis, (place, torch.arange(place.length(tensor))))
        fill_(index, place, place.local[order])
    if by_axis.keys() == {0, 1} and by_axis[1][0].chunks == 1:
        return _take_both(tensor, *(by_axis[axis][1].to(tensor.device) for axis in (0, 1)))
    for place, index in by_axis.values():
        tensor = take(tensor, place, index)
    return tensor


def _take_both(tensor: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Some rows at a time: a large weight is then read and written once, not once for each axis."""
    result = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    for at in torch.arange(len(rows), device=rows.device).split(max(1, _AT_ONCE // max(1, tensor[0].numel()))):
        torch.index_select(tensor[rows[at]], 1, columns, out=result[at[0] : at[-1] + 1])
    return result


def fill_(index: Tensor, place: Place, source: Tensor) -> None:
    """Write into `index`, for the entries of a place [n, m], which entries [n, m] they are taken from."""
    there = place.local >= 0
    index[place.local[there]] = source[there]


def take(tensor: Tensor, place: Place, index: Tensor) -> Tensor:
    """The entries `index` of a tensor along a place's axis."""
    index = index.to(tensor.device)
    if place.chunks == 1 or place.axis == 0:
        return tensor.index_select(place.axis, index)
    shape = list(tensor.shape)
    shape[place.axis] = len(index) // place.chunks
    matrix = to_channels(tensor, place.axis, place.chunks)
    return from_channels(matrix[index], torch.empty(shape, device="meta"), place.axis, place.chunks)


def random_orders(groups: Sequence[CouplingGroup], generator: torch.Generator) -> dict[str, Tensor]:
    """A random order of the channels of every group that may move, of those that its table allows."""
    return {group.name: _random_order(group, generator) for group in groups if not group.reason}


def _random_order(group: CouplingGroup, generator: torch.Generator) -> Tensor:
    exchanged = group.blocks[torch.randperm(len(group.blocks), generator=generator)]
    order = torch.arange(group.n)
    for target, source in zip(group.blocks, exchanged, strict=True):
        for label in group.classes[target].unique():
            to, members = target[group.classes[target] == label], source[group.classes[source] == label]
            order[to] = members[torch.randperm(len(members), generator=generator)]
    return order
