"""From the networks trained on the parts of the images to the network of an item: fused, pruned, fine-tuned."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion import FusionSchedule, fuse, schedule
from intrafusion.lab.data.dataset import Dataset
from intrafusion.lab.pruning import OutputChanged, make_pruner, prune
from intrafusion.lab.recipe.sections import FinetuneSection
from intrafusion.lab.split.study import AVERAGES, OF_WHOLE, Item
from intrafusion.lab.split.training import SplitNetworks, Stage
from intrafusion.lab.stopwatch import Stopwatch
from intrafusion.lab.training import TrainingImages, finetune_
from intrafusion.training.loop import Scheduling

Seconds = dict[str, float]


class Ensemble(nn.Module):
    """The mean of the probabilities of several networks."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, classes]``."""
        return torch.stack([network(images).softmax(1) for network in self.networks]).mean(0)


class Schedules:
    """Makes the network of every item, and says how long each step took with a worker for every part."""

    def __init__(self, networks: SplitNetworks) -> None:
        self.networks, self.recipe, self.split = networks, networks.recipe, networks.split
        self._made: dict[tuple[str, str | None], tuple[Item, nn.Module, Seconds]] = {}
        for item in (Item("whole", 0, ratio=0.5, epochs=epochs) for epochs in self.split.budgets if epochs):
            if self.split.prune_until:
                self.pruning_steps(item)  # too few steps show before any training

    def stages(self, item: Item) -> list[Stage]:
        """The trainings that an item comes from."""
        if item.init is None:
            return [self.networks.of_all(item.seed)]
        stages = self.networks.of_parts(item.seed, item.init)
        return stages if item.part is None else [stages[item.part]]

    def start(self, item: Item) -> Item:
        """What is fine-tuned to become the item: a pruned network, or the one that is pruned on the way."""
        if not self.prunes_on_the_way(item):
            return replace(item, epochs=0)
        repaired = "aligned" if self.split.repair == "none" else "aligned repaired"
        return Item(repaired if item.method == "fap" else "whole", item.seed, item.init)

    def prunes_on_the_way(self, item: Item) -> bool:
        """Whether an item is pruned while it is fine-tuned. What is pruned before it is fused cannot be."""
        return bool(self.split.prune_until and item.epochs and item.method in ("fap", *OF_WHOLE))

    def pruning_steps(self, item: Item) -> list[int]:
        """After which steps of the optimizer an item is pruned on the way, evenly until ``split.prune_until``.

        Raises:
            RecipeError: there are fewer steps of the optimizer until then.
        """
        settings, count = self._finetuning(item), self.recipe.prune.iterative_steps
        images = TrainingImages(self.networks.bench.data, settings, torch.Generator(), torch.device("cpu"))
        last = int(self.split.prune_until * item.epochs * -(-len(images) // settings.accumulate))
        if last < count:
            raise self.recipe.error(
                "split.prune_until",
                f"{self.split.prune_until:g} of {item.epochs} epochs is {last} steps of the optimizer, too few for "
                f"{count} of pruning",
            )
        return [last * step // count for step in range(1, count + 1)]

    def network(self, item: Item, checkpoint: Path, *, progress: bool) -> tuple[nn.Module, Seconds]:
        """A copy of an item's network, and the seconds of each step on the way to it.

        checkpoint: what an interrupted fine-tuning goes on from.
        """
        start = self.start(item)
        known = self._made.get((start.method, start.init))
        if known is None or known[0] != start:
            known = self._made[start.method, start.init] = (start, *self._make(start))
        model, seconds = copy.deepcopy(known[1]), dict(known[2])
        if item.epochs:
            seconds["finetune"] = self._finetune_(model, item, checkpoint, progress)
        return model, seconds

    def _make(self, item: Item) -> tuple[nn.Module, Seconds]:
        stages, example = self.stages(item), self.networks.example
        networks = [self.networks.network(stage) for stage in stages]
        seconds = {"train": max(self.networks.seconds(stage) for stage in stages)}
        if item.method == "ensemble":
            return Ensemble(networks).eval(), seconds
        fused = item.method in (*AVERAGES, "paf", "fap")
        each = [self.networks.data(stage) for stage in stages]  # each pruned with the images that it was trained on
        datasets = [self.networks.bench.data] if item.method == "fap" else each
        prunes = [_Timed(partial(self._prune, item=item, data=data)) for data in datasets]
        start = time.perf_counter()
        if item.method == "paf":
            model = schedule.prune_and_fuse(networks, prunes, example, **self._fusing(item))
        elif item.method == "fap":
            model = schedule.fuse_and_prune(networks, prunes[0], example, **self._fusing(item))
        elif fused:
            model = fuse(networks, example, **self._fusing(item))
        else:
            model = prunes[0](networks[0]) if item.ratio else networks[0]
        total, took = time.perf_counter() - start, [prune.seconds for prune in prunes]
        return model, seconds | ({"prune": max(took)} if item.ratio else {}) | (
            {"fuse": total - sum(took)} if fused else {}
        )

    def _prune(self, network: nn.Module, item: Item, data: Dataset) -> nn.Module:
        recipe = self.recipe
        try:
            return prune(
                network, self.networks.example, recipe.prune, recipe.fusion, item.ratio, data=data,
                discard=item.method == "whole discard",
            ).model  # fmt: skip
        except OutputChanged as error:
            raise recipe.error("prune.ignored", str(error)) from None

    def _fusing(self, item: Item) -> dict[str, Any]:
        """How the networks of an item are fused, as :func:`intrafusion.fuse` takes it."""
        split = self.split
        by = "given" if item.method.startswith("naive") else split.by
        named = {"naive": "none", "aligned": "none", "aligned statistics": "statistics"}
        repair = named.get(item.method, split.repair)
        batches = None
        if split.images and (by == "activations" or repair != "none"):
            batches = [images for images, _ in self.networks.bench.data.draw("train", split.images, seed=item.seed)]
        return {"by": by, "batches": batches, "repair": repair, "progress": False}

    def _finetuning(self, item: Item) -> FinetuneSection:
        if self.recipe.finetune is None:
            raise ValueError("the recipe has no section 'finetune'")
        return replace(self.recipe.finetune, epochs=item.epochs, at=())

    def _finetune_(self, model: nn.Module, item: Item, checkpoint: Path, progress: bool) -> float:
        """Train on all images and return the wall-clock seconds."""
        watch = Stopwatch(checkpoint)
        scheduling, key = self._scheduling(model, item) if self.prunes_on_the_way(item) else (None, "")
        finetune_(
            model, self.networks.bench.data, self._finetuning(item), seed=item.seed, checkpoint=checkpoint,
            progress=progress, scheduling=scheduling, key=key,
        )  # fmt: skip
        return watch.seconds()

    def _scheduling(self, model: nn.Module, item: Item) -> tuple[Scheduling, str]:
        """What prunes an item's network while it is fine-tuned, and what stands for it."""
        recipe, at = self.recipe, self.pruning_steps(item)
        fusion = recipe.fusion.discarded() if item.method == "whole discard" else recipe.fusion
        pruner = make_pruner(
            model, self.networks.example, recipe.prune, fusion, item.ratio, data=self.networks.bench.data
        )
        key = repr((at, item.ratio, recipe.prune, fusion))
        return lambda optimizer, average: FusionSchedule(pruner, optimizer, at=at, ema=average), key


class _Timed:
    """A pruning function, and how many seconds it took."""

    def __init__(self, prune: Callable[[nn.Module], nn.Module]) -> None:
        self.prune, self.seconds = prune, 0.0

    def __call__(self, network: nn.Module) -> nn.Module:
        start = time.perf_counter()
        pruned = self.prune(network)
        self.seconds += time.perf_counter() - start
        return pruned
