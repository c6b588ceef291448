"""Stand-in until the rivals are merged: our own presets behind the benchmark's interface."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from intrafusion import IntraFusionPruner


@dataclass(frozen=True)
class Method:
    name: str
    images: bool
    source: str
    prune: Callable[..., nn.Module]


def _preset(
    name: str, dense: nn.Module, roots: list[str] | None, ratio: float, importance: Callable, example_inputs: Tensor,
    *, images: list[Tensor] | None, seed: int,
) -> nn.Module:  # fmt: skip
    model = copy.deepcopy(dense)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    ignored = [m for n, m in layers.items() if n not in roots] if roots else [list(layers.values())[-1]]
    calibration = images if name == "calibrated" else None
    IntraFusionPruner(
        model, example_inputs, importance, pruning_ratio=ratio, ignored_layers=ignored, fusion=name,
        calibration=calibration,
    ).step()  # fmt: skip
    return model


METHODS = {
    name: Method(name, name == "calibrated", "", partial(_preset, name))
    for name in ("discard", "paper", "data-free", "calibrated")
}
