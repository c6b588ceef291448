"""The zoo measures a tiny network in a process of its own, resumes, and says in a word what became of each."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.zoo import __main__ as zoo
from benchmarks.zoo import dense, duplicates, entries, measure, table
from benchmarks.zoo.entries import Entry, images
from benchmarks.zoo.rows import PRESETS, Row, rows
from benchmarks.zoo.verdict import is_sound, verdict


def tiny() -> nn.Module:
    stem = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
    body = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))


class Sleeper(nn.Identity):
    def forward(self, x):
        end = time.process_time() + 60
        while time.process_time() < end:
            pass
        return x


TINY = Entry("ours:tiny", "torch", 0.001, tiny, images(8))
SLOW = Entry("ours:slow", "torch", 0.001, lambda: nn.Sequential(tiny(), Sleeper()), images(8))
ABSENT = Entry("nobody:absent", "no_such_library", 0.001, tiny, images(8))


@pytest.fixture(autouse=True)
def only_ours(monkeypatch):
    found = {entry.name: entry for entry in (TINY, SLOW, ABSENT)}
    monkeypatch.setattr("benchmarks.zoo.rows.entries", lambda: found)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_row_says_what_the_table_needs(preset, monkeypatch):
    monkeypatch.setattr(measure, "ONNX_IN", "")
    monkeypatch.setattr("intrafusion.correct.synthetic._FEWEST", 32)
    stages = []
    found = measure.Measurement(Row(TINY, preset), lambda known: stages.append(known["stage"])).measure()
    assert not found["errors"]
    assert found["left alone"] == ["8"]
    assert found["trained"] and found["saved"]  # noqa: PT018
    assert found["groups"] == 2
    assert found["error"] > 0
    assert found["twin"] > 0
    assert stages[:2] == ["build", "output"]
    assert ("duplicates" in found) == (preset in ("barycentre", "data-free", "calibrated"))
    assert found.get("duplicates", 0) < 1e-6
    if preset == "discard":
        assert found["as torch-pruning"]
        assert found["permutation"] < 1e-5
    json.dumps(found)
    assert len(table.cells(found)) == len(table.HEADER)


def test_rows_are_measured_once_and_again_if_asked(tmp_path: Path, capsys):
    arguments = ["--model", "tiny", "--preset", "discard", "--results", str(tmp_path / "zoo.jsonl")]
    zoo.main(arguments)
    assert "ours:tiny | discard | better" in capsys.readouterr().out
    with (tmp_path / "zoo.jsonl").open("a") as file:
        file.write('{"row": "cut o')
    zoo.main(arguments)
    assert "ours:tiny | discard" not in capsys.readouterr().out
    zoo.main([*arguments, "--measure", "all", "--tables", str(tmp_path / "a.md"), "--page", str(tmp_path / "a.html")])
    assert "| ours:tiny | discard | better | 2 |" in (tmp_path / "a.md").read_text()
    assert len(zoo.read(tmp_path / "zoo.jsonl")) == 1
    assert "<td>ours:tiny</td>" in (tmp_path / "a.html").read_text()


def test_a_row_that_hangs_or_cannot_be_built_says_so(tmp_path: Path, capsys):
    results = ["--results", str(tmp_path / "zoo.jsonl"), "--preset", "discard"]
    zoo.main(["--model", "slow", "--limit", "2", *results])
    assert "stopped after 2 s of processor time, in stage 'build'" in capsys.readouterr().out
    zoo.main(["--model", "slow", "--limit", "2", *results[:2], "--preset", "paper"])
    assert "slow | paper | too large" in capsys.readouterr().out
    zoo.main(["--model", "absent", *results])
    assert "no_such_library is not installed" in capsys.readouterr().out
    assert {verdict(record)[0] for record in zoo.read(tmp_path / "zoo.jsonl").values()} == {"too large", "skipped"}


def test_the_dense_network_has_statistics_and_no_constants():
    model = dense.dense_network(TINY)
    assert not model.training
    assert model[1].weight.std() > 0
    assert model[1].bias.std() > 0
    with torch.no_grad():
        normed = nn.BatchNorm2d(8, affine=False).train()(model[0](*TINY.inputs(64, dense.SETTLING)))
        settled = model[1](model[0](*TINY.inputs(64, dense.SETTLING)))
        scaled = normed * model[1].weight[:, None, None] + model[1].bias[:, None, None]
    assert torch.allclose(settled, scaled, atol=1e-2)


def test_half_of_each_class_are_copies_of_the_other_half():
    order, kept = duplicates.halves(torch.tensor([0, 0, 0, 0, 1, 1, 1]))
    assert order.tolist() == [0, 1, 0, 1, 4, 4, 4]
    assert kept.tolist() == [True, True, False, False, True, False, False]


SOUND = {
    "row": "n/calibrated",
    "model": "n",
    "preset": "calibrated",
    "errors": {},
    "error": 0.5,
    "twin": 0.6,
    "groups": 1,
}
RUNS_NOT = "does not run with its new widths: ..."
WORSE = {**SOUND, "error": 0.7}


@pytest.mark.parametrize(
    ("record", "word"),
    [
        (SOUND, "better"),
        (WORSE, "WORSE"),
        ({**WORSE, "warnings": ["fusion='x' left this network worse than plain cutting would have: ..."]}, "worse"),
        ({**SOUND, "groups": 0, "error": 0.0}, "nothing"),
        ({**SOUND, "duplicates": 0.5}, "FAULT"),
        ({**SOUND, "duplicates": 0.5, "duplicates cut only": ["conv"]}, "better"),
        ({**SOUND, "saved": False}, "FAULT"),
        ({**SOUND, "errors": {"training": "RuntimeError: no"}}, "FAULT"),
        ({**SOUND, "error": None, "errors": {"prune": "FusionError: no"}}, "refused"),
        ({**SOUND, "error": None, "errors": {"prune": "KeyError: 3"}, "raw": ["prune"]}, "CRASH"),
        ({**SOUND, "error": None, "errors": {"prune": "FusionError: while fusing group 'a': 3"}}, "CRASH"),
        ({**SOUND, "error": None, "errors": {"prune": f"FusionError: while it {RUNS_NOT}"}}, "refused"),
        ({**SOUND, "error": None, "errors": {"forward": "RuntimeError: shape"}}, "FAULT"),
        ({**SOUND, "error": None, "errors": {"prune": "RuntimeError: not enough memory"}}, "too large"),
        ({**SOUND, "stopped": "after 90 s"}, "better"),
    ],
)
def test_verdicts(record, word):
    assert verdict(record)[0] == word
    assert is_sound(record) == (word in ("better", "worse", "nothing"))


def test_the_zoo_has_every_network_of_torchvision(monkeypatch):
    from torchvision import models

    found = entries.entries()
    names = {*models.list_models(module=models), *models.list_models(module=models.segmentation)}
    assert {f"torchvision:{name}" for name in names} <= found.keys()
    assert [entry.millions for entry in found.values()] == sorted(entry.millions for entry in found.values())
    assert len([name for name in found if name.endswith(".backbone")]) == 6
    assert rows(["tiny"], ["paper"]) == [Row(TINY, "paper")]
