"""The benchmark of costs measures a tiny network in a process of its own, resumes, and says what took too long."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.cost import __main__ as cost
from benchmarks.cost import measure, rows, table
from benchmarks.cost.rows import ROWS, Row

TINY = Row("chain-4", "calibrated", 8, images=24, turns=1)


@pytest.mark.parametrize("method", ["torch-pruning", "paper", "calibrated", "data-free"])
def test_a_row_says_what_the_table_needs(method, monkeypatch):
    monkeypatch.setattr(rows, "inputs_read", lambda row, *_: 8)
    monkeypatch.setattr(measure, "inputs_read", rows.inputs_read)
    if method == "data-free":
        monkeypatch.setattr("intrafusion.correct.synthetic._FEWEST", 8)
        monkeypatch.setattr("intrafusion.correct.synthetic._MOST", 8)
    row = replace(TINY, method=method)
    seen = []
    found = measure.measure(row, "cpu", lambda known: seen.append(json.dumps(known)))
    assert len(found["seconds"]) == 1
    assert found["seconds"][0][0] > 0
    assert found["peak_gb"] > 0.05
    assert len(found["reference"]) == (method != "torch-pruning")
    assert len(found["passes"]) == (3 if method in ("calibrated", "data-free") else 0)
    assert len(seen) >= 2


@pytest.mark.slow
def test_rows_run_in_their_own_process_and_are_not_measured_twice(tmp_path: Path, capsys):
    arguments = ["--row", "chain-10/torch-pruning", "--results", str(tmp_path / "cost.jsonl")]
    cost.main(arguments)
    first = capsys.readouterr().out
    assert "python -m benchmarks.cost --here --row chain-10/torch-pruning --device cpu" in first
    assert "| chain-10 | torch-pruning |" in first
    cost.main(arguments)
    second = capsys.readouterr().out
    assert "--here" not in second
    assert second.strip() == first.split("\n", 1)[1].strip()


def test_what_takes_too_long_is_more_than_the_limit(tmp_path: Path, capsys):
    cost.main(["--row", "chain-10/calibrated", "--results", str(tmp_path / "cost.jsonl"), "--limit", "0.1"])
    assert "| chain-10 | calibrated | > " in capsys.readouterr().out


@pytest.mark.slow
def test_a_row_that_fails_says_why(tmp_path: Path, capsys):
    cost.main(["--row", "chain-10/calibrated", "--results", str(tmp_path / "c.jsonl"), "--device", "nowhere"])
    assert "RuntimeError" in capsys.readouterr().out


def test_passes_and_ratios_are_against_what_ran_beside_it():
    records = {
        "chain-10/calibrated": {"seconds": [[10.0, 12.0]], "reference": [[1.0, 2.0]], "passes": [[0.5, 1.0]] * 3,
                                "inputs": 1000, "peak_gb": 1.0},
        "chain-20/calibrated": {"seconds": [[30.0, 30.0]], "reference": [[1.0, 2.0]], "passes": [[1.0, 1.0]] * 3,
                                "inputs": 1000, "peak_gb": 1.0},
        "resnet50/torch-pruning": {"seconds": [[1.0, 1.0]] * 3, "peak_gb": 2.0},
        "resnet50/paper": {"seconds": [[2.0, 3.0], [8.0, 9.0], [3.0, 3.0]], "reference": [[1.0, 1.0]] * 3,
                           "peak_gb": 3.0},
    }  # fmt: skip
    lines = {tuple(c.strip() for c in line.split("|")[1:3]): line for line in table.report(records).splitlines()[2:]}
    cells = [cell.strip() for cell in lines["chain-20", "calibrated"].split("|")[1:-1]]
    assert cells[2:10] == ["30.0", "30.0", "30.0", "15.0", "1000", "1.00", "29.0", "28.0"]
    assert cells[-2:] == ["1.50", "1.50"]
    paper = [cell.strip() for cell in lines["resnet50", "paper"].split("|")[1:-1]]
    assert (paper[4], paper[5], paper[11]) == ("3.00", "3.00", "1.50")


def test_chains_have_the_layers_that_they_are_called_by():
    for row in (row for row in ROWS.values() if row.layers):
        layers = [m for m in rows.build(row).modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
        assert len(layers) == row.layers


def test_all_but_the_stream_and_the_classifier_of_a_cifar_network_is_pruned(monkeypatch):
    monkeypatch.delenv("INTRAFUSION_DATA", raising=False)
    pruned = {}
    for network in ("cifar_resnet20", "cifar_vgg11_bn"):
        model = rows.build(ROWS[f"{network}/calibrated"])
        ignored = rows.left_alone(ROWS[f"{network}/calibrated"], model)
        layers = {m: name for name, m in model.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))}
        pruned[network] = [name for layer, name in layers.items() if layer not in ignored]
    stages = [f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in (0, 1, 2)]
    assert pruned["cifar_resnet20"] == stages
    assert len(pruned["cifar_vgg11_bn"]) == 8
