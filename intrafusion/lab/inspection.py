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
from intrafusion.lab.pruning import ALL, Coupled, coupled_layers, without_images
from intrafusion.lab.recipe import Recipe
from intrafusion.lab.results import Cell

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
class CutPreview:
    """One pruned network: its ratio, the one group that is pruned or ``"all"``, its size, its groups."""

    ratio: float
    group: str
    macs: int
    parameters: int
    groups: tuple[GroupPreview, ...]


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
        return "\n".join([head, *(line for cut in self.cuts for line in self._lines(cut))])

    def _lines(self, cut: CutPreview) -> Iterator[str]:
        what = "" if cut.group == ALL else f" of {cut.group} alone"
        yield (
            f"\n{cut.ratio:.4g} removed{what}: {cut.parameters:,} parameters ({cut.parameters / self.parameters:.1%}), "
            f"{cut.macs:,} MACs ({cut.macs / self.macs:.1%})"
        )
        rows = [_HEADER] + [
            (g.name, f"{g.before} -> {g.after}", g.outcome, ", ".join(g.producers[1:]), ", ".join(g.readers), g.reason)
            for g in cut.groups
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
        for row in rows:
            yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def inspect(recipe: Recipe, *, progress: bool = True) -> Inspection:
    """Prune copies of the network as the recipe says, without refitting any layer.

    Weights that the recipe would train stay random. That changes no width, unless channels are ranked globally.

    Raises:
        RecipeError, LabError, intrafusion.FusionError: as a run would.
    """
    fusion = replace(recipe.fusion, correct="none")
    bench = Bench(recipe, Path(recipe.output), progress, trained=False)
    coupled = {group.name: group for group in coupled_layers(bench.dense, bench.example, recipe.prune)}

    def preview(cell: Cell) -> CutPreview:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is only cut is in the table
            pruned = bench.prune(cell, without_images(recipe.prune), fusion)
        steps: dict[str, list[GroupReport]] = {}
        for entry in pruned.groups:
            steps.setdefault(entry.name, []).append(entry)
        order = [*(name for name in coupled if name in steps), *(name for name in steps if name not in coupled)]
        groups = tuple(_preview(coupled.get(name) or Coupled(name, (name,), ()), steps[name]) for name in order)
        return CutPreview(cell.ratio, cell.group, *_size(bench, pruned.model), groups)

    cuts = tuple(preview(cell) for cell in bench.cells() if cell.method == "fused")
    return Inspection(recipe.title, _weights(recipe), *_size(bench, bench.dense), cuts)


def _preview(layers: Coupled, steps: list[GroupReport]) -> GroupPreview:
    last = steps[-1]
    outcome = _OUTCOMES.get(last.merged, "fused")
    widths = steps[0].channels_before, last.channels_after
    return GroupPreview(layers.name, *widths, outcome, last.reason, layers.producers, layers.readers)


def _size(bench: Bench, model: nn.Module) -> tuple[int, int]:
    return count_macs(model, bench.example), count_parameters(model)


def _weights(recipe: Recipe) -> str:
    path = recipe.weights_path()
    if path is not None:
        return f"weights of {path}"
    if recipe.model.pretrained is not None:
        return f"weights: {recipe.model.weights}"
    if recipe.prune.global_pruning:
        return "untrained weights, so widths will differ: the global ranking depends on the weights"
    return "untrained weights, which give the widths of the trained ones"
