"""How the pruning ratio grows over the steps of an iterative pruner.

Each function is an `iterative_pruning_ratio_scheduler` of torch-pruning: called with the final ratio and the number of
steps, it returns the ratio after 0, 1, …, `steps` steps: [steps + 1], from 0 to the final ratio, never falling.

>>> pruner = IntraFusionPruner(
...     model, example, metric, iterative_steps=5, iterative_pruning_ratio_scheduler=intrafusion.cubic_scheduler
... )
"""

from __future__ import annotations

import math
from collections.abc import Callable


def _grow(ratio: float, steps: int, share: Callable[[float], float]) -> list[float]:
    """share: from the part of the steps that is done to the part of the ratio that is reached, both in [0, 1]."""
    if not 0 <= ratio <= 1:
        raise ValueError(f"the pruning ratio is {ratio}: it must be in [0, 1]")
    if steps < 1:
        raise ValueError(f"{steps} pruning steps: there must be at least 1")
    return [0.0, *(ratio * share(i / steps) for i in range(1, steps)), ratio]


def one_shot_scheduler(ratio: float, steps: int) -> list[float]:
    """Everything at the first step: [0, ratio, ratio, …]."""
    return _grow(ratio, steps, lambda done: 1.0)


def linear_scheduler(ratio: float, steps: int) -> list[float]:
    """The same number of channels at every step (torch-pruning's default)."""
    return _grow(ratio, steps, lambda done: done)


def cubic_scheduler(ratio: float, steps: int) -> list[float]:
    """Fast while there is much to spare, slow at the end: ratio · (1 - (1 - t)³) (Zhu & Gupta 2017, equation 1)."""
    return _grow(ratio, steps, lambda done: 1 - (1 - done) ** 3)


def cosine_scheduler(ratio: float, steps: int) -> list[float]:
    """Slow, fast, slow: ratio · (1 - cos(π t)) / 2."""
    return _grow(ratio, steps, lambda done: (1 - math.cos(math.pi * done)) / 2)
