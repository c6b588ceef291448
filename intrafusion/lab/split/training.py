"""The networks that a recipe's section ``split`` trains: one per part of the images, and one on all of them.

Each is trained once, in a process of its own, and kept; an interrupted training goes on after its last epoch.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.lab import weights
from intrafusion.lab.bench import Bench
from intrafusion.lab.code_digest import TRAINING_CODE, code_digest
from intrafusion.lab.data.dataset import Dataset
from intrafusion.lab.errors import LabError
from intrafusion.lab.executors import Failure, Local, gpus_of, make_executor, threads_of
from intrafusion.lab.models import build_model
from intrafusion.lab.recipe.loader import Recipe
from intrafusion.lab.recipe.sections import SplitSection, TrainSection
from intrafusion.lab.results import key_of_identity
from intrafusion.lab.training import train_once_
from intrafusion.training.workers import WorkerError, in_processes

_log = logging.getLogger(__name__)
_CODE = (*TRAINING_CODE, "schedule.py", "models.py", "lab/data/dataset.py", "lab/models.py")


@dataclass(frozen=True)
class Stage:
    """One network to train.

    Attributes:
        seed: of the parts and of the order of the images; one of ``split.seeds``.
        part: which part it sees, from 0; ``None`` for the images of all parts.
        first: the seed of its first weights.
    """

    seed: int
    part: int | None
    first: int

    def __str__(self) -> str:
        where = "all images" if self.part is None else f"part {self.part}"
        return f"seed {self.seed}, {where}, first weights {self.first}"


@dataclass(frozen=True)
class Job:
    """A stage as another process needs it."""

    recipe: Recipe
    folder: Path
    stage: Stage


class SplitNetworks:
    """The parts of the images and the networks trained on them, kept in ``folder``.

    Raises:
        RecipeError: the recipe does not fit the network or the images.
        LabError: files are missing or broken, a class has fewer images than there are parts.
    """

    def __init__(self, recipe: Recipe, folder: Path, *, progress: bool) -> None:
        if recipe.split is None or recipe.train is None:
            raise ValueError("the recipe needs a section 'split' and a section 'train'")
        self.recipe, self.folder, self.progress = recipe, folder, progress
        self.split: SplitSection = recipe.split
        self._settings: TrainSection = recipe.train
        self.bench = Bench(recipe, folder, progress, trained=False)
        self._parts: dict[int, list[Dataset]] = {}
        self._keys: dict[Stage, str] = {}
        _ = self.bench.dense  # mistakes show before any training

    @property
    def example(self) -> Tensor:
        return self.bench.example

    def parts(self, seed: int) -> list[Dataset]:
        """The data sets of the parts, and last the one of all parts together."""
        if seed not in self._parts:
            options: dict[str, Any] = {"overlap": self.split.overlap, "seed": seed}
            data, count = self.bench.data, self.split.parts
            self._parts[seed] = [*data.parts(count, **options), data.together(count, **options)]
        return self._parts[seed]

    def data(self, stage: Stage) -> Dataset:
        """What a stage trains on."""
        return self.parts(stage.seed)[-1 if stage.part is None else stage.part]

    def presentations(self, stage: Stage) -> int:
        """How many images a stage goes through in all its epochs."""
        return self._settings.epochs * len(self.data(stage).split("train"))

    def of_parts(self, seed: int, init: str) -> list[Stage]:
        """One stage per part. Part 0 starts from the same weights either way, and so does :meth:`of_all`."""
        first = seed * self.split.parts  # no two seeds share first weights
        return [Stage(seed, part, first + (part if init == "different" else 0)) for part in range(self.split.parts)]

    def of_all(self, seed: int) -> Stage:
        """The network that sees the images of all parts, as often as the parts' networks do together."""
        return Stage(seed, None, seed * self.split.parts)

    @cached_property
    def stages(self) -> list[Stage]:
        """Everything that is trained, parts of one seed beside each other."""
        found: dict[Stage, None] = {}
        for seed in self.split.seeds:
            for init in self.split.init:
                found |= dict.fromkeys(self.of_parts(seed, init))
        if "whole" in self.split.schedules:
            found |= {self.of_all(seed): None for seed in self.split.seeds}
        return list(found)

    def key(self, stage: Stage) -> str:
        """Stands for everything the trained weights depend on."""
        if stage not in self._keys:
            model = self.recipe.model
            self._keys[stage] = key_of_identity(
                {
                    "model": [model.name, model.num_classes],
                    "train": asdict(replace(self._settings, seed=stage.seed)),
                    "first": stage.first,
                    "data": self.data(stage).digest("train"),
                    "code": code_digest(_CODE),
                    "torch": torch.__version__,
                    "device": self.bench.device.type,
                }
            )
        return self._keys[stage]

    def path(self, stage: Stage) -> Path:
        """Where the trained weights are kept."""
        return self.folder / "networks" / f"{self.key(stage)}.safetensors"

    def checkpoint(self, stage: Stage) -> Path:
        """The file that an interrupted training goes on from."""
        return self.folder / "checkpoints" / f"{self.key(stage)}.pt"

    def is_trained(self, stage: Stage) -> bool:
        """Whether a stage is finished."""
        return weights.read_metadata(self.path(stage)).get("key") == self.key(stage)

    def seconds(self, stage: Stage) -> float:
        """Wall-clock seconds that training took, in however many sittings."""
        return float(weights.read_metadata(self.path(stage))["seconds"])

    def network(self, stage: Stage) -> nn.Module:
        """The trained network in eval mode; trained here and now if it was not."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stage.first)
            model = build_model(self.recipe.model.name, self.recipe.model.num_classes).to(self.bench.device)
        train_once_(
            model, self.data(stage), replace(self._settings, seed=stage.seed), self.path(stage), key=self.key(stage),
            checkpoint=self.checkpoint(stage), progress=self.progress,
        )  # fmt: skip
        return model.eval()

    def train(self) -> int:
        """Train what is not trained yet and return how many that were.

        Parts are trained side by side, one worker each as far as there are GPUs or processors; the networks that see
        all images follow one at a time, so that their times can be compared.

        Raises:
            LabError: a training diverged, or a worker was killed; the others are ended, and what is finished is kept.
        """
        missing = [stage for stage in self.stages if not self.is_trained(stage)]
        found = make_executor("local", [self.recipe])
        workers = min(self.split.parts, found.workers) if isinstance(found, Local) else 1
        self._train([stage for stage in missing if stage.part is not None], workers)
        self._train([stage for stage in missing if stage.part is None], 1)
        return len(missing)

    def _train(self, stages: Sequence[Stage], workers: int) -> None:
        if not stages:
            return
        _log.info("networks to train: %d, %d at a time", len(stages), workers)
        jobs = [Job(self.recipe, self.folder, stage) for stage in stages]
        outcomes = in_processes(train_stage, jobs, workers=workers, gpus=gpus_of([self.recipe]))
        try:
            with closing(outcomes):  # after a failure the others are ended at once
                for number, failure in outcomes:
                    if failure is not None:
                        raise LabError(f"{stages[number]}: {failure.message}")
                    _log.info("trained %s in %.1f s", stages[number], self.seconds(stages[number]))
        except WorkerError as error:
            raise LabError(f"{stages[error.number]}: {error.reason}; run the same command again to go on") from None


def train_stage(job: Job) -> Failure | None:
    """Do one job in this process."""
    torch.set_num_threads(threads_of(job.recipe))
    try:
        SplitNetworks(job.recipe, job.folder, progress=False).network(job.stage)
    except (LabError, OSError) as error:
        return Failure(str(error))
    return None
