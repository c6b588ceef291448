"""A run: what it writes, what it computes again and what not."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch

from intrafusion import load
from intrafusion.lab import bench, training
from intrafusion.lab import run as run_module
from intrafusion.lab.bench import Bench
from intrafusion.lab.errors import LabError
from intrafusion.lab.folder import read_study
from intrafusion.lab.measure import evaluate
from intrafusion.lab.recipe.loader import Recipe, read_recipe
from intrafusion.lab.results import Result
from intrafusion.lab.run import run
from intrafusion.lab.training_record import read_training, write_training
from intrafusion.lab.weights import read_metadata
from tests.lab.small import TEXT


def test_everything_is_in_the_folder(recipe: Recipe, measured: list[str]) -> None:
    finished = run(recipe, progress=False)
    folder = Path(recipe.output)
    assert sorted(path.name for path in folder.iterdir()) == [
        "accuracy.png", "cells.json", "dense.safetensors", "environment.json", "networks", "recipe.yaml",
        "report.html", "report.md", "results.csv", "results.jsonl", "training.json",
    ]  # fmt: skip
    assert measured == ["dense 0.0 all"] + [f"{m} {r} all" for r in (0.25, 0.5) for m in ("discard", "fused")]
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [line["total"] for line in lines] == [100] * 5
    assert lines[1]["kept"] == lines[2]["kept"] != lines[4]["kept"]
    assert [bool(line["latency"]) for line in lines] == [True, False, True, False, True]
    assert all(line["correct"] <= line["top5"] <= 100 for line in lines)
    assert all(len(group["plan"]) == group["before"] for group in lines[2]["groups"])
    assert all(group["plan"] == [] for group in lines[1]["groups"])
    assert lines[0]["params"] > lines[1]["params"] == lines[2]["params"] > lines[3]["params"]
    assert json.loads((folder / "environment.json").read_text())["torch"] == metadata.version("torch")
    assert read_recipe((folder / "recipe.yaml").read_text()) == recipe
    assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    report = (folder / "report.md").read_text()
    assert "## Groups at 0.5 removed" in report
    assert "| `features.3` | 64 -> 32 |" in report
    assert finished.computed == 5
    assert finished.table.splitlines()[2].split() == [
        "removed", "discard", "fused", "gain", "parameters", "MACs",
    ]  # fmt: skip


def test_a_finished_cell_is_never_computed_again(recipe: Recipe, measured: list[str]) -> None:
    first = run(recipe, progress=False)
    measured.clear()
    second = run(recipe, progress=False)
    assert measured == []
    assert second.table == first.table
    run(replace(recipe, prune=replace(recipe.prune, ratios=(0.5, 0.75))), progress=False)
    assert measured == ["discard 0.75 all", "fused 0.75 all"]
    measured.clear()
    run(recipe, fresh=True, progress=False)
    assert len(measured) == 5


@pytest.mark.parametrize(
    ("extra", "names"),
    [
        ([], ["fused-0.5"]),
        (["keep=all"], ["discard-0.5", "fused-0.5"]),
        (["keep=none"], []),
        (["prune.groups=each"], []),
        (["prune.groups=each", "keep=fused"], ["fused-features.0-0.5", "fused-features.3-0.5", "fused-features.7-0.5"]),
    ],
)
def test_the_pruned_networks_stay(tmp_path: Path, extra: list[str], names: list[str]) -> None:
    recipe = read_recipe(TEXT, "r.yaml", [f"output={tmp_path}", "prune.ratios=0.5", *extra])
    run(recipe, progress=False)
    files = sorted((tmp_path / "networks").glob("*"))
    assert [file.name for file in files] == [f"{name}.safetensors" for name in names]
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    measured = {(line["cell"]["method"], line["cell"]["group"]): line["correct"] for line in lines}
    data = Bench(recipe, tmp_path, progress=False).data
    for file in files:
        method, *group = file.stem.removesuffix("-0.5").split("-")
        assert evaluate(load(file), data, progress=False).correct == measured[method, *(group or ["all"])]
    assert ("`networks/`" in (tmp_path / "report.md").read_text()) == bool(names)


def test_the_training_of_the_dense_network_is_recorded_and_reported(recipe: Recipe, finished: Path) -> None:
    folder = finished
    record = read_training(folder)
    assert record is not None
    assert record.key == read_metadata(folder / "dense.safetensors")["key"]
    assert len(record.losses) == 1
    noise = record.noise
    assert noise is not None
    assert (noise.definition, noise.augmentation) == ("lr / (batch (1 - momentum))", "none")
    assert (noise.epochs[0].trace or 0) > 0
    assert "## Training of the dense network" in (folder / "report.md").read_text()
    assert read_study(folder)[0].training == record
    # The weights of an older version have no record, and those of another training have one that is not theirs.
    write_training(folder, replace(record, key="other"))
    run(recipe, progress=False)
    assert "## Training of the dense network" not in (folder / "report.md").read_text()


def test_an_interrupted_run_goes_on_where_it_stopped(
    recipe: Recipe, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(recipe, progress=False).table
    store = Path(recipe.output) / "results.jsonl"
    lines = store.read_bytes().splitlines(keepends=True)
    store.write_bytes(b"".join(lines[:2]) + lines[2][:40])
    measured.clear()
    monkeypatch.setattr(training, "train_", lambda *_, **__: pytest.fail("trained again"))
    assert run(recipe, progress=False).table == whole
    assert measured == ["fused 0.25 all", "discard 0.5 all", "fused 0.5 all"]


def test_a_failure_in_the_middle_keeps_what_was_done(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Bench.measure

    def measure(self: Bench, cell) -> Result:
        if cell.method == "fused":
            raise KeyboardInterrupt
        return real(self, cell)

    monkeypatch.setattr(Bench, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, progress=False)
    assert len((Path(recipe.output) / "results.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("assignment", "again"),
    [
        ("fusion=barycentre", {"discard", "fused"}),
        ("fusion.cost=l2", {"discard", "fused"}),
        ("prune.importance=l2", {"discard", "fused"}),
        ("train.seed=1", {"dense", "discard", "fused"}),
        ("data.test_images=99", {"dense", "discard", "fused"}),
        ("data.batch_size=7", set()),
        ("data.title=Figures", set()),
    ],
)
def test_a_changed_setting_computes_what_depends_on_it(
    finished: Path, measured: list[str], assignment: str, again: set[str]
) -> None:
    run(read_recipe(TEXT, "r.yaml", [f"output={finished}", assignment]), progress=False)
    assert {cell.split()[0] for cell in measured} == again


def test_changed_code_is_not_given_old_results(
    recipe: Recipe, finished: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "code_digest", lambda: "other")
    run(recipe, progress=False)
    assert len(measured) == 5


def test_two_runs_give_the_same_numbers(recipe: Recipe, tmp_path: Path) -> None:
    first = run(recipe, progress=False).table
    assert run(replace(recipe, output=str(tmp_path / "other")), progress=False).table == first


def test_each_group_alone(recipe: Recipe) -> None:
    each = replace(recipe, prune=replace(recipe.prune, groups="each", ratios=(0.5,)))
    table = run(each, progress=False).table.splitlines()
    assert [line.split()[0] for line in table[2:]] == ["group", table[3], "features.0", "features.3", "features.7"]


def test_twins_that_keep_different_channels_stop_the_run(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Bench.measure
    monkeypatch.setattr(Bench, "measure", lambda self, cell: replace(real(self, cell), kept=cell.method))
    with pytest.raises(LabError, match="25% fused: the fused and the discarded network keep different channels"):
        run(recipe, progress=False)


def test_threads_are_set_for_the_run_only(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(run_module, "_run", lambda *_: seen.append(torch.get_num_threads()))
    torch.set_num_threads(2)
    run(recipe)
    run(replace(recipe, threads=None))
    assert seen == [1, 2]
    assert torch.get_num_threads() == 2
