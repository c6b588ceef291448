"""The cells of the benchmark: which there are, and how one is measured."""

from __future__ import annotations

import copy
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.rivals.methods import METHODS
from benchmarks.rivals.rows import ALL, DENSE, Cell, Row
from intrafusion.correct.synthetic import synthetic_inputs
from intrafusion.groups.table import module_name
from intrafusion.lab.data.dataset import Dataset
from intrafusion.lab.measure import count_macs, count_parameters, hits
from intrafusion.lab.weights import digest

IMPORTANCES: dict[str, Callable[[], Any]] = {
    "L1": partial(tp.importance.GroupMagnitudeImportance, p=1),
    "L2": partial(tp.importance.GroupMagnitudeImportance, p=2),
    "Taylor": tp.importance.GroupTaylorImportance,
    "LAMP": partial(tp.importance.LAMPImportance, p=2),
    "BN scale": tp.importance.BNScaleImportance,
    "random": tp.importance.RandomImportance,
}
LIKE_L2 = "LAMP"
"""With one ratio for every layer LAMP keeps the channels of L2: it only changes how layers compare with each other."""
SEEDED_IMPORTANCES = frozenset({"Taylor", "random"})
"""Taylor's gradients come from images, which are drawn."""
UNSEEDED_METHODS = frozenset({"discard", "paper", "paper, same channels", "Neuron Merging", "LBYL"})
"""Methods in which nothing is drawn: the channels alone decide."""
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
FEW_RATIOS = (0.3, 0.5, 0.7)


@dataclass
class Network:
    """A trained network and what it is measured on.

    roots: the layers whose groups are pruned; None for all but the classifier. dense is in eval mode.
    """

    name: str
    dense: nn.Module
    roots: list[str] | None
    data: Dataset
    _scored: dict[tuple[int, int], nn.Module] = field(default_factory=dict, repr=False)

    @property
    def example(self) -> Tensor:
        """[1, C, H, W] zeros."""
        return torch.zeros(1, *self.data.shape)

    def images(self, count: int, seed: int) -> list[Tensor]:
        """Training images without their labels, [B, C, H, W] each, normalised."""
        return [images for images, _ in self.data.draw("train", count, seed=seed)]

    def scored(self, count: int, seed: int) -> nn.Module:
        """The dense network with the gradient of the mean loss over the same images, with their labels, in eval mode.

        Its copies have the gradients as well.
        """
        if (count, seed) not in self._scored:
            model = copy.deepcopy(self.dense)
            for module in model.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    setattr(module, name, _WithGradient(parameter.data, parameter.requires_grad))
            drawn = list(self.data.draw("train", count, seed=seed))
            total = sum(len(labels) for _, labels in drawn)
            for images, labels in drawn:
                (F.cross_entropy(model(images), labels, reduction="sum") / total).backward()
            self._scored[count, seed] = model
        return self._scored[count, seed]


class _WithGradient(nn.Parameter):
    """A parameter whose copies have its gradient; torch leaves it behind."""

    def __deepcopy__(self, memo: dict) -> Tensor:
        copied = super().__deepcopy__(memo)
        copied.grad = None if self.grad is None else self.grad.clone()
        return copied


class Scores:
    """A torch-pruning importance whose random scores depend on the seed and the name of the group's first layer alone.

    So all methods keep the same channels, whatever else they draw, and in whatever order they ask.
    """

    def __init__(self, importance: Callable, seed: int) -> None:
        self.importance, self.seed = importance, seed

    def __call__(self, group: Any, **kwargs: Any) -> Tensor | None:
        name = module_name(group._DG, group[0].dep.target.module)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(f"{name} {self.seed}".encode()))
            return self.importance(group, **kwargs)


class SharedInputs:
    """Synthetic inputs, made once for a network and a seed and then shared between cells.

    Attributes:
        saved: seconds that making them took, for every time they were not made again.
    """

    def __init__(self) -> None:
        self.saved = 0.0
        self._made: dict[tuple, tuple[Any, float]] = {}

    def __call__(self, model: nn.Module, example: Any, run: Callable, *, seed: int = 0, **kwargs: Any) -> Any:
        key = (digest(model), seed, str(tp.utils.flatten_as_list(example)[0].shape), str(kwargs))
        if key in self._made:
            inputs, seconds = self._made[key]
            self.saved += seconds
            return inputs
        start = time.perf_counter()
        inputs = synthetic_inputs(model, example, run, seed=seed, **kwargs)
        self._made[key] = inputs, time.perf_counter() - start
        return inputs


@contextmanager
def shared_inputs() -> Iterator[SharedInputs]:
    """Within it, a pruner makes the synthetic inputs of one network and seed only once."""
    shared = SharedInputs()
    with mock.patch("intrafusion.prune.inputs.synthetic_inputs", shared):
        yield shared


def grid(
    networks: Sequence[str], importances: Sequence[str], ratios: Sequence[float] | None, methods: Sequence[str],
    seeds: Sequence[int], images: int, groups: dict[str, list[str]] | None = None,
) -> Iterator[Cell]:  # fmt: skip
    """The cells in order of use: a whole table for the first seed, then for the next.

    ratios: None for all with L1 and three with the others. groups: per network, the layers that are pruned one at a
    time; None for all of them at once. What depends on no seed has cells for the first one only, and what sees no image
    is the same cell whatever the number of images.
    """
    for network in networks:
        yield Cell(network, "", 0.0, DENSE, 0, 0)
    for index, seed in enumerate(seeds):
        for network in networks:
            for importance in importances:
                for group in groups[network] if groups else [ALL]:
                    for ratio in ratios or (RATIOS if importance == "L1" and not groups else FEW_RATIOS):
                        for method in methods:
                            sees = METHODS[method].images or importance == "Taylor"
                            if index == 0 or importance in SEEDED_IMPORTANCES or method not in UNSEEDED_METHODS:
                                yield Cell(network, importance, ratio, method, seed, images if sees else 0, group)


def in_shard(cell: Cell, index: int, count: int) -> bool:
    """Whether a cell is the work of process `index` (from 1) of `count`."""
    return zlib.crc32(str(cell).encode()) % count == index - 1


def measure(network: Network, cell: Cell, shared: SharedInputs) -> Row:
    """Prune a copy of the network as the cell says and find the test images that it gets wrong.

    If the method raises an Exception, or what it returns cannot be run, a row with the error.
    """
    try:
        model, seconds = (copy.deepcopy(network.dense), 0.0) if cell.method == DENSE else _prune(network, cell, shared)
        params, macs = count_parameters(model), count_macs(model.eval(), network.example)
        right = hits(model.to(memory_format=torch.channels_last), network.data, progress=False)
    except Exception as error:  # a rival that fails is a result as well
        return Row(cell, np.zeros(0, dtype=bool), error=f"{type(error).__name__}: {error}")
    return Row(cell, ~right.numpy(), seconds, params, macs)


def _prune(network: Network, cell: Cell, shared: SharedInputs) -> tuple[nn.Module, float]:
    """The pruned copy and the seconds it took, shared inputs included."""
    method = METHODS[cell.method]
    roots = network.roots if cell.group == ALL else [cell.group]
    images = network.images(cell.images, cell.seed) if method.images else None
    importance = Scores(IMPORTANCES[cell.importance](), cell.seed)
    dense = network.scored(cell.images, cell.seed) if cell.importance == "Taylor" else network.dense
    saved, start = shared.saved, time.perf_counter()
    model = method.prune(dense, roots, cell.ratio, importance, network.example, images=images, seed=cell.seed)
    seconds = time.perf_counter() - start + shared.saved - saved
    model.zero_grad(set_to_none=True)
    return model, seconds
