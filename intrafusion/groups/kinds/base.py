"""A layer kind: which tensors of a layer a group's channels lie in, and how they mix. One class says it all.

    table -> slots (one layer's part in a group) -> places (one axis of one tensor)

Pruning mixes along the places, an alignment moves along them, a gradient is carried along them: all three read them
here. A new kind is a subclass of `LayerKind` and one call of `register`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import torch_pruning as tp
from torch import Tensor, nn

from intrafusion.groups.draft import Draft, Mix
from intrafusion.groups.gaussian import Gaussian
from intrafusion.groups.layout import gather, to_channels

Owner = Any
"""An nn.Module or a free nn.Parameter; torch types a module's attributes too loosely to say more."""


class Side(Enum):
    """What a layer does with the channels of a group."""

    MAKES = "adds them up from something else"
    READS = "makes something else of them"
    PASSES = "acts on them one by one"


@dataclass(frozen=True, eq=False)
class Place:
    """One axis of one tensor that a group's channels lie along.

    key: the tensor's name in the network's state. owner, attribute: the module that holds it, and where (a free
    parameter is its own owner, its attribute `data`). axis: never negative. local: [n, m] int64, the entries that
    channel i has there, padded with -1. chunks: of a grouped convolution whose axis 1 holds the channels of one chunk
    only (see `layout.to_channels`). averaged: a gain, which multiplies channels that are mixed already. reader: name of
    the layer whose inputs are these channels, if a hook on it can see them.
    """

    key: str
    owner: Owner
    attribute: str
    axis: int
    local: Tensor
    side: Side
    kind: LayerKind
    chunks: int = 1
    averaged: bool = False
    reader: str = ""

    @property
    def tensor(self) -> Tensor:
        return self.owner if isinstance(self.owner, nn.Parameter) else getattr(self.owner, self.attribute)

    def put(self, tensor: Tensor) -> Tensor:
        """Put another tensor there; returns the old one, which `put` would put back as the very object that it was."""
        old = getattr(self.owner, self.attribute)
        if isinstance(self.owner, nn.Parameter):
            self.owner.data = tensor
        elif self.attribute in self.owner._buffers:
            self.owner._buffers[self.attribute] = tensor
        else:
            same = isinstance(tensor, nn.Parameter)
            self.owner._parameters[self.attribute] = tensor if same else nn.Parameter(tensor, old.requires_grad)
        return old

    @property
    def parameter_name(self) -> str | None:
        """Where its owner has the parameter ('' if the owner is the parameter); None for a buffer."""
        if isinstance(self.owner, nn.Parameter):
            return ""
        return self.attribute if self.attribute in self.owner._parameters else None

    @property
    def reads(self) -> bool:
        """Mixed by S; every other place by R."""
        return self.side is Side.READS

    @property
    def is_filter(self) -> bool:
        """Does it hold, for each channel, the filter that makes it?"""
        return self.side is Side.MAKES and self.kind.is_map and self.tensor.dim() > 1

    def length(self, tensor: Tensor) -> int:
        """Number of entries along the axis, all chunks together."""
        return tensor.shape[self.axis] * (self.chunks if self.axis else 1)

    def change(self, rows: Mix, columns: Mix) -> Mix:
        """The side of a pair that mixes this place."""
        if self.reads:
            return columns
        return rows.average if self.averaged else rows


@dataclass(frozen=True, eq=False)
class Slot:
    """One layer's part in a group.

    size: how many channels the layer has on this side. local: [n, m] int64, the local channels that root channel i
    occupies here, padded with -1. chunks: how many equal chunks the local channels fall into (groups of a convolution
    or a GroupNorm); channels of different chunks never mix. axis: of the layer's weight. partner: the batch-norm that
    alone reads this layer's output, if any.
    """

    name: str
    owner: Owner
    kind: LayerKind
    side: Side
    size: int
    local: Tensor
    chunks: int = 1
    axis: int = 0
    partner: Any = None

    @property
    def places(self) -> tuple[Place, ...]:
        """The tensors of the layer that have the group's channels along an axis."""
        return self.kind.places(self)

    @property
    def reads(self) -> bool:
        """A linear layer or convolution (not depthwise) whose inputs are the channels."""
        return self.side is Side.READS

    @property
    def makes_channels(self) -> bool:
        """Something that can stand at the beginning: filters, an embedding, a parameter that is added."""
        return self.side is Side.MAKES

    @property
    def produces(self) -> bool:
        """A linear layer or convolution (not depthwise) whose outputs are the channels."""
        return self.side is Side.MAKES and self.kind.is_map

    @property
    def is_depthwise(self) -> bool:
        """A convolution that filters every channel for itself."""
        return self.kind.is_depthwise

    @property
    def has_filters(self) -> bool:
        """Produces or is depthwise: what it gives for a channel is the channel's own filter's."""
        return self.produces or self.is_depthwise

    @property
    def is_batchnorm(self) -> bool:
        return self.kind.is_batchnorm

    def place(self, attribute: str, axis: int | None = None, owner: Any = None, **fields: Any) -> Place | None:
        """The place of one tensor of the layer, on the slot's axis and side unless told otherwise; None if absent."""
        owner = self.owner if owner is None else owner
        tensor = getattr(owner, attribute, None)
        if not isinstance(tensor, Tensor):
            return None
        key = self.name if isinstance(owner, nn.Parameter) else f"{self.name}.{attribute}"
        fields = {"local": self.local, "side": self.side, "kind": self.kind, "key": key, **fields}
        return Place(
            owner=owner, attribute=attribute, axis=(self.axis if axis is None else axis) % tensor.dim(), **fields
        )


@dataclass(frozen=True, eq=False)
class Reached:
    """A layer that a group reaches, as torch-pruning sees it.

    node: of the dependency graph. outputs: is it cut at its outputs? local: as in `Slot`. tied: is its weight another
    layer's too? partner: the batch-norm that alone reads it, if it can be folded.
    """

    name: str
    owner: Owner
    node: Any
    outputs: bool
    local: Tensor
    tied: bool = False
    partner: Any = None

    def slot(self, kind: LayerKind, side: Side, size: int, chunks: int = 1, axis: int = 0, partner: Any = None) -> Slot:
        return Slot(self.name, self.owner, kind, side, size, self.local, chunks, axis, partner)


@dataclass(frozen=True, eq=False)
class Inner:
    """Channels inside a layer that no other layer shares: [n], their places, classes [n] and blocks [h, n / h].

    As in `places.CouplingGroup`; reason: why they must stay ('' if they may move).
    """

    name: str
    n: int
    places: tuple[Place, ...] = ()
    classes: Tensor | None = None
    blocks: Tensor | None = None
    reason: str = ""


class LayerKind(ABC):
    """One kind of layer. Kinds have no state: an instance serves all layers of its classes.

    modules: the classes it is for, subclasses included. pruner: what cuts it, if torch-pruning does not know how; only
    the registered classes themselves then count, as torch-pruning looks customised pruners up by class. is_map: has
    filters. is_composite: a norm whose forward is several operations of torch-pruning's graph. makes: layers of it make
    channels, so that a group may begin at one. rigid: why its channels can change places but not be merged ('' if they
    can). channel_axis: of its activations.
    """

    modules: tuple[type, ...] = ()
    pruner: tp.BasePruningFunc | None = None
    is_map: ClassVar[bool] = False
    is_composite: ClassVar[bool] = False
    is_depthwise: ClassVar[bool] = False
    is_batchnorm: ClassVar[bool] = False
    makes: ClassVar[bool] = False
    rigid: ClassVar[str] = ""
    channel_axis: ClassVar[int] = 1

    def of(self, owner: Owner) -> LayerKind:
        """The kind of one layer, where classes do not tell (a depthwise convolution)."""
        return self

    @abstractmethod
    def slot(self, at: Reached) -> Slot | str | None:
        """The layer's part in a group, None if it has none, or a sentence: why the group can only be cut."""

    def places(self, slot: Slot) -> tuple[Place, ...]:
        """Every tensor of the layer that has the slot's channels along an axis; those that are there."""
        return present(slot.place("weight"), slot.place("bias"))

    def write(self, draft: Draft, slot: Slot, rows: Mix, columns: Mix, group: Sequence[Slot]) -> None:
        """Put what a pair makes of the layer into `draft`: every place mixed by its side of the pair.

        group: all slots of the group.
        """
        for place in self.places(slot):
            by = place.change(rows, columns)
            draft.mix(place.owner, place.attribute, place.local, by, place.axis, place.chunks)

    def features(self, slot: Slot) -> Tensor | None:
        """[n, d] what makes each channel, batch-norm folded in, to be read only; None if the layer has no say in it."""
        return None

    def columns(self, slot: Slot, bn: Any) -> Tensor | None:
        """[n, d] what reads each channel, times the scale of the batch-norm behind (or None), to be read only."""
        return None

    def shifts(self, slot: Slot) -> Tensor | None:
        """[n, m] float64, what is added to each channel, batch-norm folded in; None if nothing is known."""
        return None

    def moments(self, slot: Slot, inputs: Gaussian | None) -> Gaussian | None:
        """What the layer gives for channels with these moments; inputs: None if they are not known or not asked for."""
        return inputs

    def pointwise(self, owner: Owner) -> Callable[[Tensor], Tensor] | None:
        """The function that a layer applies to every number, if it is one that treats all channels alike."""
        return None

    def inner(self, name: str, owner: Owner) -> Inner | None:
        """Channels inside the layer that may change places among themselves."""
        return None

    def can_fold(self, owner: Owner) -> bool:
        """Is a batch-norm behind the layer one affine map with it?"""
        return False

    def output_axis(self, owner: Owner) -> int:
        """Where the layer's weight has its output channels."""
        return 0

    def can_refit(self, owner: Owner) -> bool:
        """Is its output an affine regression on `patches`?"""
        return False


_KINDS: dict[type, LayerKind] = {}


def register(kind: LayerKind) -> LayerKind:
    """Make a kind known for its classes; a later one wins."""
    _KINDS.update(dict.fromkeys(kind.modules, kind))
    return kind


def kind_of(owner: Owner) -> LayerKind | None:
    """The kind of a layer or parameter, by its nearest registered class; None if there is none.

    A kind with a pruner of its own is for the very classes that it names: a subclass may hold its sizes elsewhere.
    """
    for number, cls in enumerate(type(owner).__mro__):
        kind = _KINDS.get(cls)
        if kind is not None and (number == 0 or kind.pruner is None):
            return kind.of(owner)
    return None


def torch_pruners() -> dict[type, tp.BasePruningFunc]:
    """What cuts the layers that torch-pruning does not know: for its `customized_pruners`, behind the user's own."""
    return {cls: kind.pruner for cls, kind in _KINDS.items() if kind.pruner is not None}


def making_classes() -> tuple[type, ...]:
    """The classes whose layers make channels."""
    return tuple(cls for cls, kind in _KINDS.items() if kind.makes)


def present(*places: Place | None) -> tuple[Place, ...]:
    return tuple(place for place in places if place is not None)


def own_values(slot: Slot) -> Tensor:
    """[n, m·d] float64, what a layer's weight (or the parameter itself) has for each channel."""
    weight = slot.owner if isinstance(slot.owner, nn.Parameter) else slot.owner.weight
    return gather(to_channels(weight.detach().double(), slot.axis), slot.local)
