from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from intrafusion.lab.errors import LabError
from intrafusion.lab.measure import Latency
from intrafusion.lab.results import Cell, Curve, GroupLine, Result, ResultStore, key_of_identity
from intrafusion.training.noise_scale import NoiseHistory, NoisyEpoch

LINE = GroupLine("features.0", 8, 4, 1.5, "paper", "", ((0, 1.0), (0, 0.75), (-1, 0.0)))
TIME = Latency(64, 0.001, 0.0001, "a processor", 1)
ONE = Result(Cell("discard", 0.5, "all"), 9, 10, 100, 1000, "abc", (LINE,), 0.1)
NOISE = NoiseHistory("lr / batch", 0.1, "flip", (NoisyEpoch(1, 0.1, 0.01, 3.5), NoisyEpoch(2, 0.05, 0.005)))
CURVE = Curve((0.5, 0.25), (10.0, 80.0, 85.5), 2, ((1, 9), (2, 8)), NOISE)
TUNED = Result(Cell("fused", 0.5, "all", "finetuned", 3), 10, 10, 100, 1000, "abc", (LINE,), 0.2, curve=CURVE)
TWO = Result(Cell("fused", 0.5, "all"), 10, 10, 100, 1000, "abc", (LINE,), 0.2, 10, 500, None, (TIME,))


def test_what_is_added_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.jsonl"
    store = ResultStore(path)
    store.add("k1", ONE, {"a": 1})
    store.add("k2", TWO, {"a": 2})
    again = ResultStore(path)
    assert again.get("k1") == ONE
    assert again.get("k2") == TWO
    assert again.get("k3") is None
    store.add("k3", TUNED, {})
    assert ResultStore(path).get("k3") == TUNED
    assert json.loads(path.read_text().splitlines()[1])["identity"] == {"a": 2}


def test_a_curve_of_an_older_version_has_no_noise(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "r.jsonl")
    store.add("k", TUNED, {})
    line = json.loads(store.path.read_text())
    del line["curve"]["noise"]
    store.path.write_text(json.dumps(line) + "\n")
    found = ResultStore(store.path).get("k")
    assert found == replace(TUNED, curve=replace(CURVE, noise=None))


@given(st.integers(1, 10_000))
def test_a_torn_last_line_is_dropped_wherever_it_is_torn(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("torn") / "results.jsonl"
    store = ResultStore(path)
    store.add("k1", ONE, {})
    whole = path.stat().st_size
    store.add("k2", TWO, {})
    size = path.stat().st_size
    content = path.read_bytes()
    path.write_bytes(content[: max(whole, size - 1 - cut % (size - whole))])
    again = ResultStore(path)
    assert again.get("k1") == ONE
    assert again.get("k2") is None
    again.add("k2", TWO, {})
    assert path.read_bytes() == content


def test_the_last_line_of_a_key_counts_and_forget_forgets(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "r.jsonl")
    store.add("k", ONE, {})
    store.forget()
    assert store.get("k") is None
    store.add("k", TWO, {})
    assert len(store.path.read_text().splitlines()) == 2
    assert ResultStore(store.path).get("k") == TWO


@pytest.mark.parametrize("line", [b"{}", b"nonsense", b"\xff", b'{"key": 1}', b"[]"])
def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "r.jsonl"
    ResultStore(path).add("k", ONE, {})
    path.write_bytes(path.read_bytes() + line + b"\n" + path.read_bytes())
    with pytest.raises(LabError, match=rf"^{path}:2 cannot be read .*remove that line"):
        ResultStore(path)


def test_lines_from_before_a_field_existed_are_read(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "r.jsonl")
    store.add("k", TWO, {})
    entry = json.loads(store.path.read_text())
    for name in ("top5", "size", "memory", "latency"):
        del entry[name]
    del entry["groups"][0]["plan"]
    store.path.write_text(json.dumps(entry) + "\n")
    old = ResultStore(store.path).get("k")
    assert old == replace(TWO, groups=(replace(LINE, plan=()),), top5=None, size=None, memory=None, latency=())
    assert old.top5_accuracy is None


def test_costs_that_are_not_finite_become_null(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "r.jsonl")
    odd = Result(ONE.cell, 1, 2, 3, 4, "", (GroupLine("g", 2, 1, float("nan"), "paper", ""),))
    store.add("k", odd, {})
    stored = ResultStore(store.path).get("k")
    assert stored is not None
    assert stored.groups[0].cost is None


def test_keys_depend_on_values_not_on_order() -> None:
    assert key_of_identity({"a": 1, "b": {"c": 2, "d": 3}}) == key_of_identity({"b": {"d": 3, "c": 2}, "a": 1})
    assert key_of_identity({"a": 1}) != key_of_identity({"a": 2})
