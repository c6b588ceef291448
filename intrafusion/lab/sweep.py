"""A sweep: every point of a grid is a run in a folder of its own, and their cells are computed side by side."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from intrafusion.lab.bench import TRAINED
from intrafusion.lab.errors import LabError
from intrafusion.lab.executors import Executor, Failure, Task
from intrafusion.lab.files import write_atomic
from intrafusion.lab.folder import SWEEP, NotMeasuredError, check_free_for_sweep, read_study
from intrafusion.lab.recipe.loader import Point, Recipe, to_mapping
from intrafusion.lab.reports.comparison import NOTHING, Comparison, write_comparison
from intrafusion.lab.reports.report import write_report
from intrafusion.lab.results import Cell, Result, key_of_identity
from intrafusion.lab.run import Finished, Run, label
from intrafusion.lab.split.report import write_split_report
from intrafusion.lab.split.run import SPLIT, read_split
from intrafusion.lab.study import Study

_log = logging.getLogger(__name__)
_LONGEST_NAME = 100


@dataclass(frozen=True)
class Swept(Finished):
    """What a sweep leaves behind; failed: one line for each thing that could not be computed."""

    failed: tuple[str, ...] = ()


def sweep(points: Sequence[Point], executor: Executor, *, fresh: bool = False, progress: bool = True) -> Swept:
    """Do what every point of a sweep says, resuming what is already in the output folder.

    Cells that are the same at several points are computed once. One that fails stops no other: it is reported at the
    end, and tried again when the sweep is run again. A single point without settings has the folder of a plain run.

    Args:
        points: as :func:`intrafusion.lab.recipe.loader.read_points` gives them, with one output folder.
        fresh: compute every cell again.
        progress: show progress bars (on a terminal only).

    Raises:
        RecipeError: a recipe does not fit its network or its images, or the folder is that of a run; nothing is
            computed then.
        LabError: a dense network cannot be trained, or workers are lost.
    """
    for point in points:
        if point.recipe.split is not None:
            raise point.recipe.error("split", "not for a sweep; use `intrafusion run`, or --set split=null")
    folder = Path(points[0].recipe.output).expanduser()
    alone = len(points) == 1 and not points[0].settings
    if not alone:
        check_free_for_sweep(folder, points[0].recipe)
    names = [""] if alone else _names(points)
    recipes = [replace(p.recipe, output=str(folder / name)) for p, name in zip(points, names, strict=True)]
    networks = [folder if alone else folder / "networks" / _network_key(recipe) for recipe in recipes]
    _train(recipes, networks, executor)
    shared: dict[str, Any] = {}
    runs = [
        Run(recipe, networks=place, fresh=fresh, progress=progress, shared=shared)
        for recipe, place in zip(recipes, networks, strict=True)
    ]
    if not alone:
        plan = [{"folder": name, "settings": dict(p.settings)} for p, name in zip(points, names, strict=True)]
        write_atomic(folder / SWEEP, json.dumps({"points": plan}, indent=1) + "\n")
    computed, failed = _compute(runs, executor, progress)
    studies = [run.report() if run.measured else None for run in runs]
    if alone:
        table = studies[0][1] if studies[0] else NOTHING
    else:
        found = [(p.settings, study[0]) for p, study in zip(points, studies, strict=True) if study]
        table = write_comparison(Comparison(tuple(found), sum(len(run.missing) for run in runs)), folder)
    return Swept(folder, folder / "report.md", table, computed, tuple(failed))


def report_again(folder: Path) -> Finished:
    """Write the reports of a run or a sweep again from what its folder holds; nothing is computed.

    Raises:
        LabError: it is not the folder of a run or a sweep, or nothing is finished in it yet.
    """
    if (folder / SPLIT).is_file():
        divided, missing = read_split(folder)
        return Finished(folder, folder / "report.md", _with_missing(write_split_report(divided, folder), missing), 0)
    if not (folder / SWEEP).is_file():
        study, missing = read_study(folder)
        return Finished(folder, folder / "report.md", _with_missing(write_report(study, folder), missing), 0)
    try:
        plan = json.loads((folder / SWEEP).read_text(encoding="utf-8"))["points"]
        places = [(dict(entry["settings"]), folder / entry["folder"]) for entry in plan]
    except (ValueError, KeyError, TypeError) as error:
        raise LabError(f"{folder / SWEEP} is broken ({error!r}); run the sweep again to write it anew") from None
    found: list[tuple[dict[str, str], Study]] = []
    missing = 0
    for settings, place in places:
        try:
            study, lacking = read_study(place)
        except NotMeasuredError as error:
            missing += error.missing
            continue
        write_report(study, place)
        found.append((settings, study))
        missing += lacking
    table = write_comparison(Comparison(tuple(found), missing), folder)
    return Finished(folder, folder / "report.md", _with_missing(table, missing), 0)


def _with_missing(table: str, missing: int) -> str:
    return table if not missing else f"{table}\n\nnot finished: {missing} cells"


def _train(recipes: Sequence[Recipe], networks: Sequence[Path], executor: Executor) -> None:
    """Train every dense network that the recipes ask for and that is not there yet, side by side."""
    asked = {place: r for place, r in zip(networks, recipes, strict=True) if r.model.weights is None}
    tasks = [Task(recipe, place, None) for place, recipe in asked.items() if not (place / TRAINED).is_file()]
    if not tasks:
        return
    _log.info("dense networks to train: %d", len(tasks))
    failed = [outcome.message for _, outcome in executor.compute(tasks) if isinstance(outcome, Failure)]
    if failed:
        raise LabError("\n".join(dict.fromkeys(failed)))


def _compute(runs: Sequence[Run], executor: Executor, progress: bool) -> tuple[int, list[str]]:
    """Compute what is missing and add it where it belongs; the number of new cells, and what failed."""
    wanted: dict[str, list[tuple[Run, Cell]]] = {}
    for run in runs:
        for cell in run.missing:
            wanted.setdefault(run.keys[cell], []).append((run, cell))
    stored = ((key, run.store.get(key)) for run in runs for key in run.keys.values())
    finished = {key: result for key, result in stored if result is not None}
    tasks: list[Task] = []
    keys: list[str] = []
    for key, places in wanted.items():
        known = finished.get(key)
        if known is not None:
            _add(places, known)
            continue
        run, cell = places[0]
        tasks.append(Task(run.recipe, run.bench.folder, cell, timed=executor.alone))
        keys.append(key)
    failed: list[str] = []
    computed = 0
    bar = tqdm(total=len(tasks), desc="cells", unit="cell", delay=1, leave=False, disable=None if progress else True)
    with bar:
        for number, outcome in executor.compute(tasks):
            places = wanted[keys[number]]
            bar.update()
            if isinstance(outcome, Result):
                _add(places, outcome)
                computed += 1
            elif isinstance(outcome, Failure):
                failed += [f"{run.folder.name}, {label(cell)}: {outcome.message}" for run, cell in places]
    return computed, failed


def _add(places: Sequence[tuple[Run, Cell]], result: Result) -> None:
    for run, cell in places:
        run.add(cell, result)
        _log.info("%s, %s: %s in %.1f s", run.folder.name, label(cell), result.accuracy, result.seconds)


def _names(points: Sequence[Point]) -> list[str]:
    """A folder name for each point that says its settings and does not depend on the other points."""
    names: list[str] = []
    for point in points:
        text = ",".join(f"{key}={value}" for key, value in point.settings.items())
        name = re.sub(r"[^\w.,=+-]+", "_", text).strip("_.")
        if name != text or len(name) > _LONGEST_NAME:
            name = f"{name[:_LONGEST_NAME]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
        names.append(name)
    return names


def _network_key(recipe: Recipe) -> str:
    """Equal for recipes whose dense network is the same."""
    sections = (recipe.model, recipe.data, recipe.train)
    return key_of_identity({str(number): section and to_mapping(section) for number, section in enumerate(sections)})
