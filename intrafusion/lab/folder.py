"""The folder of a run: what is in it besides the report, and how a study is read from it again."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from intrafusion.lab.errors import LabError, UsageError
from intrafusion.lab.files import write_atomic
from intrafusion.lab.measure import device_name
from intrafusion.lab.pruning import ALL
from intrafusion.lab.recipe.loader import Recipe, read_recipe, read_text, to_yaml
from intrafusion.lab.results import Cell, ResultStore
from intrafusion.lab.study import Study
from intrafusion.lab.training_record import read_training

RESULTS, SWEEP = "results.jsonl", "sweep.json"
ENVIRONMENT = "environment.json"
_RECIPE, _CELLS = "recipe.yaml", "cells.json"
_PACKAGES = ("intrafusion", "torch", "torchvision", "torch-pruning", "POT", "numpy", "scipy", "scikit-learn")


class NotMeasuredError(LabError):
    """A run whose dense network has no result yet, so that there is nothing to report on; ``missing`` cells."""

    def __init__(self, folder: Path, missing: int) -> None:
        super().__init__(f"{folder}: the dense network is not measured yet; run the recipe first")
        self.missing = missing


def prepare(folder: Path, recipe: Recipe, processes: int = 1) -> None:
    """Make the folder, with the resolved recipe and what it runs on.

    Raises:
        RecipeError: the folder cannot be written, or is that of a sweep.
    """
    if (folder / SWEEP).is_file():
        raise recipe.error("output", f"'{folder}' holds a sweep: give the run a folder of its own with --output")
    try:
        write_atomic(folder / _RECIPE, to_yaml(replace(recipe, output=str(folder))))
        write_atomic(folder / ENVIRONMENT, json.dumps(environment(recipe, processes), indent=2) + "\n")
    except OSError as error:
        raise recipe.error("output", f"cannot write to '{folder}': {error.strerror or error}") from None


def check_free_for_sweep(folder: Path, recipe: Recipe) -> None:
    """A sweep writes its report where that of a run would be.

    Raises:
        RecipeError: the folder is that of a run.
    """
    if (folder / _CELLS).is_file():
        raise recipe.error("output", f"'{folder}' holds a run: give the sweep a folder of its own with --output")


def write_cells(folder: Path, keys: Mapping[Cell, str], skipped: Sequence[str]) -> None:
    """Note which lines of the results belong to the run, in its order, and which images were left out."""
    cells = [{"key": key, **asdict(cell)} for cell, key in keys.items()]
    write_atomic(folder / _CELLS, json.dumps({"cells": cells, "skipped": list(skipped)}, indent=1) + "\n")


def read_recipe_of(folder: Path) -> Recipe:
    """The recipe that a run wrote into its folder.

    Raises:
        LabError: it is missing or broken.
    """
    try:
        return read_recipe(read_text(folder / _RECIPE), str(folder / _RECIPE), here=False)
    except UsageError as error:
        raise LabError(str(error)) from None


def read_study(folder: Path) -> tuple[Study, int]:
    """The study that a folder holds, finished or not, and how many cells it is short of.

    Neither the network nor the images need to be on this machine.

    Raises:
        NotMeasuredError: the dense network was not measured yet.
        LabError: the folder is not that of a run, or a file in it is broken.
    """
    for name in (_RECIPE, _CELLS, ENVIRONMENT):
        if not (folder / name).is_file():
            raise LabError(f"{folder} holds no {name}, so it is not the folder of a run, or of one that never began")
    recipe = read_recipe_of(folder)
    plan, versions = read_json(folder / _CELLS), read_json(folder / ENVIRONMENT)
    store = ResultStore(folder / RESULTS)
    try:
        found = [store.get(entry["key"]) for entry in plan["cells"]]
        skipped = tuple(plan["skipped"])
    except (KeyError, TypeError) as error:
        raise LabError(f"{folder / _CELLS} is broken ({error!r}); run the recipe again to write it anew") from None
    results = tuple(result for result in found if result is not None)
    if not any(result.cell.method == "dense" for result in results):
        raise NotMeasuredError(folder, len(found) - len(results))
    training = read_training(folder) if recipe.model.weights is None else None
    return Study(recipe, results, skipped, versions, training), len(found) - len(results)


def network_file(folder: Path, cell: Cell) -> Path:
    """Where a run keeps the network of a cell, for :func:`intrafusion.load`."""
    group = "" if cell.group == ALL else f"-{cell.group}"
    stage = "" if cell.stage == "pruned" else f"-finetuned-{cell.seed}"
    return folder / "networks" / f"{cell.method}{group}-{cell.ratio:.4g}{stage}.safetensors"


def environment(recipe: Recipe, processes: int = 1) -> dict[str, str]:
    """Versions and machine behind a result, and how many processes share the work on a network."""
    versions: dict[str, str] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    device = torch.device("cuda" if torch.cuda.is_available() and recipe.device != "cpu" else "cpu")
    together = {"processes": str(processes)} if processes > 1 else {}
    return {**versions, "device": device_name(device), "threads": str(torch.get_num_threads()), **together}


def read_json(path: Path) -> Any:
    """What a run wrote into its folder.

    Raises:
        LabError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LabError(f"{path} is broken ({error}); run the recipe again to write it anew") from None
