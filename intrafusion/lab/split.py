"""Networks trained on parts of the images become one pruned network, and what that costs against training on them all.

Prune-and-fuse (PaF) prunes the network of each part and fuses the pruned ones; fuse-and-prune (FaP) fuses first. Both
are compared with one network that saw as many images in training, pruned with and without fusion. Every result is on
the disk before the next is computed, and nothing that is finished is computed again.
"""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

import intrafusion
from intrafusion.lab.code_digest import TRAINING_CODE, code_digest
from intrafusion.lab.data import SPLITS, Dataset
from intrafusion.lab.errors import LabError
from intrafusion.lab.executors import threads_of
from intrafusion.lab.files import write_atomic
from intrafusion.lab.folder import ENVIRONMENT, RESULTS, prepare, read_json, read_recipe_of
from intrafusion.lab.measure import Accuracy, count_macs, count_parameters, evaluate
from intrafusion.lab.pruning import OutputChanged, prune
from intrafusion.lab.recipe import Recipe, to_mapping
from intrafusion.lab.results import LineStore, key_of_identity
from intrafusion.lab.run import Finished, torch_threads
from intrafusion.lab.split_training import SplitNetworks, Stage
from intrafusion.lab.stopwatch import Stopwatch
from intrafusion.lab.training import finetune_, forget_checkpoint
from intrafusion.lab.weights import digest

_log = logging.getLogger(__name__)

Method = Literal[
    "part", "whole", "ensemble", "naive", "naive repaired", "aligned", "aligned statistics", "aligned repaired",
    "paf", "fap", "whole fused", "whole discard",
]  # fmt: skip
AVERAGES: tuple[Method, ...] = ("naive", "naive repaired", "aligned", "aligned statistics", "aligned repaired")
"""In the order of a report; with their batch-norm statistics put right, or repaired as the recipe says."""
OF_WHOLE: tuple[Method, ...] = ("whole fused", "whole discard")
SPLIT = "split.json"
"""In the folder of a run: which lines of the results belong to it, in order, and how many images the parts have."""
_PRUNED: dict[str, tuple[Method, ...]] = {"paf": ("paf",), "fap": ("fap",), "whole": OF_WHOLE}


@dataclass(frozen=True)
class Item:
    """One network to measure.

    Attributes:
        method: ``part`` and ``whole`` are trained networks; averages are in the given channels (``naive``) or aligned,
            as they are, with their batch-norm statistics put right, or repaired as the recipe says; the rest is pruned.
        init: of the parts' networks, ``same`` or ``different``; ``None`` where there are no parts.
        epochs: of fine-tuning.
    """

    method: Method
    seed: int
    init: str | None = None
    part: int | None = None
    ratio: float = 0.0
    epochs: int = 0

    def __str__(self) -> str:
        name = self.method if self.part is None else f"part {self.part}"
        words = [f"{self.ratio:.0%} {name}" if self.ratio else name, f"seed {self.seed}"]
        words += [f"{self.init} init"] if self.init else []
        return ", ".join([*words, *([f"{self.epochs} epochs of fine-tuning"] if self.epochs else [])])


@dataclass(frozen=True)
class Measured:
    """What an item is worth.

    Attributes:
        digest: of the network's state dict: equal for equal networks.
        seconds: wall clock of ``train``, ``prune``, ``fuse`` and ``finetune``, as far as they took part. What is done
            for every part at the same time counts once, with its slowest.
    """

    item: Item
    correct: int
    total: int
    params: int
    macs: int
    digest: str
    seconds: Mapping[str, float]

    @property
    def accuracy(self) -> Accuracy:
        """Correct and total as one value."""
        return Accuracy(self.correct, self.total)

    @property
    def total_seconds(self) -> float:
        """From the first training step to the network, with a worker for each part."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class SplitStudy:
    """The results of a recipe, as far as they are there, in the order of the items.

    Attributes:
        parts: training images of each part, for the first seed; together: of all parts, counted with repetitions.
    """

    recipe: Recipe
    results: tuple[Measured, ...]
    parts: tuple[int, ...]
    together: int
    environment: Mapping[str, str]


class Ensemble(nn.Module):
    """The mean of the probabilities of several networks."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, classes]``."""
        return torch.stack([network(images).softmax(1) for network in self.networks]).mean(0)


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
        self.keys = {item: key_of_identity(self.identity(item)) for item in self.items}
        self.store = LineStore(self.folder / RESULTS, _measured, asdict)
        self._made: dict[tuple[Method, str | None], tuple[Item, nn.Module, dict[str, float]]] = {}
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
        shown: tuple[str, ...] = {"none": (), "statistics": ("repaired",), "refit": ("repaired", "statistics")}[
            split.repair
        ]
        averages: list[Method] = [name for name in AVERAGES if name in ("naive", "aligned") or name.endswith(shown)]
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
                    for method in _PRUNED[schedule]:
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
            "networks": [self.networks.key(stage) for stage in self._stages(item)],
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
        return self._network(item)[0]

    def measure(self, item: Item) -> Measured:
        """Compute one item and keep its result, which is on the disk on return."""
        model, seconds = self._network(item)
        accuracy = evaluate(
            model, self.networks.bench.data, batch_size=self.recipe.data.batch_size, progress=self.progress
        )
        rounded = {name: round(value, 3) for name, value in seconds.items()}
        macs = count_macs(model, self.networks.example)
        result = Measured(item, accuracy.correct, accuracy.total, count_parameters(model), macs, digest(model), rounded)
        self.store.add(self.keys[item], result, self.identity(item))
        forget_checkpoint(self.checkpoint(item))
        return result

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {name: self.networks.bench.data.digest(name) for name in SPLITS}

    def _stages(self, item: Item) -> list[Stage]:
        if item.init is None:
            return [self.networks.of_all(item.seed)]
        stages = self.networks.of_parts(item.seed, item.init)
        return stages if item.part is None else [stages[item.part]]

    def _network(self, item: Item) -> tuple[nn.Module, dict[str, float]]:
        """A copy of an item's network, and the seconds of each step on the way to it."""
        start = replace(item, epochs=0)
        known = self._made.get((item.method, item.init))
        if known is None or known[0] != start:
            known = self._made[item.method, item.init] = (start, *self._make(start))
        model, seconds = copy.deepcopy(known[1]), dict(known[2])
        if item.epochs:
            seconds["finetune"] = self._finetune_(model, item)
        return model, seconds

    def _make(self, item: Item) -> tuple[nn.Module, dict[str, float]]:
        if item.method == "fap":
            average = "aligned" if self.split.repair == "none" else "aligned repaired"
            model, seconds = self._network(replace(item, method=average, ratio=0.0))
            return self._prune([model], [self.networks.bench.data], item, seconds)[0], seconds
        stages = self._stages(item)
        networks = [self.networks.network(stage) for stage in stages]
        seconds = {"train": max(self.networks.seconds(stage) for stage in stages)}
        if item.ratio:
            networks = self._prune(networks, [self.networks.data(stage) for stage in stages], item, seconds)
        if item.method == "ensemble":
            return Ensemble(networks).eval(), seconds
        if item.method in AVERAGES or item.method == "paf":
            return self._fuse(networks, item, seconds), seconds
        return networks[0], seconds

    def _prune(
        self, networks: Sequence[nn.Module], datasets: Sequence[Dataset], item: Item, seconds: dict[str, float]
    ) -> list[nn.Module]:
        """Each network pruned with the images that it was trained on."""
        recipe, found, took = self.recipe, [], []
        for network, data in zip(networks, datasets, strict=True):
            start = time.perf_counter()
            try:
                pruned = prune(
                    network, self.networks.example, recipe.prune, recipe.fusion, item.ratio,
                    data=data, discard=item.method == "whole discard",
                )  # fmt: skip
            except OutputChanged as error:
                raise recipe.error("prune.ignored", str(error)) from None
            took.append(time.perf_counter() - start)
            found.append(pruned.model)
        seconds["prune"] = max(took)
        return found

    def _fuse(self, networks: Sequence[nn.Module], item: Item, seconds: dict[str, float]) -> nn.Module:
        split = self.split
        by = "given" if item.method.startswith("naive") else split.by
        named = {"naive": "none", "aligned": "none", "aligned statistics": "statistics"}
        repair = named.get(item.method, split.repair)
        start = time.perf_counter()
        batches = None
        if split.images and (by == "activations" or repair != "none"):
            batches = [images for images, _ in self.networks.bench.data.draw("train", split.images, seed=item.seed)]
        fused = intrafusion.fuse(networks, self.networks.example, by=by, batches=batches, repair=repair, progress=False)
        seconds["fuse"] = time.perf_counter() - start
        return fused

    def _finetune_(self, model: nn.Module, item: Item) -> float:
        """Train on all images and return the wall-clock seconds."""
        settings = self.recipe.finetune
        if settings is None:
            raise ValueError("the recipe has no section 'finetune'")
        checkpoint = self.checkpoint(item)
        watch = Stopwatch(checkpoint)
        finetune_(
            model, self.networks.bench.data, replace(settings, epochs=item.epochs, at=()), seed=item.seed,
            checkpoint=checkpoint, progress=self.progress,
        )  # fmt: skip
        return watch.seconds()


_FUSE_CODE = ("averaging.py", "ot", "surgery", "lab/split.py")


def read_split(folder: Path) -> tuple[SplitStudy, int]:
    """What a folder holds of a run with a section ``split``, finished or not, and how many items it is short of.

    Neither the networks nor the images need to be on this machine.

    Raises:
        LabError: a file in it is broken.
    """
    plan, store = read_json(folder / SPLIT), LineStore(folder / RESULTS, _measured, asdict)
    try:
        found = [store.get(key) for key in plan["keys"]]
        sizes = tuple(plan["parts"]), int(plan["together"])
    except (KeyError, TypeError, ValueError) as error:
        raise LabError(f"{folder / SPLIT} is broken ({error!r}); run the recipe again to write it anew") from None
    results = tuple(result for result in found if result is not None)
    study = SplitStudy(read_recipe_of(folder), results, *sizes, read_json(folder / ENVIRONMENT))
    return study, len(found) - len(results)


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
    from intrafusion.lab.split_report import write_split_report

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


def _measured(entry: dict[str, Any]) -> Measured:
    return Measured(Item(**entry["item"]), *(entry[name] for name in ("correct", "total", "params", "macs", "digest")),
                    seconds=dict(entry["seconds"]))  # fmt: skip
