"""Torch-Pruning's own tests pass with our classes; the runner itself, on two tests of ours."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.hosted.runner import run, table

_TEST = """
import torch, torch_pruning as tp
from torch import nn

def prune(kind):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    metric = tp.importance.GroupMagnitudeImportance(p=1)
    pruner = kind(model, (torch.randn(2, 6),), metric, ignored_layers=[model[2]])
    pruner.step()
    assert model[0].out_features == 4
    return pruner

def test_width():
    prune(tp.pruner.MagnitudePruner)
    prune(tp.pruner.GroupNormPruner)

def test_is_torch_prunings():
    assert type(prune(tp.pruner.BasePruner)).__module__.startswith("torch_pruning")
"""


@pytest.mark.slow
def test_the_runner_swaps_the_classes_and_tells_failures(tmp_path):
    (tmp_path / "test_small.py").write_text(_TEST)
    theirs, ours = run(tmp_path, ours=False), run(tmp_path, ours=True)
    assert not theirs.failed
    assert theirs.pruners == 0
    assert list(ours.failed) == ["test_small::test_is_torch_prunings"]
    assert ours.pruners == 3
    assert "2 tests, 3 pruners of ours" in table(theirs, ours)


@pytest.mark.slow
def test_torch_prunings_own_tests_pass_in_at_most_three_times_their_time():
    folder = os.environ.get("TORCH_PRUNING_TESTS")
    if not folder:
        pytest.skip("TORCH_PRUNING_TESTS does not name the folder tests/ of a checkout of torch-pruning")
    theirs, ours = run(Path(folder), ours=False), run(Path(folder), ours=True)
    assert ours.pruners, "no test made a pruner of ours"
    new = ours.failed.keys() - theirs.failed.keys()
    assert not new, table(theirs, ours)
    assert ours.total <= 3 * theirs.total, table(theirs, ours)
