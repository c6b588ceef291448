"""The discarded twin: the network as it would be if the same channels had been cut and nothing fused.

It is what a user would have without us, so a step that leaves the network farther from where it was than its twin is,
on inputs that nothing was fitted to, says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning import _helpers, ops
from torch_pruning.dependency.group import Group

from intrafusion.groups.table import module_name
from intrafusion.running import evaluating, map_tensors, shares_first_axis, size_of, tensors_in

_SHARE, _LEAST, _FEW, _MOST = 32, 4, 8, 32
"""One input of `_SHARE` is held out, at least `_LEAST`, of 64 or more at least `_FEW`, at most `_MOST`: fewer say
nothing (four of 64 short texts hid an error that was a tenth above the cut's), and what is held out is not learnt from.
"""
_VALUES, _DRAWS = 2**18, 64
"""So many numbers are drawn where nothing else is there to judge with, or one input."""
_WORSE, _NOTHING, _ROUNDING = 1.02, 1e-4, 1e-5
ROUGHLY = 1.1
"""Instead of 1.02, where an example of one or two inputs judges, which need not be typical."""
BLINDLY = 0.88
"""Where nothing but noise judges: of 286 random networks (`tests/sweep`) seven were up to 5 % worse on other inputs and
up to 11 % better on noise."""


class WorseThanCut(UserWarning):
    """A step has left a network farther from what it was than plain cutting would have."""


@dataclass(frozen=True)
class Comparison:
    """How far a step has moved the network's output, relative to its norm, and how far plain cutting would have.

    step: its number. inputs: what the networks were run on, in words. margin: the factor up to which it is no worse.
    """

    step: int
    fused: float
    cut: float
    inputs: str
    margin: float = _WORSE

    @property
    def is_worse(self) -> bool:
        """By more than 2 %, or possibly, as far as the inputs can tell. (A number that is not finite is worse.)"""
        return not (self.fused <= self.margin * self.cut + _NOTHING or self.is_the_cut)

    @property
    def is_the_cut(self) -> bool:
        """Are both networks the same, up to rounding?"""
        return abs(self.fused - self.cut) <= _ROUNDING * self.cut

    def warning(self, fusion: str) -> WorseThanCut:
        """What to say of a step that is worse. fusion: the name of its settings."""
        left = "may have left" if self.fused <= _WORSE * self.cut else "left"
        return WorseThanCut(
            f"fusion={fusion!r} {left} this network worse than plain cutting would have: {self}. Compare both on your "
            "own data: fusion='calibrated' with calibration=<batches of your own> knows what the network really sees, "
            "fusion='discard' is the plain cut"
        )

    def __str__(self) -> str:
        return f"relative error of the output {self.fused:.3g}, plainly cut {self.cut:.3g} (on {self.inputs})"


@dataclass(frozen=True)
class _Cut:
    """One layer's part in the cut of a group, by names, so that it can be repeated on a copy."""

    name: str
    is_parameter: bool
    handler: Callable
    dim: int
    removed: list[int]


_NUMBERS = 2**22
"""So many numbers of one output are compared."""


@dataclass(frozen=True)
class Judges:
    """Inputs that two networks are compared on. told: what they are, in words. margin: see `Comparison`."""

    batches: Sequence[Any]
    told: str
    margin: float = _WORSE


class Twin:
    """dense: a copy of the network before the step, which becomes the twin when all is over. judges: to compare on,
    each for itself, the most telling first.
    """

    def __init__(self, dense: nn.Module, judges: Sequence[Judges]) -> None:
        self._dense, self._judges = dense, judges
        self._cuts: list[_Cut] = []
        self._names = {name for name, _ in dense.named_modules()}

    def note(self, graph: tp.DependencyGraph, group: Group) -> None:
        """A group is going to be cut; its layers still have their old tensors."""
        item: Any
        for item in group:
            target = item.dep.target
            is_parameter = target.type == ops.OPTYPE.PARAMETER
            removed = item.idxs
            if len(removed) and isinstance(removed[0], _helpers._HybridIndex):
                removed = _helpers.to_plain_idxs(removed)
            name = module_name(graph, target.module)
            if is_parameter or name in self._names:  # not what stands for a concat or a split in the graph
                self._cuts.append(_Cut(name, is_parameter, item.dep.handler, target.pruning_dim, list(removed)))

    @torch.no_grad()
    def compared(self, step: int, fused: nn.Module, run: Callable[[nn.Module, Any], Any]) -> Comparison | None:
        """Compare the fused network and the twin: where it is worse, or on the first judges. None if that says nothing.

        A network may be better on inputs like those that it was fitted to, or on noise, and worse on others.
        """
        if not self._cuts:
            return None
        dense = self._dense
        try:
            wanted = [outputs_on(dense, judges.batches, run) for judges in self._judges]
            given = [outputs_on(fused, judges.batches, run) for judges in self._judges]
            self._cut_(dense, fused)
            plain = [outputs_on(dense, judges.batches, run) for judges in self._judges]
        except Exception:  # a twin that does not run says nothing about the network that does
            return None
        found = []
        for judges, dense_gave, fused_gave, cut_gave in zip(self._judges, wanted, given, plain, strict=True):
            ours, cut = distance(fused_gave, dense_gave), distance(cut_gave, dense_gave)
            if ours is not None and cut is not None:
                found.append(Comparison(step, ours, cut, judges.told, judges.margin))
        return next((one for one in found if one.is_worse), found[0] if found else None)

    def _cut_(self, network: nn.Module, like: nn.Module) -> None:
        for cut in self._cuts:
            pruner: Any = cut.handler.__self__  # type: ignore[attr-defined]
            pruner.pruning_dim = cut.dim
            if cut.is_parameter:
                path, _, attribute = cut.name.rpartition(".")
                owner = network.get_submodule(path)
                setattr(owner, attribute, cut.handler(getattr(owner, attribute), cut.removed))
            else:
                cut.handler(network.get_submodule(cut.name), cut.removed)
        for name, module in like.named_modules():
            _take_sizes_(network.get_submodule(name), module)


def varied(example: Any) -> Any:
    """Inputs like the example: noise of its mean and spread, or standard normal where it is the same everywhere.

    Small inputs are drawn up to 64 times, if all tensors of the example share their first axis. What does not hold
    numbers with a fraction stays as it is.
    """
    values = max((value.numel() for value in tensors_in(example)), default=1)
    times = max(1, min(_DRAWS, _VALUES // max(1, values))) if shares_first_axis(example) else 1
    generator = torch.Generator().manual_seed(0)

    def noise(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value.repeat(times, *[1] * (value.dim() - 1))
        shape = (times * len(value), *value.shape[1:]) if value.dim() else ()
        drawn = torch.randn(shape, generator=generator)
        precise = value.float()
        says = value.numel() > 1 and bool((value != value.flatten()[0]).any())
        return (drawn.to(precise) * precise.std() + precise.mean() if says else drawn).to(value)

    return map_tensors(example, noise)


def says(example: Any) -> bool:
    """Does an example hold numbers with a fraction, and not the same everywhere?"""
    floating = [value.float() for value in tensors_in(example) if value.is_floating_point() and value.numel() > 1]
    return any(bool((value != value.flatten()[0]).any()) for value in floating)


def held_out(batches: Sequence, wanted: int | None = None) -> tuple[list, list]:
    """(batches to work on, batches to judge with): of 32 inputs or more one in 32 judges, at least 4 (of 64 or more 8),
    at most 32; or as many as are wanted.

    Inputs are parted along the first axis of a batch's tensors where they share one; otherwise whole batches are.
    """
    count = count_of(batches)
    least = _FEW if count >= 2 * _SHARE else _LEAST
    if wanted is None:
        wanted = min(_MOST, max(least, count // _SHARE)) if count >= _SHARE else 0
    kept: list = list(batches)
    judges: list = []
    while wanted > 0:
        batch = kept.pop()
        left = size_of(batch) - wanted
        if left > 0:
            kept.append(map_tensors(batch, lambda value, left=left: value[:left]))
            batch = map_tensors(batch, lambda value, left=left: value[left:])
        judges.insert(0, batch)
        wanted -= size_of(batch)
    return kept, judges


def count_of(batches: Iterable) -> int:
    """How many inputs there are."""
    return sum(map(size_of, batches))


def _take_sizes_(module: nn.Module, like: nn.Module) -> None:
    """Whatever plain numbers a layer has been given since, the same layer of the twin gets as well."""
    for key, value in vars(like).items():
        if not key.startswith("_") and _is_plain(value) and vars(module).get(key) != value:
            setattr(module, key, value)


def _is_plain(value: Any) -> bool:
    return isinstance(value, (int, float, str)) or (isinstance(value, tuple) and all(map(_is_plain, value)))


def outputs_on(network: nn.Module, batches: Iterable, run: Callable[[nn.Module, Any], Any]) -> list[list[Tensor]]:
    """What a network gives on every batch: its tensors with numbers that have a fraction, large ones sampled."""
    with torch.no_grad(), evaluating(network):
        return [
            [_sampled(value) for value in tensors_in(run(network, batch)) if value.is_floating_point()]
            for batch in batches
        ]


def _sampled(value: Tensor) -> Tensor:
    """An output, or of one that is very large (the scores of all tokens of a vocabulary) numbers spread over it."""
    if value.numel() <= _NUMBERS:
        return value
    step = value.numel() // _NUMBERS + 1
    return value.flatten()[:: step + 1 - step % 2].clone()  # an odd step goes through all columns of an even width


def distance(given: Sequence[Sequence[Tensor]], wanted: Sequence[Sequence[Tensor]]) -> float | None:
    """|given - wanted| / |wanted| over all tensors that have the same shape, where the latter is finite; None if there
    are none, or nothing is wanted.
    """
    pairs = [
        (torch.where(known := b.isfinite(), a.double(), 0.0), torch.where(known, b.double(), 0.0))
        for each, other in zip(given, wanted, strict=True)
        for a, b in zip(each, other, strict=False)
        if a.shape == b.shape and a.numel()
    ]
    norm = math.sqrt(sum(float(b.square().sum()) for _, b in pairs))
    return math.sqrt(sum(float((a - b).square().sum()) for a, b in pairs)) / norm if norm > 0 else None
