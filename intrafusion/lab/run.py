"""A run: the dense network, then for each ratio a discarded and a fused copy that keep the same channels.

Everything goes into one folder, which is enough to see what was done and to do it again. A cell that is finished is
never computed twice, however often the run is interrupted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from intrafusion.lab.bench import Bench
from intrafusion.lab.errors import LabError
from intrafusion.lab.folder import RESULTS, environment, prepare, write_cells
from intrafusion.lab.pruning import ALL
from intrafusion.lab.recipe.loader import Recipe
from intrafusion.lab.reports.report import write_report
from intrafusion.lab.results import Cell, Result, ResultStore, key_of_identity
from intrafusion.lab.study import Study
from intrafusion.lab.training import forget_checkpoint
from intrafusion.lab.training_record import copy_training
from intrafusion.training.processes import ALONE, Processes

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
        shared, processes: see :class:`Bench`. Only the main process knows and writes what is in the folder: the
            methods are its own.

    Raises:
        RecipeError: the recipe does not fit the network or the images, or its folder cannot be written.
        LabError: files are missing or broken, training diverges.
    """

    def __init__(
        self, recipe: Recipe, *, networks: Path | None = None, fresh: bool = False, progress: bool = True,
        shared: dict[str, Any] | None = None, processes: Processes = ALONE,
    ) -> None:  # fmt: skip
        self.recipe = recipe
        self.folder = Path(recipe.output).expanduser()
        processes.from_main(lambda: prepare(self.folder, recipe, processes.count))
        self.bench = Bench(recipe, networks or self.folder, progress, shared=shared, processes=processes)
        self.bench.prepare()
        if self.bench.folder != self.folder:
            copy_training(self.bench.training, self.folder)
        self.identities = {cell: self.bench.identity(cell) for cell in self.bench.cells()}
        self.keys = {cell: key_of_identity(identity) for cell, identity in self.identities.items()}
        processes.from_main(lambda: self._open(fresh))

    def _open(self, fresh: bool) -> None:
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
        versions = environment(self.recipe, self.bench.processes.count)
        study = Study(self.recipe, results, self._skipped, versions, self.bench.training)
        return study, write_report(study, self.folder)

    @property
    def _skipped(self) -> tuple[str, ...]:
        return self.bench.data.split("test").skipped


def run(recipe: Recipe, *, fresh: bool = False, progress: bool = True, processes: Processes = ALONE) -> Finished:
    """Do what a recipe says, resuming what is already in its output folder.

    Args:
        fresh: compute every cell again.
        progress: show progress bars (on a terminal only).
        processes: who trains and evaluates each network together: all of them call this, with the same recipe.

    Raises:
        RecipeError: the recipe does not fit the network or the images.
        LabError: files are missing or broken, training diverges, an output folder cannot be used.
        intrafusion.FusionError: a group cannot be pruned.
    """
    with torch_threads(recipe.threads):
        return _run(recipe, fresh, progress and processes.is_main, processes)


def _run(recipe: Recipe, fresh: bool, progress: bool, processes: Processes) -> Finished:
    opened = Run(recipe, fresh=fresh, progress=progress, processes=processes)
    cells, missing = processes.from_main(lambda: (list(opened.keys), opened.missing))
    bar = tqdm(
        missing, desc="cells", delay=1, leave=False, disable=None if progress else True,
        initial=len(cells) - len(missing), total=len(cells),
    )  # fmt: skip
    for cell in bar:
        bar.set_postfix_str(label(cell))
        result = opened.bench.measure(cell)
        processes.from_main(partial(opened.add, cell, result))
        _log.info("%s: %s in %.1f s", label(cell), result.accuracy, result.seconds)
    table = processes.from_main(lambda: opened.report()[1])
    return Finished(opened.folder, opened.folder / "report.md", table, len(missing))


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """So many threads of torch, and afterwards as many as before; ``None`` changes nothing."""
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
