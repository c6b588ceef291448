"""The results of a run, paired: every fused one with its discarded twin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from intrafusion.lab.paper import Published, published
from intrafusion.lab.pruning import ALL
from intrafusion.lab.recipe.loader import Recipe
from intrafusion.lab.results import GroupLine, Result
from intrafusion.lab.training_record import TrainingRecord


@dataclass(frozen=True)
class Pair:
    """A discarded and a fused network that keep the same channels."""

    group: str
    ratio: float
    discard: Result
    fused: Result

    @property
    def gain(self) -> float:
        """Points of accuracy that fusion saves."""
        return self.fused.accuracy.percent - self.discard.accuracy.percent

    @property
    def label(self) -> str:
        """The ratio, and the group if only one was pruned."""
        group = "" if self.group == ALL else f"{self.group}, "
        return f"{group}{self.ratio:.4g} removed"


@dataclass(frozen=True)
class Study:
    """All results of a run, the dense network first.

    Attributes:
        skipped: the images that were left out of the test.
        environment: versions and machine, by name.
        training: how the dense network was trained, if the recipe did it.
    """

    recipe: Recipe
    results: tuple[Result, ...]
    skipped: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    training: TrainingRecord | None = None

    @property
    def dense(self) -> Result:
        """The network before pruning."""
        return next(result for result in self.results if result.cell.method == "dense")

    @cached_property
    def pairs(self) -> list[Pair]:
        """One entry per group and ratio of which both networks are measured, in the order of the run."""
        pruned = [r for r in self.results if r.cell.stage == "pruned"]
        fused = {(r.cell.group, r.cell.ratio): r for r in pruned if r.cell.method == "fused"}
        places = [((r.cell.group, r.cell.ratio), r) for r in pruned if r.cell.method == "discard"]
        return [Pair(*place, discard, fused[place]) for place, discard in places if place in fused]

    @cached_property
    def published(self) -> Published | None:
        """The paper's figures for this set-up, if it has any."""
        return published(self.recipe, list(dict.fromkeys(pair.group for pair in self.pairs)))

    @property
    def middle(self) -> float:
        """The ratio nearest to one half: what is shown where one ratio has to do."""
        return min((pair.ratio for pair in self.pairs), key=lambda ratio: abs(ratio - 0.5), default=0.5)

    @property
    def middle_groups(self) -> list[GroupLine]:
        """What happened to the groups at that ratio, all steps together, but for those where nothing did."""
        lines = [line for pair in self.pairs if pair.ratio == self.middle for line in _all_steps(pair.fused.groups)]
        return [line for line in lines if line.before != line.after or line.reason]


def _all_steps(lines: Sequence[GroupLine]) -> list[GroupLine]:
    """One line per group: its width before the first step and after the last, every remark; a plan only of one step."""
    steps: dict[str, list[GroupLine]] = {}
    for line in lines:
        steps.setdefault(line.name, []).append(line)
    found = []
    for of in steps.values():
        first, last = of[0], of[-1]
        if len(of) > 1:
            reasons = dict.fromkeys(line.reason for line in of if line.reason)
            last = replace(last, before=first.before, cost=None, plan=(), reason="; ".join(reasons))
        found.append(last)
    return found
