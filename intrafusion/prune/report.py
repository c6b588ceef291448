"""What a pruning step did to every group, and what it could not do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from intrafusion.prune.sizes import Attribute
from intrafusion.prune.twin import Comparison

_HEADER = ("group", "channels", "plan cost", "merged by", "note")


@dataclass(frozen=True)
class GroupReport:
    """One group of one step.

    name: the layer that gives the group its channels, with its width before and after; cost: <C, P> of the plan (None
    if there was none); merged: the merge rule, `selection` (cut only) or `untouched`; reason: why it was not fused, or
    what is unusual; plan: for each channel the kept channel (both by their number before the step) that the plan gives
    most of it to, and that part of it in [0, 1]; (-1, 0.0) for a channel that is left out, () if there was no plan.
    """

    name: str
    step: int
    channels_before: int
    channels_after: int
    merged: str
    cost: float | None = None
    reason: str = ""
    plan: tuple[tuple[int, float], ...] = ()

    def cells(self) -> tuple[str, ...]:
        cost = "" if self.cost is None else f"{self.cost:.4g}"
        return self.name, f"{self.channels_before} -> {self.channels_after}", cost, self.merged, self.reason


@dataclass(frozen=True)
class Allocation:
    """ratios: of every group that took part, by the name of its first layer: the equal ones where those did better.
    equal, measured: what the network's output lost with equal ratios and with unequal ones, on `inputs`, by `measure`:
        the relative error of the output, or of a language model KL(before | now) of the next token in nats.
    """

    ratios: Mapping[str, float]
    equal: float
    measured: float
    inputs: str
    measure: str = "relative error of the output"

    def __str__(self) -> str:
        moved = "channels were moved between groups" if self.measured < self.equal else "all groups kept their ratio"
        errors = f"{self.measure} {self.measured:.3g}, with the ratios as they were {self.equal:.3g}"
        return f"{moved}: {errors} (on {self.inputs})"


@dataclass
class Report:
    """All groups so far, in the order in which they were pruned; printing it gives a table.

    comparisons: of the whole network with what plain cutting would have left, one per step. attributes: those that hold
    widths and were set during steps, by us or by the user. allocation: how channels were moved between groups.
    """

    groups: list[GroupReport] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    attributes: list[Attribute] = field(default_factory=list)
    allocation: Allocation | None = None

    def mark(self) -> tuple[int, int, int]:
        """How much has been reported."""
        return len(self.groups), len(self.comparisons), len(self.attributes)

    def back_to(self, mark: tuple[int, int, int]) -> None:
        """Forget what has been reported since."""
        for entries, length in zip((self.groups, self.comparisons, self.attributes), mark, strict=True):
            del entries[length:]  # type: ignore[attr-defined]

    @property
    def fused(self) -> list[GroupReport]:
        return [group for group in self.groups if group.merged not in ("selection", "untouched")]

    @property
    def fallbacks(self) -> list[GroupReport]:
        """Groups that were only cut although fusion was asked for."""
        return [group for group in self.groups if group.merged == "selection" and group.reason]

    def __str__(self) -> str:
        if not self.groups:
            return "nothing pruned yet"
        rows = [_HEADER, *(group.cells() for group in self.groups)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        told = [f"set {one}" for one in self.attributes]
        told += [] if self.allocation is None else [str(self.allocation)]
        told += [f"step {one.step}: {one}" for one in self.comparisons]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *told])
