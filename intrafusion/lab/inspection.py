"""A dry run: what a recipe does to every group, without training and without measuring accuracy."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from intrafusion import GroupReport
from intrafusion.lab.bench import Bench
from intrafusion.lab.measure import count_macs, count_parameters
from intrafusion.lab.pruning import ALL, Coupled, Pruned, coupled_layers, without_images
from intrafusion.lab.recipe.loader import Recipe
from intrafusion.lab.recipe.sections import PruneSection
from intrafusion.lab.results import Cell
from intrafusion.lab.widths import ADVICE, MULTIPLE, odd_note, odd_widths

_OUTCOMES = {"selection": "selected", "untouched": "untouched"}
_HEADER = ("group", "channels", "outcome", "coupled with", "read by", "why")


@dataclass(frozen=True)
class GroupPreview:
    """One group: its width before and after.

    Attributes:
        outcome: ``fused``, ``selected`` (only cut) or ``untouched``.
        producers: the layers whose channels are cut together, the group's own name first.
        readers: the layers that lose the same input channels.
        reason: why it is not fused, or what is unusual.
    """

    name: str
    before: int
    after: int
    outcome: str
    reason: str
    producers: tuple[str, ...]
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Size:
    """Multiply-accumulates of one image, and parameters."""

    macs: int
    parameters: int


@dataclass(frozen=True)
class CutPreview:
    """One pruned network: its ratio, the one group that is pruned or ``"all"``, its size, its groups.

    Attributes:
        odd: groups with widths that are no multiples of 8, where the recipe has no ``round_to``.
        rounded: its size with ``round_to`` 8, if there are any.
    """

    ratio: float
    group: str
    macs: int
    parameters: int
    groups: tuple[GroupPreview, ...]
    odd: tuple[str, ...] = ()
    rounded: Size | None = None


@dataclass(frozen=True)
class Inspection:
    """The dense network and all that a recipe cuts from it; ``weights`` says which ones it was looked at with."""

    title: str
    weights: str
    macs: int
    parameters: int
    cuts: tuple[CutPreview, ...]

    def __str__(self) -> str:
        head = f"{self.title}: {self.parameters:,} parameters, {self.macs:,} MACs; {self.weights}"
        advice = [f"\n{ADVICE}"] if any(cut.odd for cut in self.cuts) else []
        return "\n".join([head, *(line for cut in self.cuts for line in self._lines(cut)), *advice])

    def _lines(self, cut: CutPreview) -> Iterator[str]:
        what = "" if cut.group == ALL else f" of {cut.group} alone"
        yield f"\n{cut.ratio:.4g} removed{what}: {self._size(cut)}"
        rows = [_HEADER] + [
            (g.name, f"{g.before} -> {g.after}", g.outcome, ", ".join(g.producers[1:]), ", ".join(g.readers), g.reason)
            for g in cut.groups
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
        for row in rows:
            yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        if cut.rounded is not None:
            yield odd_note(cut.odd)
            grows = (
                f"; a group of fewer than {MULTIPLE} channels would stay whole" if cut.rounded.macs > cut.macs else ""
            )
            yield f"With --set prune.round_to={MULTIPLE}: {self._size(cut.rounded)}{grows}"

    def _size(self, of: CutPreview | Size) -> str:
        return (
            f"{of.parameters:,} parameters ({of.parameters / self.parameters:.1%}), "
            f"{of.macs:,} MACs ({of.macs / self.macs:.1%})"
        )


def inspect(recipe: Recipe, *, progress: bool = True) -> Inspection:
    """Prune copies of the network as the recipe says, without refitting any layer.

    Weights that the recipe would train stay random. That changes no width, unless channels are ranked globally.

    Raises:
        RecipeError, LabError, intrafusion.FusionError: as a run would.
    """
    fusion = replace(recipe.fusion, correct="none")
    bench = Bench(recipe, Path(recipe.output), progress, trained=False)
    coupled = {group.name: group for group in coupled_layers(bench.dense, bench.example, recipe.prune)}

    settings = without_images(recipe.prune)

    def cut(cell: Cell, settings: PruneSection) -> Pruned:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is only cut is in the table
            return bench.prune(cell, settings, fusion)

    def preview(cell: Cell) -> CutPreview:
        pruned = cut(cell, settings)
        steps: dict[str, list[GroupReport]] = {}
        for entry in pruned.groups:
            steps.setdefault(entry.name, []).append(entry)
        order = [*(name for name in coupled if name in steps), *(name for name in steps if name not in coupled)]
        groups = tuple(_preview(coupled.get(name) or Coupled(name, (name,), ()), steps[name]) for name in order)
        odd = odd_widths((g.name, g.before, g.after) for g in groups) if settings.round_to is None else ()
        rounded = _size(bench, cut(cell, replace(settings, round_to=MULTIPLE)).model) if odd else None
        size = _size(bench, pruned.model)
        return CutPreview(cell.ratio, cell.group, size.macs, size.parameters, groups, odd, rounded)

    cuts = tuple(preview(cell) for cell in bench.cells() if cell.method == "fused")
    size = _size(bench, bench.dense)
    return Inspection(recipe.title, _weights(recipe), size.macs, size.parameters, cuts)


def _preview(layers: Coupled, steps: list[GroupReport]) -> GroupPreview:
    last = steps[-1]
    outcome = _OUTCOMES.get(last.merged, "fused")
    widths = steps[0].channels_before, last.channels_after
    return GroupPreview(layers.name, *widths, outcome, last.reason, layers.producers, layers.readers)


def _size(bench: Bench, model: nn.Module) -> Size:
    return Size(count_macs(model, bench.example), count_parameters(model))


def _weights(recipe: Recipe) -> str:
    path = recipe.weights_path()
    if path is not None:
        return f"weights of {path}"
    if recipe.model.pretrained is not None:
        return f"weights: {recipe.model.weights}"
    if recipe.prune.global_pruning:
        return "untrained weights, so widths will differ: the global ranking depends on the weights"
    return "untrained weights, which give the widths of the trained ones"
