"""The benchmark of rounded widths compares networks of the same size, in turns."""

from __future__ import annotations

import pytest

from benchmarks import round_to
from benchmarks.round_to import Cuts, in_turns, measure, widths


def test_twins_have_as_many_operations_and_rows_only_what_rounding_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(round_to, "_BLOCK", 1e-6)
    cuts = Cuts("cifar_resnet20")
    assert set(widths(cuts.prune(0.3, 8))) - {16, 32, 64} == {8, 40}
    rows = list(measure(cuts, "cifar_resnet20", 0.45, "fp32", batch=1, turns=2))
    assert [row.round_to for row in rows] == [4, 8, 16, 32]
    assert all(row.twin_macs == pytest.approx(row.macs, rel=0.05) for row in rows)
    assert all(len(row.times) == len(row.twin_times) == 2 for row in rows)
    half = measure(cuts, "cifar_resnet20", 0.5, "fp32", batch=1, turns=1)  # of widths 8, 16 and 32
    assert [row.round_to for row in half] == [16, 32]
    head = round_to.every_row(rows).splitlines()
    assert len(head) == 2 + len(rows)
    assert head[2].startswith("| cifar_resnet20 | fp32 | 1 | 45% | 4 |")
    assert len(round_to.overview(rows).splitlines()) == 2 + 1


def test_every_other_turn_is_reversed() -> None:
    order: list[int] = []
    timings = {(key, False): lambda key=key: float(order.append(key) or key) for key in (4, 8)}
    assert in_turns(timings, 3) == {(4, False): [4.0] * 3, (8, False): [8.0] * 3}
    assert order == [4, 8, 8, 4, 4, 8]
