"""A run: the dense network, then for each ratio a discarded and a fused copy that keep the same channels.

Everything goes into one folder, which is enough to see what was done and to do it again. A cell that is finished is
never computed twice, however often the run is interrupted.
"""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import torch
from tqdm import tqdm

from intrafusion.lab.bench import Bench, forget_checkpoint
from intrafusion.lab.errors import LabError
from intrafusion.lab.files import write_atomic
from intrafusion.lab.measure import device_name
from intrafusion.lab.pruning import ALL
from intrafusion.lab.recipe import Recipe, to_yaml
from intrafusion.lab.report import Study, write_report
from intrafusion.lab.results import Cell, Result, ResultStore, key_of_identity

_log = logging.getLogger(__name__)
_PACKAGES = ("intrafusion", "torch", "torchvision", "torch-pruning", "POT", "numpy", "scipy", "scikit-learn")


@dataclass(frozen=True)
class Finished:
    """What a run leaves behind: its folder, the report in it and the table for the terminal."""

    folder: Path
    report: Path
    table: str
    computed: int


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
    folder = Path(recipe.output).expanduser()
    _prepare(folder, recipe)
    bench = Bench(recipe, folder, progress)
    bench.prepare()
    store = ResultStore(folder / "results.jsonl")
    if fresh:
        store.forget()
    cells = bench.cells()
    computed = 0
    results: list[Result] = []
    bar = tqdm(cells, desc="cells", delay=1, leave=False, disable=None if progress else True)
    for cell in bar:
        bar.set_postfix_str(_label(cell))
        identity = bench.identity(cell)
        key = key_of_identity(identity)
        result = store.get(key)
        if result is None:
            checkpoint = bench.checkpoint(cell)
            if fresh:
                forget_checkpoint(checkpoint)
            result = bench.measure(cell)
            store.add(key, result, identity)
            forget_checkpoint(checkpoint)
            computed += 1
            _log.info("%s: %s in %.1f s", _label(cell), result.accuracy, result.seconds)
        results.append(result)
    _check_twins(results)
    study = Study(recipe, tuple(results), bench.data.split("test").skipped, environment())
    table = write_report(study, folder)
    return Finished(folder, folder / "report.md", table, computed)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _prepare(folder: Path, recipe: Recipe) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "recipe.yaml", to_yaml(replace(recipe, output=str(folder))))
        write_atomic(folder / "environment.json", json.dumps(environment(), indent=2) + "\n")
    except OSError as error:
        raise recipe.error("output", f"cannot write to '{folder}': {error.strerror or error}") from None


def environment() -> dict[str, str]:
    """Versions and machine behind a result."""
    versions: dict[str, str] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {**versions, "device": device_name(device), "threads": str(torch.get_num_threads())}


def _check_twins(results: list[Result]) -> None:
    kept = {replace(r.cell, method="fused"): r.kept for r in results if r.cell.method == "discard"}
    for result in results:
        if result.cell.method == "fused" and kept[result.cell] != result.kept:
            raise LabError(
                f"{_label(result.cell)}: the fused and the discarded network keep different channels, so their "
                "accuracies cannot be compared; this is a defect of intrafusion, please report it"
            )


def _label(cell: Cell) -> str:
    if cell.method == "dense":
        return "dense"
    group = "" if cell.group == ALL else f"{cell.group} "
    tuned = "" if cell.stage == "pruned" else f", fine-tuned with seed {cell.seed}"
    return f"{group}{cell.ratio:.0%} {cell.method}{tuned}"
