"""The rows of the benchmark: which network, how it is pruned, on which inputs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import filter as matching
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

TORCH_PRUNING = "torch-pruning"
PLAN_ONLY = ("paper", "barycentre")
"""Methods that look at weights alone: they are compared with torch-pruning, not with forward passes."""
_BATCH = {224: 32, 32: 250, 8: 250}
_CHECKPOINTS = {"cifar_resnet20": "resnet20_cifar10", "cifar_vgg11_bn": "vgg11_bn_cifar10"}
_LEFT_ALONE = {"cifar_resnet20": ("conv1", "layer*.conv2", "linear"), "cifar_vgg11_bn": ("classifier",)}
"""What of a CIFAR network roots no pruned group: the stream and the classifier."""


@dataclass(frozen=True)
class Row:
    """One line of the table, measured in a process of its own.

    network: `chain-<layers>`, a torchvision name or one of ours. method: `torch-pruning`, a preset or `GRAIL`.
    images: how many unlabelled ones are given (0: none). size: of the images, in pixels. turns: how often the method
    and torch-pruning are measured, in turn.
    """

    network: str
    method: str
    size: int
    images: int = 0
    turns: int = 3

    @property
    def name(self) -> str:
        return f"{self.network}/{self.method}"

    @property
    def layers(self) -> int:
        """Of a chain; 0 for other networks."""
        return int(self.network.removeprefix("chain-")) if self.network.startswith("chain-") else 0


def _rows() -> list[Row]:
    rows = [Row("resnet50", method, 224) for method in (TORCH_PRUNING, *PLAN_ONLY)]
    rows += [Row("vgg16_bn", method, 224) for method in (TORCH_PRUNING, "paper")]
    rows += [Row("resnet50", method, 224, images, 1) for method, images in (("calibrated", 64), ("data-free", 0))]
    rows += [Row("resnet50", "GRAIL", 224, 64, 1)]
    for layers in (10, 20, 40, 80):
        rows += [Row(f"chain-{layers}", TORCH_PRUNING, 8), Row(f"chain-{layers}", "calibrated", 8, 1000, 1)]
    for network in _CHECKPOINTS:
        for method, images in (("calibrated", 1000), ("data-free", 0), ("GRAIL", 1000)):
            rows.append(Row(network, method, 32, images, 1))
    return rows


ROWS: dict[str, Row] = {row.name: row for row in _rows()}
"""By name, in the order of the table."""


class Chain(nn.Module):
    """A residual network of `layers` weighted layers: a stem, blocks of two 3x3 convolutions, a classifier."""

    def __init__(self, layers: int, width: int = 16) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range((layers - 2) // 2))
        self.fc = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = F.relu(x + block(x))
        return self.fc(x.mean(dim=(2, 3)))


class _Block(nn.Sequential):
    def __init__(self, width: int) -> None:
        first, second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        super().__init__(first, nn.BatchNorm2d(width), nn.ReLU(), second, nn.BatchNorm2d(width))


def build(row: Row) -> nn.Module:
    """The dense network of a row, in eval mode: trained where a checkpoint is there, else with random weights."""
    torch.manual_seed(0)
    if row.layers:
        return Chain(row.layers).eval()
    from intrafusion.lab.models import build_model
    from intrafusion.lab.weights import load_weights_

    if row.network not in _CHECKPOINTS:
        return build_model(f"torchvision:{row.network}", 1000).eval()
    model = build_model(row.network, 10)
    folder = Path(os.environ.get("INTRAFUSION_DATA", ""))
    checkpoint = folder / "checkpoints" / f"{_CHECKPOINTS[row.network]}.safetensors"
    if checkpoint.is_file():
        load_weights_(model, checkpoint)
    return model.eval()


def left_alone(row: Row, model: nn.Module) -> list[nn.Module]:
    """The layers that root no pruned group: the classifier, and in the CIFAR ResNet the stream."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    if row.network in _LEFT_ALONE:
        names = [name for pattern in _LEFT_ALONE[row.network] for name in matching(layers, pattern)]
        return [layers[name] for name in names]
    return [list(layers.values())[-1]]


def batches(row: Row, count: int, device: str) -> list[Tensor]:
    """`count` random images in batches: how long pruning takes does not depend on what they show."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, row.size, row.size, generator=generator)
    return [batch.to(device) for batch in images.split(_BATCH[row.size])]


def inputs_read(row: Row, model: nn.Module, example: Tensor) -> int:
    """How many inputs the method corrects the network on that it is counted in passes of; 0 if it reads none."""
    if row.method != "data-free":
        return row.images
    for home in ("intrafusion.correct.synthetic", "intrafusion.surgery.probes"):  # the second: before November 2026
        try:
            return import_module(home).synthetic_count(model, (example,))
        except ImportError:
            continue
    raise ImportError("synthetic_count is in neither of the places where it is looked for")


def pruning(row: Row, model: nn.Module, images: list[Tensor], device: str) -> Callable[[], Any]:
    """What is timed: build the pruner of a row for the network, and take its one step."""
    example = torch.zeros(1, 3, row.size, row.size, device=device)
    importance, ignored = tp.importance.GroupMagnitudeImportance(p=1), left_alone(row, model)
    common = {"pruning_ratio": 0.5, "ignored_layers": ignored}
    if row.method == TORCH_PRUNING:
        return lambda: tp.pruner.BasePruner(model, example, importance, **common).step()
    if row.method == "GRAIL":
        return partial(_grail, row, model, example, importance, images)

    def ours() -> None:
        from intrafusion import IntraFusionPruner

        calibration = images if row.method == "calibrated" else None
        pruner = IntraFusionPruner(model, example, importance, **common, fusion=row.method, calibration=calibration)
        pruner.progress = False
        pruner.step()

    return ours


def _grail(row: Row, model: nn.Module, example: Tensor, importance: Any, images: list[Tensor]) -> None:
    from benchmarks.rivals.methods import METHODS

    ignored = set(left_alone(row, model))
    layers = (nn.Conv2d, nn.Linear)
    roots = [name for name, m in model.named_modules() if isinstance(m, layers) and m not in ignored]
    METHODS["GRAIL"].prune(model, roots, 0.5, importance, example, images=images)
