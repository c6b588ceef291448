from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from intrafusion.lab.stopwatch import Stopwatch, times_beside


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    return now


def test_only_work_that_was_kept_counts(tmp_path: Path, clock: list[float]) -> None:
    checkpoint = tmp_path / "a.pt"
    Stopwatch(checkpoint)
    checkpoint.touch()
    os.utime(checkpoint, (1030, 1030))  # written 30 seconds in; killed at some later time
    clock[0] = 2000
    again = Stopwatch(checkpoint)  # and killed before it wrote anything
    assert again.seconds() == 30
    clock[0] = 5000
    last = Stopwatch(checkpoint)
    clock[0] = 5012
    assert last.seconds() == 42


def test_without_a_checkpoint_everything_is_done_again(tmp_path: Path, clock: list[float]) -> None:
    Stopwatch(tmp_path / "a.pt")
    clock[0] = 2000
    assert Stopwatch(tmp_path / "a.pt").seconds() == 0


@pytest.mark.parametrize("content", ["", "[]", json.dumps({"spent": "x", "since": 1})])
def test_broken_times_stop_nothing(tmp_path: Path, clock: list[float], content: str) -> None:
    checkpoint = tmp_path / "a.pt"
    checkpoint.touch()
    times_beside(checkpoint).write_text(content)
    clock[0] += 7
    assert Stopwatch(checkpoint).seconds() == 0
