"""Networks trained on parts of the images become one pruned network, and what that costs against training on them all.

Prune-and-fuse (PaF) prunes the network of each part and fuses the pruned ones; fuse-and-prune (FaP) fuses first. Both
are compared with one network that saw as many images in training, pruned with and without fusion. Every result is on
the disk before the next is computed, and nothing that is finished is computed again.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from intrafusion import save
from intrafusion.lab.code_digest import TRAINING_CODE, code_digest
from intrafusion.lab.data.dataset import SPLITS
from intrafusion.lab.executors import threads_of
from intrafusion.lab.files import write_atomic
from intrafusion.lab.folder import prepare
from intrafusion.lab.measure import count_macs, count_parameters, evaluate
from intrafusion.lab.recipe.loader import Recipe, to_mapping
from intrafusion.lab.results import key_of_identity
from intrafusion.lab.run import Finished, torch_threads
from intrafusion.lab.split.report import write_split_report
from intrafusion.lab.split.schedules import Schedules
from intrafusion.lab.split.study import (
    AVERAGES,
    OF_WHOLE,
    PRUNED,
    SPLIT,
    Item,
    Measured,
    Method,
    network_file,
    open_results,
    read_split,
)
from intrafusion.lab.split.training import SplitNetworks
from intrafusion.lab.training import forget_checkpoint
from intrafusion.lab.weights import digest

_log = logging.getLogger(__name__)
_FUSE_CODE = ("ot", "running", "groups", "correct", "average", "schedule.py", "lab/split/schedules.py")
_ON_THE_WAY_CODE = ("training/fusion_schedule.py", "training/optimizer_state.py", "training/averaged_weights.py")


class SplitRun:
    """A recipe with a section ``split``, its folder and what is finished of it.

    >>> run = SplitRun(load_recipe("recipes/digits_split.yaml"))
    >>> run.train()
    >>> network = run.network(Item("paf", seed=0, init="same", ratio=0.5))

    Raises:
        RecipeError: the recipe does not fit the network or the images, or its folder cannot be written.
        LabError: files are missing or broken.
    """

    def __init__(self, recipe: Recipe, *, fresh: bool = False, progress: bool = True) -> None:
        self.recipe, self.progress = recipe, progress
        self.folder = Path(recipe.output).expanduser()
        prepare(self.folder, recipe)
        self.networks = SplitNetworks(recipe, self.folder, progress=progress)
        self.split = self.networks.split
        self.schedules = Schedules(self.networks)
        self.keys = {item: key_of_identity(self.identity(item)) for item in self.items}
        self.store = open_results(self.folder)
        sizes = [len(data.split("train")) for data in self.networks.parts(self.split.seeds[0])]
        plan = {"keys": list(self.keys.values()), "parts": sizes[:-1], "together": sizes[-1]}
        write_atomic(self.folder / SPLIT, json.dumps(plan, indent=1) + "\n")
        if fresh:
            self.store.forget()
            for stage in self.networks.stages:
                self.networks.path(stage).unlink(missing_ok=True)
                forget_checkpoint(self.networks.checkpoint(stage))
            for item in self.items:
                forget_checkpoint(self.checkpoint(item))

    @cached_property
    def items(self) -> list[Item]:
        """Everything to measure, in order: the networks before pruning first, seed by seed."""
        split = self.split
        found: list[Item] = []
        left_out = {"none": ("repaired", "statistics"), "statistics": ("aligned statistics",), "refit": ("none",)}
        averages: list[Method] = [name for name in AVERAGES if not name.endswith(left_out[split.repair])]
        for seed in split.seeds:
            for init in split.init:
                found += [Item("part", seed, init, part) for part in range(split.parts)]
                found.append(Item("ensemble", seed, init))
                found += [Item(name, seed, init) for name in averages]
            if "whole" in split.schedules:
                found.append(Item("whole", seed))
        for seed in split.seeds:
            for ratio in self.recipe.prune.ratios or ():
                for schedule in split.schedules:
                    for method in PRUNED[schedule]:
                        inits = (None,) if method in OF_WHOLE else split.init
                        found += [Item(method, seed, init, None, ratio, e) for init in inits for e in split.budgets]
        return found

    @property
    def missing(self) -> list[Item]:
        """The items that are not finished, in order."""
        return [item for item in self.items if self.store.get(self.keys[item]) is None]

    def identity(self, item: Item) -> dict[str, Any]:
        """Everything an item's result depends on, in plain values."""
        split = self.split
        found = {
            "item": asdict(item),
            "networks": [self.networks.key(stage) for stage in self.schedules.stages(item)],
            "test": self._digests["test"],
            "code": code_digest(),
        }
        if item.init is not None and item.method not in ("part", "ensemble"):
            found |= {"fuse": [split.by, split.repair, split.images], "fuse code": code_digest(_FUSE_CODE)}
        if item.ratio:
            settings = to_mapping(self.recipe.prune)
            del settings["ratios"]
            found |= {"prune": settings, "fusion": asdict(self.recipe.fusion)}
        if item.epochs:
            settings = to_mapping(self.recipe.finetune)
            for key in ("epochs", "at", "seeds"):  # the item says them
                del settings[key]
            found |= {"finetune": settings, "training code": code_digest(TRAINING_CODE)}
            found["validation"] = self._digests["validation"]
        if self.schedules.prunes_on_the_way(item):
            found["prune until"] = [self.split.prune_until, code_digest(_ON_THE_WAY_CODE)]
        if item.epochs or "fuse" in found:
            found["train"] = self._digests["train"]
        return found

    def checkpoint(self, item: Item) -> Path:
        """The file that an interrupted fine-tuning goes on from."""
        return self.folder / "checkpoints" / f"{self.keys[item]}.pt"

    def train(self) -> int:
        """Train every network that is missing, each in a process of its own; see :meth:`SplitNetworks.train`."""
        return self.networks.train()

    def network(self, item: Item) -> nn.Module:
        """The network of an item, in eval mode and a copy of one's own. Trainings that are missing are done."""
        return self.schedules.network(item, self.checkpoint(item), progress=self.progress)[0]

    def measure(self, item: Item) -> Measured:
        """Compute one item and keep its result, which is on the disk on return."""
        model, seconds = self.schedules.network(item, self.checkpoint(item), progress=self.progress)
        accuracy = evaluate(
            model, self.networks.bench.data, batch_size=self.recipe.data.batch_size, progress=self.progress
        )
        rounded = {name: round(value, 3) for name, value in seconds.items()}
        macs = count_macs(model, self.networks.example)
        result = Measured(item, accuracy.correct, accuracy.total, count_parameters(model), macs, digest(model), rounded)
        if item.ratio and ("discard" if item.method == "whole discard" else "fused") in self.recipe.kept_methods:
            source = self.recipe.model
            path = network_file(self.folder, item)
            save(model, path, source=source.name, num_classes=source.num_classes, recipe=to_mapping(self.recipe))
        self.store.add(self.keys[item], result, self.identity(item))
        forget_checkpoint(self.checkpoint(item))
        return result

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {name: self.networks.bench.data.digest(name) for name in SPLITS}


def run_split(recipe: Recipe, *, fresh: bool = False, progress: bool = True) -> Finished:
    """Do what a recipe with a section ``split`` says, resuming what is already in its output folder.

    Args:
        fresh: train and compute everything again.
        progress: show progress bars (on a terminal only).

    Raises:
        RecipeError: the recipe does not fit the network or the images.
        LabError: files are missing or broken, training diverges, an output folder cannot be used.
        intrafusion.FusionError: a group cannot be pruned.
    """
    with torch_threads(threads_of(recipe)):  # as in the workers, so that a result does not depend on who computed it
        opened = SplitRun(recipe, fresh=fresh, progress=progress)
        opened.train()
        missing = opened.missing
        bar = tqdm(missing, desc="networks", delay=1, leave=False, disable=None if progress else True)
        for item in bar:
            result = opened.measure(item)
            _log.info("%s: %s", item, result.accuracy)
            write_split_report(read_split(opened.folder)[0], opened.folder)
        table = write_split_report(read_split(opened.folder)[0], opened.folder)
    return Finished(opened.folder, opened.folder / "report.md", table, len(missing))
