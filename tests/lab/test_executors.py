from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from intrafusion import cli
from intrafusion.lab.errors import LabError
from intrafusion.lab.executors import Failure, Local, Task, make_executor
from intrafusion.lab.recipe.grid import parse_grid
from intrafusion.lab.recipe.loader import Recipe, read_points, read_recipe
from intrafusion.lab.results import Cell, Result
from intrafusion.lab.sweep import sweep
from tests.killing import kill_as_soon_as
from tests.lab import small
from tests.lab.test_sweep import Here

TEXT = small.TEXT.replace("threads: 1\n", "")  # the default
GRID = "prune.importance=l1,random"


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return [
            {k: v for k, v in row.items() if not k.startswith(("seconds", "latency"))} for row in csv.DictReader(file)
        ]


@pytest.mark.slow
def test_no_worker_two_workers_and_ray_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="the executor 'ray' is tested where ray is installed")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    found = {}
    for name, workers in (("here", None), ("local", 2), ("ray", None)):
        folder = tmp_path / f"{name}{workers}"
        points = read_points(TEXT.replace("0.25, ", ""), "r", [f"output={folder}"], parse_grid([GRID]))
        recipes = [point.recipe for point in points]
        executor = Here() if name == "here" else make_executor(name, recipes, workers)  # type: ignore[arg-type]
        swept = sweep(points, executor, progress=False)
        assert swept.failed == ()
        assert swept.computed == 5
        found[folder] = rows(folder)
    first, *others = found.values()
    assert len(first) == 6
    assert all(other == first for other in others)


@pytest.mark.slow
def test_a_killed_sweep_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(TEXT.replace("[0.25, 0.5]", "[0.1, 0.3, 0.4]"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(cli.__file__).resolve().parents[1])}

    def command(output: str) -> list[str]:
        return [sys.executable, "-m", "intrafusion.cli", "sweep", "r.yaml", "--grid", GRID, "--output", output,
                "--workers", "2"]  # fmt: skip

    def lines() -> int:
        return sum(path.read_bytes().count(b"\n") for path in (tmp_path / "killed").glob("*/results.jsonl"))

    process = subprocess.Popen(
        command("killed"), cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    kill_as_soon_as(lambda: lines() >= 4, process)
    assert 4 <= lines() < 14
    subprocess.run(command("killed"), cwd=tmp_path, env=environment, capture_output=True, check=True)
    text = (tmp_path / "r.yaml").read_text()
    here = Here()
    here.alone = False  # like two workers: no latency is measured
    sweep(read_points(text, "r.yaml", [f"output={tmp_path / 'whole'}"], parse_grid([GRID])), here, progress=False)
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    killed, whole = ((tmp_path / name / "report.md").read_text() for name in ("killed", "whole"))
    assert killed == whole.replace(f"report {tmp_path}/whole", "report killed")
    keys = [json.loads(line)["key"] for path in (tmp_path / "killed").glob("*/results.jsonl")
            for line in path.read_text().splitlines()]  # fmt: skip
    assert len(keys) == 14  # nothing was computed twice: the dense network is in both folders
    assert len(set(keys)) == 13


def test_failures_come_back_and_stop_nothing(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    good, bad = Task(recipe, tmp_path, Cell("dense", 0.0, "all")), Task(recipe, tmp_path, Cell("fused", 0.5, "fc"))
    outcomes = dict(Local(1).compute([bad, good]))
    assert isinstance(outcomes[0], Failure)
    assert outcomes[0].message.startswith("no group starts at 'fc'; groups: features.0")
    assert isinstance(outcomes[1], Result)
    assert outcomes[1].latency == ()


def test_a_killed_worker_is_told(tmp_path: Path) -> None:
    recipe = read_recipe(
        TEXT.replace("digits_cnn", f"{__name__}:killer"), "r", [f"output={tmp_path}", "prune.ignored=[]"]
    )
    with pytest.raises(LabError, match="a worker process was killed, most likely for want of memory"):
        list(Local(1).compute([Task(recipe, tmp_path, None)]))


def killer(num_classes: int) -> object:
    from intrafusion.models import DigitsCNN

    if os.getppid() == int(os.environ.get("PYTEST_HOME_PID", "-1")):
        os.kill(os.getpid(), signal.SIGKILL)
    return DigitsCNN(num_classes)


@pytest.fixture(autouse=True)
def home_pid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_HOME_PID", str(os.getpid()))


def test_workers_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    recipe = _recipe(tmp_path)
    assert make_executor("local", [recipe]).workers == 8  # type: ignore[attr-defined]
    threaded = read_recipe(TEXT, "r", [f"output={tmp_path}", "threads=3"])
    assert make_executor("local", [recipe, threaded]).workers == 2  # type: ignore[attr-defined]
    assert make_executor("local", [recipe], 1).alone
    assert not make_executor("local", [recipe], 2).alone


def test_ray_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(LabError, match=r"needs the package ray: pip install 'intrafusion\[ray\]'"):
        make_executor("ray", [_recipe(tmp_path)])


def _recipe(folder: Path) -> Recipe:
    return read_recipe(TEXT, "r", [f"output={folder}"])
