"""Measure one row."""

from __future__ import annotations

import copy
import hashlib
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch_pruning as tp
from torch import Tensor, nn

from benchmarks.imagenet import network
from benchmarks.imagenet.rows import DENSE, MEASURED, STEPS, Removal, Row
from benchmarks.rivals import grail  # noqa: F401  it is registered
from intrafusion import Fusion, IntraFusionPruner
from intrafusion.lab.data.dataset import Dataset
from intrafusion.lab.measure import count_macs, count_parameters, device_name

_MEMORY = 3
"""GiB of activations that are held without a GPU; what is beyond lies in files."""
FUSIONS = {
    "discard": Fusion.preset("discard"),
    "paper, same channels": Fusion(merge="paper"),
    "paper": Fusion.preset("paper"),
    "GRAIL": Fusion(merge="GRAIL"),
    "data-free": Fusion.preset("data-free"),
    "calibrated": Fusion.preset("calibrated"),
    "calibrated, descent": Fusion.preset("calibrated", descent=STEPS),
}


@dataclass(frozen=True)
class Measured:
    """The ratio of every group, by its first layer's name, and the seconds that it took to measure them."""

    ratios: Mapping[str, float]
    wall: float
    processor: float


@dataclass
class Bench:
    """The network, its images, what it calls those that judge (on its device), and batches that may be looked at."""

    dense: nn.Module
    data: Dataset
    named: Tensor
    calibration: Sequence[Tensor]
    commit: str
    _measured: dict[Removal, Measured] = field(default_factory=dict)

    @property
    def _on_processor(self) -> bool:
        return self.named.device.type == "cpu"

    def measure(self, removal: Removal, method: str, ratio: float, seed: int = 0) -> Row:
        """Prune a copy of the network and let the other half of the images judge it."""
        model, kept, measured = copy.deepcopy(self.dense), "", None
        if method in MEASURED:
            measured = self._ratios(removal, ratio)
        wall, processor = time.perf_counter(), time.process_time()
        if method != DENSE:
            fusion = replace(FUSIONS[MEASURED.get(method, method)], seed=seed)
            kept = self._prune(model, removal, fusion, ratio, measured and measured.ratios)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        if measured is not None and method != "discard, measured widths":  # for that one, the pruning alone
            wall, processor = wall + measured.wall, processor + measured.processor
        named = network.named_classes(model, self.data)
        right = (named.cpu() == self.data.split("test").labels).numpy()
        return Row(
            removal, method, ratio, right, (named == self.named).cpu().numpy(), count_parameters(model),
            count_macs(model, network.example(self.named.device)), kept, round(wall, 1), round(processor, 1),
            self.commit, "" if self._on_processor else device_name(self.named.device),
        )  # fmt: skip

    def _ratios(self, removal: Removal, ratio: float) -> Measured:
        """What `calibrated` measures; the step that follows is taken again by whoever asked."""
        if removal not in self._measured:
            wall, processor = time.perf_counter(), time.process_time()
            model = copy.deepcopy(self.dense)
            pruner = self._pruner(model, removal, FUSIONS["calibrated"], ratio, allocation="measured")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pruner.step(interactive=True)
            found = pruner.report.allocation
            assert found is not None
            took = time.perf_counter() - wall, time.process_time() - processor
            self._measured[removal] = Measured(found.ratios, *took)
        return self._measured[removal]

    def _pruner(self, model: nn.Module, removal: Removal, fusion: Fusion, ratio: float, **more) -> IntraFusionPruner:
        pruner = IntraFusionPruner(
            model, network.example(self.named.device), tp.importance.GroupMagnitudeImportance(p=1),
            pruning_ratio=ratio, ignored_layers=network.left_alone(model, removal.groups), fusion=fusion,
            memory_limit=_MEMORY if self._on_processor else None,
            calibration=self.calibration if fusion.method().inputs == "calibration" else None, **more,
        )  # fmt: skip
        pruner.progress = False
        return pruner

    def _prune(
        self, model: nn.Module, removal: Removal, fusion: Fusion, ratio: float, ratios: Mapping[str, float] | None
    ) -> str:
        """Prune in place; a digest of the channels that stay. ratios: of every group, by its first layer's name."""
        unequal = {model.get_submodule(name): one for name, one in (ratios or {}).items()}
        pruner = self._pruner(model, removal, fusion, ratio, pruning_ratio_dict=unequal or None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that fusing can be worse than cutting is what the table shows
            pruner.step()
        return hashlib.sha256(repr(sorted(map(str, pruner.pruning_history()))).encode()).hexdigest()[:12]
