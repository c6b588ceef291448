"""The socket for methods: what one says and what it is told, and the registry of all of them.

A method turns a plan into a pair (R, S) for every group, and may put layers right on the way. The smallest one is a
function from a plan to a pair:

    @method("mine")
    def mine(plan: Plan) -> Pair: ...

One that wants to see the network is a class:

    @method("theirs")
    class Theirs(Method):
        inputs = "calibration"

        def pair(self, table, plan, view): ...
        def repair_(self, layer, view): ...
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from intrafusion.correct.circuits import Reduction
from intrafusion.correct.correction import LayerView
from intrafusion.groups.apply import Rewrite
from intrafusion.groups.heads import Heads
from intrafusion.groups.table import GroupTable
from intrafusion.ot import Pair, Plan

if TYPE_CHECKING:
    from intrafusion.methods.view import View

INPUTS = ("none", "synthetic", "calibration")
"""What a method runs the network on: nothing, inputs that are made for it, or the user's own."""


class Method:
    """One way of merging channels. An object lives for one pruning step, and may remember what it likes.

    Groups come in the order of the forward pass if the method asks for samples or repairs, else in torch-pruning's.

    Attributes:
        inputs: one of `INPUTS`.
        fills_up: whether few inputs of the user's own are filled up with synthetic ones.
        samples: whether `View.samples` is asked for (they cost one pass of the dense network).
        sources: whether samples say what a reader's inputs were made of as well, to choose rows on.
        after_cut: whether `repair_` is called for a layer when its own group has been cut, or before.
        sensitivity: whether `LayerView.sensitivity` is asked for (it costs a pass forward and backward).
        circuits: whether the channels inside of attention heads are rewritten before some are cut, and what reads the
            heads is put right, so that cutting them is more than that.
        plan: whether a plan is computed; otherwise the one that `pair` gets says which channels are kept, and no more.
    """

    inputs: str = "none"
    fills_up: bool = False
    samples: bool = False
    sources: bool = True
    after_cut: bool = False
    sensitivity: bool = False
    plan: bool = True
    circuits: bool = False

    def begin(self, view: View, tables: Sequence[GroupTable]) -> None:
        """Called once, before the first cut, with the groups that are going to be cut."""

    def pair(self, table: GroupTable, plan: Plan, view: View) -> Pair:
        """The pair for a group; `plan.kept` are the channels that stay. It must not change the network."""
        raise NotImplementedError(f"{type(self).__name__} gives no pair: define pair(table, plan, view)")

    def rewrite(self, table: GroupTable, pair: Pair, view: View) -> Rewrite | None:
        """What is to be written besides the pair, if anything; averages of the network and gradients follow it."""

    def reduction(self, block: Heads, moments: Mapping[str, Tensor], kept: Tensor) -> Reduction:
        """What becomes of the channels inside of a block's heads, of which `kept` stay, if `circuits` is set.

        moments: see `HeadMoments`; they are measured where `samples` or repairs are asked for.
        """
        return Reduction(block, moments, kept)

    def mixed_(self, table: GroupTable, pair: Pair, view: View) -> None:
        """Called when a pair has been written into the group's tensors, before the cut."""

    def repair_(self, layer: LayerView, view: View) -> None:
        """Called for every layer behind the first cut, in the order of the forward pass."""

    def end_(self, view: View) -> None:
        """Called after the last cut and repair."""

    @property
    def label(self) -> str:
        """What a report calls it."""
        return getattr(self, "name", type(self).__name__)

    @property
    def looks_ahead(self) -> bool:
        """Does it look at the network before the first cut, and so at all groups?"""
        return self.inputs != "none" or type(self).begin is not Method.begin

    @property
    def repairs(self) -> bool:
        """Does it put layers right on the way?"""
        return type(self).repair_ is not Method.repair_


class Rule(Method):
    """A function from a plan to a pair, as a method."""

    def __init__(self, rule: Callable[[Plan], Pair], name: str = "") -> None:
        self.rule, self.name = rule, name

    def pair(self, table: GroupTable, plan: Plan, view: View) -> Pair:
        return self.rule(plan)


METHODS: dict[str, Callable[[], Method]] = {}
"""What makes a new object of every registered method, by name."""

_Registered = TypeVar("_Registered", bound=Callable)


def method(name: str) -> Callable[[_Registered], _Registered]:
    """Register a function from a plan to a pair, or a subclass of `Method`, under `name`.

    Raises ValueError if the name is taken, TypeError for anything else.
    """

    def register(value: _Registered) -> _Registered:
        if name in METHODS:
            raise ValueError(f"a method named {name!r} exists already")
        METHODS[name] = _maker(value, name)
        return value

    return register


def merge_rule(name: str) -> Callable[[_Registered], _Registered]:
    """The same, called by what a function from a plan to a pair is."""
    return method(name)


def find_method(name: str) -> Callable[[], Method]:
    """What makes the method `name`: a registered one, or `package.module:name` of a function or a class.

    Raises ValueError that says what there is, or what went wrong with the import.
    """
    if name in METHODS:
        return METHODS[name]
    if ":" not in name:
        known = ", ".join(map(repr, METHODS))
        raise ValueError(f"unknown method {name!r}: choose one of {known}, or name one as 'package.module:function'")
    place, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(place), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"method {name!r} cannot be imported: {error}") from error
    try:
        return _maker(found, name)
    except TypeError as error:
        raise ValueError(f"method {name!r}: {error}") from error


def _maker(value: Any, name: str) -> Callable[[], Method]:
    if isinstance(value, type) and issubclass(value, Method):
        if value.inputs not in INPUTS:
            raise TypeError(
                f"{value.__name__}.inputs is {value.inputs!r}: choose one of {', '.join(map(repr, INPUTS))}"
            )
        return _named(value, name)
    if isinstance(value, type) or not callable(value):
        raise TypeError(f"{value!r} is neither a function from a plan to a pair nor a subclass of Method")
    rule: Any = value
    return lambda: Rule(rule, name)


def _named(cls: type[Method], name: str) -> Callable[[], Method]:
    def make() -> Method:
        made = cls()
        made.name = name  # type: ignore[attr-defined]
        return made

    return make
