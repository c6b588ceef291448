"""The loss between the networks of two or three files: measured, drawn, and written into a folder."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from intrafusion import align
from intrafusion.lab import weights
from intrafusion.lab.bench import Bench
from intrafusion.lab.files import write_atomic
from intrafusion.lab.landscape.figure import draw_paths, draw_plane
from intrafusion.lab.landscape.loss import Path as Line
from intrafusion.lab.landscape.loss import Slice, interpolate, plane, score
from intrafusion.lab.recipe.loader import Recipe
from intrafusion.lab.reports.tables import markdown_table, text_table
from intrafusion.lab.results import finite
from intrafusion.lab.run import torch_threads

LANDSCAPE, REPORT, LINE, PLANE = "landscape.json", "landscape.md", "landscape_line.png", "landscape_plane.png"
NAIVE, ALIGNED, REPAIRED = "naive", "aligned", "aligned, re-estimated"
_NAMES = ("A", "B", "C")
_HEADER = ["line", "loss barrier", "accuracy barrier", "highest loss", "lowest accuracy"]


@dataclass(frozen=True, kw_only=True)
class LandscapeSettings:
    """What is measured.

    Attributes:
        split: whose images score the networks; nothing is selected on them.
        steps: points along each line, at least 2.
        resolution: points along each side of the plane, at least 2.
        images: unlabelled training images on which batch-norm statistics are re-estimated for the third line, and for
            the plane; 0 leaves them interpolated.
    """

    split: Literal["validation", "test"] = "validation"
    steps: int = 11
    resolution: int = 11
    images: int = 250


@dataclass(frozen=True)
class Landscape:
    """The lines from A to B by name, and the plane through A, B and C, if there is a C; B and C aligned to A in it.

    files: of the networks, A first; count: images that scored them; unaligned: groups of channels of B that stay in
    their order, and why.
    """

    title: str
    settings: LandscapeSettings
    files: tuple[Path, ...]
    count: int
    paths: Mapping[str, Line]
    unaligned: Mapping[str, str]
    plane: Slice | None = None

    @property
    def rows(self) -> list[list[str]]:
        """One per line; accuracies in per cent, their barrier in points."""
        found = []
        for name, path in self.paths.items():
            row = [f"{path.barrier:.4f}", f"{100 * path.accuracy_barrier:.2f}"]
            found.append([name, *row, f"{path.loss.max():.4f}", f"{100 * path.accuracy.min():.2f} %"])
        return found

    def __str__(self) -> str:
        return f"{self.summary}\n\n{text_table(_HEADER, self.rows)}"

    @property
    def summary(self) -> str:
        """The networks, and how good each is."""
        path = next(iter(self.paths.values()))
        scores = [(name, path.loss[at], 100 * path.accuracy[at]) for name, at in (("A", 0), ("B", -1))]
        ends = (f"{name}: loss {loss:.4f}, {accuracy:.2f} %" for name, loss, accuracy in scores)
        return f"{self.title}, {self.count:,} {self.settings.split} images; {'; '.join(ends)}"

    def plain(self) -> dict[str, Any]:
        """Everything measured, in plain values; null where a loss is not finite."""
        lines = {
            name: {key: getattr(path, key).tolist() for key in ("t", "loss", "accuracy")}
            | {"loss_barrier": path.barrier, "accuracy_barrier": path.accuracy_barrier}
            for name, path in self.paths.items()
        }
        keys = ("x", "y", "loss", "accuracy", "corners")
        return finite({
            "title": self.title,
            "networks": dict(zip(_NAMES, map(str, self.files), strict=False)),
            "split": self.settings.split,
            "images": self.count,
            "re_estimated_on": self.settings.images if REPAIRED in self.paths else 0,
            "lines": lines,
            "unaligned": dict(self.unaligned),
            "plane": None if self.plane is None else {key: getattr(self.plane, key).tolist() for key in keys},
        })  # fmt: skip


def measure_landscape(
    recipe: Recipe, files: tuple[Path, ...], settings: LandscapeSettings, *, progress: bool = True
) -> Landscape:
    """Score the lines between the networks of two files, and the plane through those of three.

    Args:
        files: state dicts of the recipe's dense network, as safetensors; the others are aligned to the first.

    Raises:
        RecipeError: the recipe does not fit the network or the images.
        LabError: a file is missing or belongs to another network, or a loss at an end is not finite.
    """
    with torch_threads(recipe.threads):
        return _measured(recipe, files, settings, progress)


def _measured(recipe: Recipe, files: tuple[Path, ...], settings: LandscapeSettings, progress: bool) -> Landscape:
    untrained = replace(recipe, model=replace(recipe.model, weights=None, download=False))
    bench = Bench(untrained, Path(recipe.output), progress, trained=False)
    networks = [_loaded(bench.dense, path) for path in files]
    data, example = bench.data, bench.example
    evaluation = partial(score, data=data, split=settings.split, batch_size=recipe.data.batch_size)
    first, second, *_ = networks
    moved, unaligned = zip(*(_aligned(other, first, example) for other in networks[1:]), strict=True)
    aligned = [first, *moved]
    images = _statistics_images(bench, first, settings.images)
    line = partial(interpolate, first, evaluation=evaluation, steps=settings.steps, progress=progress)
    paths = {NAIVE: line(second), ALIGNED: line(aligned[1])}
    if images is not None:
        paths[REPAIRED] = line(aligned[1], batches=images)
    found = None
    if len(files) == 3:
        found = plane(aligned, evaluation, resolution=settings.resolution, batches=images, progress=progress)
    count = len(data.split(settings.split))
    return Landscape(recipe.title, settings, files, count, paths, unaligned[0], found)


def write_landscape(found: Landscape, folder: Path) -> None:
    """Write ``landscape.json``, ``landscape.md`` and the figures.

    Raises:
        OSError: the folder cannot be written.
    """
    split = found.settings.split
    write_atomic(folder / LINE, draw_paths(found.paths, f"{found.title}: from A to B", split=split))
    if found.plane is None:
        (folder / PLANE).unlink(missing_ok=True)
    else:
        title = f"{found.title}: B and C aligned to A"
        write_atomic(folder / PLANE, draw_plane(found.plane, _NAMES, title, split=split))
    write_atomic(folder / REPORT, _markdown(found))
    write_atomic(folder / LANDSCAPE, json.dumps(found.plain(), indent=1, allow_nan=False) + "\n")


def _markdown(found: Landscape) -> str:
    networks = "\n".join(f"* {name}: `{path}`" for name, path in zip(_NAMES, found.files, strict=False))
    repaired = (
        f" Re-estimated: batch-norm statistics of every point in between from {found.settings.images} training images."
        if REPAIRED in found.paths
        else ""
    )
    parts = [
        f"# The loss between networks: {found.title}",
        networks,
        f"{found.summary}.",
        markdown_table(_HEADER, found.rows, "lrrrr"),
        "A barrier is the largest rise of the loss, or fall of the accuracy in points, over the straight line between "
        "the ends' own. Aligned: the channels of B are first put in the order of A's, which changes nothing that B "
        f"computes.{repaired}",
        f"![Loss and accuracy from A to B]({LINE})",
        *([f"![Loss over the plane through A, B and C]({PLANE})"] if found.plane is not None else []),
    ]
    return "\n\n".join(parts) + "\n"


def _loaded(blank: nn.Module, path: Path) -> nn.Module:
    network = copy.deepcopy(blank)
    weights.load_weights_(network, path)
    return network


def _aligned(other: nn.Module, first: nn.Module, example: Tensor) -> tuple[nn.Module, dict[str, str]]:
    alignment = align(other, first, example)
    return alignment.apply(other), alignment.unaligned


def _statistics_images(bench: Bench, network: nn.Module, count: int) -> list[Tensor] | None:
    """Training images, if there are statistics to re-estimate on them."""
    if count == 0 or not any(key.endswith("running_mean") for key in network.state_dict()):
        return None
    return [images.to(bench.device) for images, _ in bench.data.draw("train", count, seed=0)]
