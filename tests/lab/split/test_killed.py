"""Runs with a section ``split``, in processes as they are in earnest, of which some are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from intrafusion import cli
from intrafusion.lab.split import training as split_training
from intrafusion.lab.split.run import run_split
from tests.lab.split.test_run import TEXT, finished, one_after_another, recipe

SMALL = ["split.schedules=paf,fap", "split.repair=statistics", "train.epochs=3", "split.budgets=0"]


def start(folder: Path, output: str) -> subprocess.Popen[str]:
    (folder / "r.yaml").write_text(TEXT)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(cli.__file__).resolve().parents[1])}
    command = [sys.executable, "-m", "intrafusion.cli", "run", "r.yaml", "--quiet", "--output", output]
    command += [word for setting in SMALL for word in ("--set", setting)]
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, stderr=subprocess.PIPE,
                            stdout=subprocess.DEVNULL)  # fmt: skip


def until(found: Callable[[], object], seconds: float = 900) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def workers(parent: int) -> dict[int, str]:
    """The processes that were spawned to train, by their parent's number, and their command lines."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            status, line = (entry / "stat").read_text(), (entry / "cmdline").read_text()
        except OSError:  # it ended just now
            continue
        if int(status.rpartition(")")[2].split()[1]) == parent and "spawn_main" in line:
            found[int(entry.name)] = line
    return found


def is_alive(process: int) -> bool:
    try:
        return (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_killed_workers_and_parents_change_nothing_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = tmp_path / "killed" / "checkpoints"

    run = start(tmp_path, "killed")
    until(lambda: list(checkpoints.glob("*.pt")) and workers(run.pid))
    os.kill(max(workers(run.pid)), signal.SIGKILL)
    told = run.communicate()[1]
    assert run.returncode == cli.FAILED
    assert "seed 0, part" in told
    assert "its process was killed (SIGKILL)" in told
    assert "run the same command again" in told

    run = start(tmp_path, "killed")
    until(lambda: workers(run.pid))
    orphans = workers(run.pid)
    run.kill()
    run.communicate()
    until(lambda: not any(map(is_alive, orphans)))
    left = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").rglob("*") if path.is_file()}
    time.sleep(0.5)
    assert {path: path.stat().st_mtime_ns for path in left} == left  # nobody goes on

    run = start(tmp_path, "killed")
    told = run.communicate()[1]
    assert run.returncode == cli.OK, told
    monkeypatch.setattr(split_training, "in_processes", one_after_another)
    run_split(recipe(tmp_path / "whole", *SMALL), progress=False)
    assert finished(tmp_path / "killed") == finished(tmp_path / "whole")
