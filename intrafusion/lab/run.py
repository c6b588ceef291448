"""A run: the dense network, then for each ratio a discarded and a fused copy that keep the same channels.

Everything goes into one folder, which is enough to see what was done and to do it again. A cell that is finished is
never computed twice, however often the run is interrupted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from intrafusion.lab.bench import Bench, forget_checkpoint
from intrafusion.lab.errors import LabError
from intrafusion.lab.folder import RESULTS, environment, prepare, write_cells
from intrafusion.lab.pruning import ALL
from intrafusion.lab.recipe import Recipe
from intrafusion.lab.report import Study, write_report
from intrafusion.lab.results import Cell, Result, ResultStore, key_of_identity

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finished:
    """What a run leaves behind: its folder, the report in it, the table for the terminal, the number of new cells."""

    folder: Path
    report: Path
    table: str
    computed: int


class Run:
    """A recipe with its folder and what is finished of it.

    Args:
        networks: where a trained network is kept; the folder of the run by default.
        fresh: treat every finished cell as not there.
        shared: see :class:`Bench`.

    Raises:
        RecipeError: the recipe does not fit the network or the images, or its folder cannot be written.
        LabError: files are missing or broken, training diverges.
    """

    def __init__(
        self, recipe: Recipe, *, networks: Path | None = None, fresh: bool = False, progress: bool = True,
        shared: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.recipe = recipe
        self.folder = Path(recipe.output).expanduser()
        prepare(self.folder, recipe)
        self.bench = Bench(recipe, networks or self.folder, progress, shared=shared)
        self.bench.prepare()
        self.identities = {cell: self.bench.identity(cell) for cell in self.bench.cells()}
        self.keys = {cell: key_of_identity(identity) for cell, identity in self.identities.items()}
        self.store = ResultStore(self.folder / RESULTS)
        if fresh:
            self.store.forget()
            for cell in self.keys:
                forget_checkpoint(self.bench.checkpoint(cell))
        write_cells(self.folder, self.keys, self._skipped)

    @property
    def missing(self) -> list[Cell]:
        """The cells that are not finished, in order."""
        return [cell for cell, key in self.keys.items() if self.store.get(key) is None]

    @property
    def measured(self) -> bool:
        """Whether there is something to report on: the dense network at least."""
        return next(iter(self.keys)) not in self.missing

    def add(self, cell: Cell, result: Result) -> None:
        """Keep a result; it is on the disk on return."""
        self.store.add(self.keys[cell], result, self.identities[cell])
        forget_checkpoint(self.bench.checkpoint(cell))

    def report(self) -> tuple[Study, str]:
        """Write the report of what is finished; return it as a study and as a table for the terminal."""
        found = [self.store.get(key) for key in self.keys.values()]
        results = tuple(result for result in found if result is not None)
        _check_twins(results)
        study = Study(self.recipe, results, self._skipped, environment(self.recipe))
        return study, write_report(study, self.folder)

    @property
    def _skipped(self) -> tuple[str, ...]:
        return self.bench.data.split("test").skipped


def run(recipe: Recipe, *, fresh: bool = False, progress: bool = True) -> Finished:
    """Do what a recipe says, resuming what is already in its output folder.

    Args:
        fresh: compute every cell again.
        progress: show progress bars (on a terminal only).

    Raises:
        RecipeError: the recipe does not fit the network or the images.
        LabError: files are missing or broken, training diverges, an output folder cannot be used.
        intrafusion.FusionError: a group cannot be pruned.
    """
    with _threads(recipe.threads):
        return _run(recipe, fresh, progress)


def _run(recipe: Recipe, fresh: bool, progress: bool) -> Finished:
    opened = Run(recipe, fresh=fresh, progress=progress)
    missing = opened.missing
    bar = tqdm(
        missing, desc="cells", delay=1, leave=False, disable=None if progress else True,
        initial=len(opened.keys) - len(missing), total=len(opened.keys),
    )  # fmt: skip
    for cell in bar:
        bar.set_postfix_str(label(cell))
        result = opened.bench.measure(cell)
        opened.add(cell, result)
        _log.info("%s: %s in %.1f s", label(cell), result.accuracy, result.seconds)
    _, table = opened.report()
    return Finished(opened.folder, opened.folder / "report.md", table, len(missing))


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_twins(results: tuple[Result, ...]) -> None:
    kept = {replace(r.cell, method="fused"): r.kept for r in results if r.cell.method == "discard"}
    for result in results:
        if result.cell.method == "fused" and kept.get(result.cell, result.kept) != result.kept:
            raise LabError(
                f"{label(result.cell)}: the fused and the discarded network keep different channels, so their "
                "accuracies cannot be compared; this is a defect of intrafusion, please report it"
            )


def label(cell: Cell) -> str:
    """A cell in a few words."""
    if cell.method == "dense":
        return "dense"
    group = "" if cell.group == ALL else f"{cell.group} "
    tuned = "" if cell.stage == "pruned" else f", fine-tuned with seed {cell.seed}"
    return f"{group}{cell.ratio:.0%} {cell.method}{tuned}"
