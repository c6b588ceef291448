"""What the cells of a run share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from intrafusion.lab import bench as bench_module
from intrafusion.lab.bench import Bench
from intrafusion.lab.recipe.loader import read_recipe

TEXT = """\
model: {name: digits_cnn}
data: {name: digits, test_images: 100}
train: {epochs: 1, batch_size: 128}
prune: {ratios: [0.5], ignored: [classifier]}
fusion: paper
finetune: {epochs: 1, seeds: [0, 1]}
output: unused
keep: none
threads: 1
"""


def test_seeds_start_from_one_pruned_network_and_end_as_if_each_were_pruned_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned: list[bool] = []
    real = bench_module.prune

    def prune(*args, **kwargs):
        pruned.append(kwargs["discard"])
        return real(*args, **kwargs)

    monkeypatch.setattr(bench_module, "prune", prune)
    recipe = read_recipe(TEXT, "r.yaml")
    shared = Bench(recipe, tmp_path, progress=False)
    together = [shared.measure(cell, timed=False) for cell in shared.cells()]
    assert pruned == [True, False]
    alone = [Bench(recipe, tmp_path, progress=False).measure(cell, timed=False) for cell in shared.cells()]
    assert len(pruned) == 2 + 6
    assert len(alone) == 1 + 2 + 2 * 2
    assert [replace(result, seconds=0) for result in together] == [replace(result, seconds=0) for result in alone]
