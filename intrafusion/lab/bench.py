"""What the cells of one run share, and how one cell is measured."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.checkpoint import save
from intrafusion.lab import weights
from intrafusion.lab.code_digest import TRAINING_CODE, code_digest
from intrafusion.lab.data.dataset import Dataset
from intrafusion.lab.data.sources import open_data
from intrafusion.lab.errors import LabError
from intrafusion.lab.folder import network_file
from intrafusion.lab.measure import (
    LATENCY_BATCHES,
    count_macs,
    count_parameters,
    latency_share,
    measure_latency,
    peak_memory,
    places,
    size_on_disk,
)
from intrafusion.lab.models import build_model, example_input
from intrafusion.lab.pretrained import find_pretrained
from intrafusion.lab.pruning import (
    ALL,
    OutputChanged,
    OverrideError,
    Pruned,
    group_roots,
    ignored_layers,
    own_ratios,
    prune,
    uses_images,
    without_images,
)
from intrafusion.lab.recipe.loader import Recipe, to_mapping
from intrafusion.lab.recipe.sections import PruneSection
from intrafusion.lab.results import Cell, Curve, GroupLine, Result, key_of_identity
from intrafusion.lab.target import UnreachableTarget, find_ratio, measured_once
from intrafusion.lab.training import finetune_, train_once_
from intrafusion.lab.training_record import TrainingRecord, read_training, write_training
from intrafusion.prune.fusion import Fusion
from intrafusion.training.processes import ALONE, Processes

_log = logging.getLogger(__name__)
TRAINED = "dense.safetensors"
"""Where a network that the recipe trains is kept, inside the bench's folder."""


class Bench:
    """Holds what the cells of a run share; each part is made when it is first needed.

    ``folder`` is where a trained network is kept. ``trained`` off leaves a network without a weights file as it is
    first drawn. Benches given the same ``shared`` read equal data sets and networks once between them. Of several
    ``processes`` that have equal benches, all must ask for the same things in the same order.
    """

    def __init__(
        self, recipe: Recipe, folder: Path, progress: bool, trained: bool = True, shared: dict[str, Any] | None = None,
        processes: Processes = ALONE,
    ) -> None:  # fmt: skip
        self.recipe, self.folder, self.trained, self.processes = recipe, folder, trained, processes
        self.progress = progress and processes.is_main
        self.shared = {} if shared is None else shared
        self.device = _device(recipe)

    @cached_property
    def data(self) -> Dataset:
        """The images of the recipe."""
        settings, classes = self.recipe.data, self.recipe.model.num_classes
        data = self._once("data", lambda: open_data(settings, classes, progress=self.progress), settings, classes)
        if len(data.classes) != self.recipe.model.num_classes:
            message = f"{self.recipe.model.num_classes}, but the images have {len(data.classes)} classes"
            raise self.recipe.error("model.num_classes", message)
        return data

    def _once(self, kind: str, make: Callable[[], Any], *sections: Any) -> Any:
        """What ``make`` gives, or gave for another bench whose sections are equal."""
        key = f"{kind} {sections}"
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    @cached_property
    def example(self) -> Tensor:
        return example_input(self.data.shape, self.device)

    @cached_property
    def _blank(self) -> nn.Module:
        """The network as it is first drawn, which accepts the images and has the layers that the recipe names."""
        model = self._untrained().to(self.device).eval()
        self._check_accepts_images(model)
        try:
            ignored_layers(model, self.recipe.prune.ignored)
        except LabError as error:
            raise self.recipe.error("prune.ignored", str(error)) from None
        try:
            own_ratios(model, self.example, self.recipe.prune)
        except OverrideError as error:
            raise self.recipe.error(f"prune.overrides.{error.pattern}", str(error)) from None
        return model

    @cached_property
    def dense(self) -> nn.Module:
        """The dense network in eval mode: loaded, or trained, or the trained one of an earlier run."""
        blank, recipe = self._blank, self.recipe
        sections = recipe.model, recipe.data, recipe.train
        return self._once("dense", lambda: self._weighted(blank), self.folder, *sections, self.device)

    def _weighted(self, model: nn.Module) -> nn.Module:
        path, settings = self.recipe.weights_path(), self.recipe.model
        if path is not None:
            weights.load_weights_(model, path)
        elif settings.pretrained is not None:
            found = find_pretrained(settings.name, settings.pretrained)
            model = found.load(settings.num_classes, download=settings.download).to(self.device)
        elif self.trained:
            self._train_(model)
        self.processes.agree_(model)
        return model.eval()

    @property
    def training(self) -> TrainingRecord | None:
        """How the dense network was trained, if the recipe did it and its record is kept."""
        record = read_training(self.folder) if self.recipe.model.weights is None and self.trained else None
        key = weights.read_metadata(self.folder / TRAINED).get("key")
        return record if record and record.key == key else None

    @cached_property
    def dense_digest(self) -> str:
        return weights.digest(self.dense)

    def prepare(self) -> None:
        """Read the images and load or train the network, so that the cells are timed without it."""
        _ = self._blank, self._test_digest, self.dense_digest  # mistakes show before any training

    def cells(self) -> list[Cell]:
        """Everything to measure: the dense network, then each group's ratios, discarded and fused; then fine-tuned."""
        settings = self.recipe.prune
        groups = [ALL] if settings.groups == "all" else group_roots(self.dense, self.example, settings)
        cells = [Cell("dense", 0.0, ALL)]
        for group in groups:
            for ratio in self._ratios:
                cells += [Cell("discard", ratio, group), Cell("fused", ratio, group)]
        seeds = self.recipe.finetune.seeds if self.recipe.finetune else ()
        tuned = [replace(cell, stage="finetuned", seed=seed) for seed in seeds for cell in cells[1:]]
        return cells + tuned

    def identity(self, cell: Cell) -> dict[str, Any]:
        """Everything the result of a cell depends on, in plain values."""
        common = {"cell": cell.plain(), **self._common()}
        if cell.method == "dense":
            return common
        prune_settings = to_mapping(self.recipe.prune)
        for key in ("ratios", "target", "groups"):  # they say which cells there are
            del prune_settings[key]
        if uses_images(self.recipe.prune, self.recipe.fusion):
            common["train"] = self.data.digest("train")
        common |= {"prune": prune_settings, "fusion": asdict(self.recipe.fusion)}
        if cell.stage == "finetuned" and self.recipe.finetune is not None:
            settings = to_mapping(self.recipe.finetune)
            del settings["seeds"]  # they say which cells there are
            common |= {"finetune": settings, "training code": code_digest(TRAINING_CODE)}
            common |= {name: self.data.digest(name) for name in ("train", "validation")}
        return common

    def checkpoint(self, cell: Cell) -> Path:
        """The file that the fine-tuning of a cell goes on from, if it was interrupted."""
        return self.folder / "checkpoints" / f"{key_of_identity(self.identity(cell))}.pt"

    def _common(self) -> dict[str, Any]:
        return {
            "model": self.recipe.model.name,
            "weights": self.dense_digest,
            "test": self._test_digest,
            "code": code_digest(),
        }

    def measure(self, cell: Cell, *, timed: bool = True) -> Result:
        """Compute one cell; ``timed`` off leaves out the latency, which means nothing while others compute too."""
        start = time.perf_counter()
        model, groups, kept = self.dense, (), ""
        if cell.method != "dense":
            pruned = self._pruned(cell)
            model, kept = pruned.model, pruned.kept
            self.processes.agree_(model)
            groups = tuple(
                GroupLine(g.name, g.channels_before, g.channels_after, g.cost, g.merged, g.reason, plan)
                for g in pruned.groups
                for plan in [g.plan if cell.method == "fused" else ()]
            )
        curve = self._finetune_(model, cell) if cell.stage == "finetuned" else None
        if cell.method in self.recipe.kept_methods:
            self.processes.from_main(lambda: self._save(model, cell))
        batch_size = self.recipe.data.batch_size
        place = places(model, self.data, batch_size=batch_size, progress=self.progress, processes=self.processes)
        seconds = round(time.perf_counter() - start, 3)
        timed = timed and self.processes.is_main and cell.method != "discard" and not curve
        return Result(
            cell,
            correct=int((place < 1).sum()),
            total=len(place),
            params=count_parameters(model),
            macs=count_macs(model, self.example),
            kept=kept,
            groups=groups,
            seconds=seconds,
            top5=int((place < 5).sum()) if len(self.data.classes) > 5 else None,
            size=size_on_disk(model),
            memory=peak_memory(model, self.example),
            latency=tuple(measure_latency(model, self.example, batch) for batch in LATENCY_BATCHES if timed),
            curve=curve,
        )

    def _pruned(self, cell: Cell) -> Pruned:
        """What a cell starts from; where it is fine-tuned, pruned once for all seeds, each of which gets a copy."""
        once = replace(cell, stage="pruned", seed=None)
        make = partial(self.prune, once, self.recipe.prune, self.recipe.fusion)
        if self.recipe.finetune is None:
            return make()
        found = self._once("pruned", make, self.identity(once))
        return replace(found, model=copy.deepcopy(found.model))

    def prune(self, cell: Cell, settings: PruneSection, fusion: Fusion) -> Pruned:
        """The pruned copy that a cell stands for."""
        try:
            return prune(
                self.dense, self.example, settings, fusion, cell.ratio, data=self.data, only=cell.group,
                discard=cell.method == "discard", progress=self.progress,
            )  # fmt: skip
        except OutputChanged as error:
            raise self.recipe.error("prune.ignored", str(error)) from None

    def _save(self, model: nn.Module, cell: Cell) -> None:
        name, classes = self.recipe.model.name, self.recipe.model.num_classes
        path = network_file(Path(self.recipe.output).expanduser(), cell)
        save(model, path, source=name, num_classes=classes, recipe=to_mapping(self.recipe))

    def _finetune_(self, model: nn.Module, cell: Cell) -> Curve:
        settings = self.recipe.finetune
        if settings is None or cell.seed is None:
            raise ValueError(f"{cell} is not fine-tuned by this recipe")
        history = finetune_(
            model,
            self.data,
            settings,
            seed=cell.seed,
            teacher=self.dense,
            checkpoint=self.checkpoint(cell),
            progress=self.progress,
            processes=self.processes,
        )
        test = tuple((epoch, round(score["test"])) for epoch, score in enumerate(history.scores) if "test" in score)
        return Curve(history.losses, history.validation, history.best, test, history.noise)

    @cached_property
    def _ratios(self) -> tuple[float, ...]:
        """The ratios of the recipe, or the one that meets its target."""
        settings = self.recipe.prune
        if settings.target is None:
            return settings.ratios or ()
        quantity, wanted = settings.target.goal
        if quantity != "latency":
            return (self._meeting(self._share_left(quantity), quantity, wanted),)
        return (self.processes.from_main(lambda: self._measured_ratio(quantity, wanted)),)

    def _measured_ratio(self, quantity: str, wanted: float) -> float:
        settings = self.recipe.prune
        target = asdict(settings.target) if settings.target else None
        key = key_of_identity({"target": target, "cell": self._common(), "prune": to_mapping(settings)})
        search = partial(self._meeting, self._share_left(quantity), quantity, wanted)
        return measured_once(search, self.folder / "target.json", key)

    def _meeting(self, left: Callable[[float], float], quantity: str, wanted: float) -> float:
        try:
            return find_ratio(left, wanted)
        except UnreachableTarget as error:
            raise self.recipe.error(f"prune.target.{quantity}", str(error)) from None

    def _share_left(self, quantity: str) -> Callable[[float], float]:
        """What a ratio leaves of a quantity of the dense network."""
        settings, dense, example = self.recipe.prune, self.dense, self.example
        quick, discard = without_images(settings), self.recipe.fusion.discarded()
        batch = settings.target.batch if settings.target else 1
        share = {
            "macs": lambda model: count_macs(model, example) / count_macs(dense, example),
            "parameters": lambda model: count_parameters(model) / count_parameters(dense),
            "latency": lambda model: latency_share(model, dense, example, batch),
        }[quantity]
        return lambda ratio: share(self.prune(Cell("fused", ratio, ALL), quick, discard).model)

    @cached_property
    def _test_digest(self) -> str:
        return self.data.digest("test")

    def _untrained(self) -> nn.Module:
        settings = self.recipe.model
        seed = self.recipe.train.seed if self.recipe.train else 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                return build_model(settings.name, settings.num_classes)
            except LabError as error:
                raise self.recipe.error("model.name", str(error)) from error.__cause__

    def _check_accepts_images(self, model: nn.Module) -> None:
        try:
            with torch.no_grad():
                output = model(self.example)
        except RuntimeError as error:
            shape = "x".join(map(str, self.data.shape))
            raise self.recipe.error(
                "model.name", f"'{self.recipe.model.name}' does not accept images of {shape}: {error}"
            ) from None
        if not isinstance(output, Tensor) or output.shape != (1, self.recipe.model.num_classes):
            raise self.recipe.error("model.name", f"'{self.recipe.model.name}' does not return one logit per class")

    def _train_(self, model: nn.Module) -> None:
        settings = self.recipe.train
        if settings is None:
            raise self.recipe.error("model.weights", "no weights and no section 'train'")
        path = self.folder / TRAINED
        recipe = {"model": self.recipe.model.name, "train": asdict(settings), "data": self.data.digest("train")}
        key = key_of_identity(recipe | {"classes": self.recipe.model.num_classes, "torch": torch.__version__})
        self.data.split("validation")  # an empty one shows before the training
        checkpoint = self.folder / "checkpoints" / "dense.pt"
        train_once_(
            model, self.data, settings, path, key=key, checkpoint=checkpoint, progress=self.progress,
            processes=self.processes,
            note=lambda history: write_training(self.folder, TrainingRecord(key, history.losses, history.noise)),
        )  # fmt: skip


def _device(recipe: Recipe) -> torch.device:
    available = torch.cuda.is_available()
    if recipe.device == "cuda" and not available:
        raise recipe.error("device", "there is no GPU that torch can use; allowed here: auto, cpu")
    return torch.device("cuda" if available and recipe.device != "cpu" else "cpu")
