"""Pruning schedules: torch-pruning's contract, and the shape that each name promises."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch_pruning as tp
from hypothesis import given
from hypothesis import strategies as st

from intrafusion import (
    IntraFusionPruner,
    cosine_scheduler,
    cubic_scheduler,
    linear_scheduler,
    one_shot_scheduler,
)
from tests.nets import Plain, randomise_

SCHEDULERS = [one_shot_scheduler, linear_scheduler, cubic_scheduler, cosine_scheduler]


@given(ratio=st.floats(0, 1), steps=st.integers(1, 50), scheduler=st.sampled_from(SCHEDULERS))
def test_every_schedule_starts_at_zero_ends_at_the_ratio_and_never_falls(ratio, steps, scheduler):
    ratios = scheduler(ratio, steps)
    assert len(ratios) == steps + 1
    assert ratios[0] == 0.0
    assert ratios[-1] == ratio
    assert all(a <= b + 1e-12 for a, b in pairwise(ratios))


def test_linear_is_torch_prunings_own():
    assert linear_scheduler(0.7, 7) == pytest.approx(tp.pruner.algorithms.scheduler.linear_scheduler(0.7, 7))


def test_the_cubic_one_is_that_of_zhu_and_gupta():
    final, steps = 0.8, 10
    want = [final + (0.0 - final) * (1 - t / steps) ** 3 for t in range(steps + 1)]
    assert cubic_scheduler(final, steps) == pytest.approx(want)


def test_shapes():
    assert one_shot_scheduler(0.5, 3) == [0.0, 0.5, 0.5, 0.5]
    assert cosine_scheduler(1.0, 4) == pytest.approx([(1 - math.cos(math.pi * i / 4)) / 2 for i in range(5)])
    assert cubic_scheduler(0.5, 4)[1] > linear_scheduler(0.5, 4)[1] > cosine_scheduler(0.5, 4)[1]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_pruner_follows_the_schedule(scheduler):
    model = randomise_(Plain(16))
    pruner = IntraFusionPruner(
        model,
        torch.randn(2, 3, 8, 8),
        tp.importance.GroupMagnitudeImportance(p=1),
        pruning_ratio=0.5,
        iterative_steps=4,
        iterative_pruning_ratio_scheduler=scheduler,
        ignored_layers=[model.fc2],
        fusion="barycentre",
    )
    widths = []
    for _ in range(4):
        pruner.step()
        widths.append(model.conv1.out_channels)
    assert widths == [int(16 * (1 - ratio)) for ratio in scheduler(0.5, 4)[1:]]
    assert widths[-1] == 8


@pytest.mark.parametrize(("ratio", "steps", "message"), [(1.2, 3, "must be in"), (0.5, 0, "at least 1")])
def test_what_is_no_schedule_is_said(ratio, steps, message):
    with pytest.raises(ValueError, match=message):
        linear_scheduler(ratio, steps)
