"""The benchmark of kept outputs works with and without them, and notices a difference."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import memo
from intrafusion.average import consensus
from intrafusion.correct import sequential
from intrafusion.correct.memo import Room


def test_outputs_are_kept_in_the_second_run_only() -> None:
    found: list[list[int]] = []

    def work() -> nn.Module:
        found.append([module.Room().left for module in (sequential, consensus)])  # type: ignore[attr-defined]
        return nn.Linear(1, 1, bias=False).requires_grad_(False).apply(lambda layer: layer.weight.zero_())

    assert all(seconds >= 0 for seconds in memo.compare(work))
    assert found == [[0, 0], [Room().left] * 2]


def test_networks_that_differ_are_no_comparison() -> None:
    torch.manual_seed(0)
    with pytest.raises(AssertionError, match="the networks differ"):
        memo.compare(lambda: nn.Linear(2, 2))
