"""Sweeps with an executor that computes here and now; test_executors.py has the real ones."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from intrafusion.lab.errors import LabError, RecipeError
from intrafusion.lab.executors import Failure, Outcome, Task, work
from intrafusion.lab.recipe.grid import parse_grid
from intrafusion.lab.recipe.loader import Point, read_points, read_recipe
from intrafusion.lab.run import run
from intrafusion.lab.sweep import _train, report_again, sweep
from intrafusion.lab.training_record import read_training
from tests.lab.small import TEXT


class Here:
    """Computes in this process and remembers what; ``broken`` names cells that fail."""

    alone = True

    def __init__(self, broken: Sequence[str] = ()) -> None:
        self.done: list[str] = []
        self.broken = broken

    def compute(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Outcome]]:
        for number, task in reversed(list(enumerate(tasks))):
            cell = task.cell
            name = "train" if cell is None else f"{task.recipe.prune.importance} {cell.method} {cell.ratio}"
            self.done.append(name)
            yield number, Failure("too hot") if name in self.broken else work(task)


def points(folder: Path, *grid: str, more: Sequence[str] = ()) -> list[Point]:
    return read_points(TEXT, "r.yaml", [f"output={folder}", *more], parse_grid(grid))


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    varying = ("seconds", "latency")
    return [{key: value for key, value in row.items() if not key.startswith(varying)} for row in rows]


def test_every_point_is_a_run_and_equals_it(tmp_path: Path) -> None:
    executor = Here()
    swept = sweep(points(tmp_path / "s", "prune.importance=l1,l2"), executor, progress=False)
    assert executor.done.count("train") == 1
    assert (swept.computed, swept.failed) == (9, ())  # the dense network is the same at both points
    for name in ("l1", "l2"):
        folder = tmp_path / "s" / f"prune.importance={name}"
        assert "# digits_cnn on digits" in (folder / "report.md").read_text()
        given = [f"output={tmp_path / name}", f"prune.importance={name}"]
        run(read_recipe(TEXT, "r.yaml", given), progress=False)
        assert table(folder) == table(tmp_path / name)
        assert run(read_recipe((folder / "recipe.yaml").read_text()), progress=False).computed == 0
        assert read_training(folder) == read_training(tmp_path / name) is not None
    both = table(tmp_path / "s")
    assert [row["prune.importance"] for row in both] == ["l1"] * 5 + ["l2"] * 5
    head = swept.table.splitlines()
    assert head[0] == "digits_cnn on digits: importance varied"
    assert head[2].split() == ["importance", "removed", "dense", "discard", "fused", "gain"]
    assert len(head) == 4 + 4


def test_a_finished_cell_is_never_computed_again(tmp_path: Path) -> None:
    sweep(points(tmp_path, "prune.importance=l1,l2"), Here(), progress=False)
    again = Here()
    assert sweep(points(tmp_path, "prune.importance=l1,l2"), again, progress=False).computed == 0
    assert again.done == []
    more = Here()
    swept = sweep(points(tmp_path, "prune.importance=l1,random"), more, progress=False)
    assert swept.computed == 4
    assert all(name.startswith("random") for name in more.done)  # the dense network is known from another point
    assert "l2" not in swept.table
    assert sweep(points(tmp_path, "prune.importance=l1"), Here(), fresh=True, progress=False).computed == 5


def test_without_a_grid_the_folder_is_that_of_a_run(tmp_path: Path) -> None:
    sweep(points(tmp_path / "s"), Here(), progress=False)
    run(read_recipe(TEXT, "r.yaml", [f"output={tmp_path / 'r'}"]), progress=False)
    assert {path.name for path in (tmp_path / "s").iterdir()} == {path.name for path in (tmp_path / "r").iterdir()}
    assert table(tmp_path / "s") == table(tmp_path / "r")


def test_what_fails_stops_nothing_else_and_is_tried_again(tmp_path: Path) -> None:
    executor = Here(broken=["l2 fused 0.5"])
    swept = sweep(points(tmp_path, "prune.importance=l1,l2"), executor, progress=False)
    assert swept.failed == ("prune.importance=l2, 50% fused: too hot",)
    assert swept.computed == 8
    assert len(swept.table.splitlines()) == 4 + 3
    assert "1 cells are not finished." in (tmp_path / "report.md").read_text()
    later = Here()
    assert sweep(points(tmp_path, "prune.importance=l1,l2"), later, progress=False).failed == ()
    assert later.done == ["l2 fused 0.5"]


def test_training_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="too hot"):
        sweep(points(tmp_path, "train.epochs=1,2"), Here(broken=["train"]), progress=False)
    with pytest.raises(RecipeError, match="does not accept images of 1x8x8"):
        sweep(points(tmp_path, "model.name=cifar_resnet20", more=["train=null", *_weights(tmp_path)]), Here())


def _weights(folder: Path) -> list[str]:
    (folder / "w.safetensors").touch()
    return [f"model.weights={folder / 'w.safetensors'}", "prune.ignored=[]"]


def test_a_dense_network_that_fails_leaves_its_point_out(tmp_path: Path) -> None:
    executor = Here(broken=["l1 dense 0.0", "l2 dense 0.0"])
    swept = sweep(points(tmp_path, "prune.importance=l1,l2"), executor, progress=False)
    assert len(swept.failed) == 2
    assert swept.computed == 8  # one task failed, for both points
    assert swept.table == "nothing is measured yet"
    again = report_again(tmp_path)
    assert again.table == "nothing is measured yet\n\nnot finished: 2 cells"
    assert not again.report.exists()


def test_the_report_of_a_sweep_leaves_out_what_has_not_begun(tmp_path: Path) -> None:
    sweep(points(tmp_path, "data.test_images=100,50"), Here(), progress=False)
    (tmp_path / "data.test_images=50" / "results.jsonl").unlink()
    text = report_again(tmp_path).table
    assert text.endswith("not finished: 5 cells")
    assert [line.split()[0] for line in text.splitlines()[4:6]] == ["100", "100"]


def test_a_run_and_a_sweep_keep_out_of_each_others_folder(tmp_path: Path) -> None:
    grid = points(tmp_path, "prune.importance=l1,l2")
    recipe = read_recipe(TEXT, "r.yaml", [f"output={tmp_path}"])
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(RecipeError, match="holds a sweep: give the run a folder of its own with --output"):
        run(recipe, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.json"]
    (tmp_path / "sweep.json").rename(tmp_path / "cells.json")
    with pytest.raises(RecipeError, match="holds a run: give the sweep a folder of its own with --output"):
        sweep(grid, Here(), progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cells.json"]


def test_weights_of_a_library_are_not_trained(tmp_path: Path) -> None:
    recipe = read_recipe(TEXT, "r.yaml", [f"output={tmp_path}"])
    given = replace(recipe, model=replace(recipe.model, weights="pretrained"))
    executor = Here()
    _train([given], [tmp_path], executor)
    assert executor.done == []


def test_networks_are_trained_once_for_each_setting_of_theirs(tmp_path: Path) -> None:
    executor = Here()
    grid = ("train.seed=0,1", "prune.importance=l1,l2", "prune.ratios=[0.5]")
    swept = sweep(points(tmp_path, *grid), executor, progress=False)
    assert executor.done.count("train") == 2
    assert len(list((tmp_path / "networks").iterdir())) == 2
    assert swept.computed == 2 * (1 + 2 * 2)
    names = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("train"))
    assert names[0].startswith("train.seed=0,prune.importance=l1,prune.ratios=_0.5")


def test_long_settings_have_folders_of_their_own(tmp_path: Path) -> None:
    long = [f"fusion={{preset: paper, p: {p}, cost: l1, masses: uniform}}" for p in (1, 2)]
    found = read_points(
        TEXT, "r.yaml", [f"output={tmp_path}"], parse_grid(["data.title=" + ",".join("ab"), "prune.seed=0"])
    )
    assert len(found) == 2
    assert long[0] != long[1]
    executor = Here()
    title = "x" * 300
    sweep(points(tmp_path, f"data.title={title}1,{title}2", "prune.ratios=[0.5]"), executor, progress=False)
    folders = [path for path in tmp_path.iterdir() if path.name.startswith("data.title")]
    assert len(folders) == 2
    assert all(len(path.name) < 120 for path in folders)


def test_each_group_alone_in_the_layout_of_the_paper(tmp_path: Path) -> None:
    grid = ("prune.importance=l1,lamp", "prune.ratios=[0.5]")
    sweep(points(tmp_path, *grid, more=["prune.groups=each"]), Here(), progress=False)
    text = (tmp_path / "report.md").read_text()
    start = text.index("## Each group alone")
    layout = text[start : text.index("## Every row")]
    lines = [line for line in layout.splitlines() if line.startswith("|")]
    assert lines[0] == "| group | importance l1, 50% | importance lamp, 50% |"
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == [
        "features.0",
        "features.3",
        "features.7",
        "mean",
    ]
    assert "Means over the groups" in (tmp_path / "report.html").read_text()


def test_the_report_is_made_again_without_images_network_or_files(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    first = sweep(points(folder, "prune.importance=l1,l2"), Here(), progress=False)
    kept = {path: path.read_bytes() for path in folder.rglob("report.*")}
    for path in (*kept, *(folder / "networks").rglob("*.safetensors"), *folder.rglob("*.csv")):
        path.unlink()
    for path in folder.rglob("recipe.yaml"):
        path.write_text(path.read_text().replace("weights: null", "weights: /gone/w.safetensors"))
    assert report_again(folder).table == first.table
    written = {path: path.read_bytes() for path in folder.rglob("report.*")}
    assert written.keys() == kept.keys()
    assert written[folder / "report.md"] == kept[folder / "report.md"]
    single = folder / "prune.importance=l1"
    assert "removed" in report_again(single).table


def test_the_report_of_an_unfinished_run(finished: Path) -> None:
    store = finished / "results.jsonl"
    lines = store.read_bytes().splitlines(keepends=True)
    store.write_bytes(b"".join(lines[:4]))
    text = report_again(finished).table
    assert text.endswith("not finished: 1 cells")
    assert [line.split()[0] for line in text.splitlines()[4:5]] == ["0.25"]
    store.write_bytes(b"")
    with pytest.raises(LabError, match="the dense network is not measured yet"):
        report_again(finished)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("recipe.yaml", None, "holds no recipe.yaml"),
        ("recipe.yaml", "model: {}", r"model.name: missing"),
        ("cells.json", "{", "cells.json is broken"),
        ("cells.json", "{}", "cells.json is broken"),
        ("environment.json", "", "environment.json is broken"),
        ("results.jsonl", "{}\n", r"results.jsonl:1 cannot be read"),
        ("sweep.json", "[]", "sweep.json is broken"),
    ],
)
def test_folders_that_are_broken(finished: Path, name: str, content: str | None, message: str) -> None:
    if content is None:
        (finished / name).unlink()
    else:
        (finished / name).write_text(content)
    with pytest.raises(LabError, match=message):
        report_again(finished)


def test_the_plan_of_a_sweep_is_plain(tmp_path: Path) -> None:
    sweep(points(tmp_path, "prune.importance=l1"), Here(), progress=False)
    assert json.loads((tmp_path / "sweep.json").read_text()) == {
        "points": [{"folder": "prune.importance=l1", "settings": {"prune.importance": "l1"}}]
    }
