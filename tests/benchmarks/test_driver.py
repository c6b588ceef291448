"""The rivals' benchmark: rows that survive, comparisons that are right, losses that are told."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.rivals import __main__ as driver
from benchmarks.rivals import cells, figure, rows, table
from benchmarks.rivals.methods import METHODS, Entry
from benchmarks.rivals.rows import Cell, Row
from benchmarks.rivals.table import Place, Results
from intrafusion.lab.data.sources import digits
from intrafusion.lab.pretrained import Pretrained
from intrafusion.models import DigitsCNN

ROOTS = ["features.0", "features.3"]


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("INTRAFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("INTRAFUSION_DATA", raising=False)


@pytest.fixture
def network() -> cells.Network:
    return cells.Network("digits", DigitsCNN(widths=(8, 8, 8)).eval(), ROOTS, digits(test_images=100))


def row(method: str, wrong, *, seed: int = 0, importance: str = "L1", ratio: float = 0.5, **cell) -> Row:
    return Row(Cell("net", importance, ratio, method, seed, 0, **cell), np.asarray(wrong, dtype=bool), 1.5, 7, 9)


def wrong(count: int, total: int = 1000, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(total) < count


# --- rows


def test_rows_come_back_as_they_were_written(tmp_path: Path):
    written = [row("paper", wrong(13, 101)), row("discard", wrong(101, 101), group="features.0", seed=2)]
    for one in written:
        rows.append(tmp_path / "a.jsonl", one)
    for one in written:
        found = rows.read(tmp_path)[one.cell]
        assert replace(found, wrong=one.wrong) == one
        assert np.array_equal(found.wrong, one.wrong)
    line = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[0])
    assert (line["network"], line["method"], line["correct"], line["total"]) == ("net", "paper", 88, 101)


def test_a_damaged_last_line_is_left_out_and_removed_by_the_next_write(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    for seed in range(2):
        rows.append(path, row("paper", wrong(5), seed=seed))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.warns(UserWarning, match=r"a\.jsonl:2 is damaged"):
        assert [cell.seed for cell in rows.read(tmp_path)] == [0]
    rows.append(path, row("paper", wrong(5), seed=7))
    assert [cell.seed for cell in rows.read(tmp_path)] == [0, 7]


def test_an_error_is_tried_again_and_does_not_hide_a_result(tmp_path: Path):
    failed, done = row("paper", []), row("paper", wrong(5))
    rows.append(tmp_path / "a.jsonl", replace(failed, error="ValueError: no"))
    assert rows.finished(rows.read(tmp_path).values()) == set()
    rows.append(tmp_path / "a.jsonl", done)
    rows.append(tmp_path / "b.jsonl", replace(failed, error="ValueError: no"))
    assert rows.finished(rows.read(tmp_path).values()) == {done.cell}


# --- cells


def test_shards_are_disjoint_and_together_everything():
    everything = list(cells.grid(["a", "b"], ["L1", "Taylor"], None, list(METHODS), [0, 1], 100))
    parts = [[cell for cell in everything if cells.in_shard(cell, index, 3)] for index in (1, 2, 3)]
    assert sorted(str(cell) for part in parts for cell in part) == sorted(map(str, everything))
    assert min(map(len, parts)) > len(everything) / 5


def test_only_what_depends_on_a_seed_is_repeated():
    everything = list(cells.grid(["a"], list(cells.IMPORTANCES), [0.5], list(METHODS), [0, 1, 2], 100))
    assert len(set(everything)) == len(everything)
    seeds = {(i, m): [c.seed for c in everything if (c.importance, c.method) == (i, m)] for i in ("L1", "random")
             for m in METHODS}  # fmt: skip
    assert seeds["L1", "discard"] == seeds["L1", "paper"] == [0]
    assert seeds["L1", "data-free"] == seeds["random", "discard"] == [0, 1, 2]
    assert {c.images for c in everything if c.method == "discard" and c.importance == "L1"} == {0}
    assert {c.images for c in everything if c.method == "calibrated" or c.importance == "Taylor"} == {100}


@pytest.mark.parametrize("importance", cells.IMPORTANCES)
def test_methods_keep_the_same_channels_and_the_network_is_left_alone(network, importance, monkeypatch):
    before, kept = copy.deepcopy(network.dense.state_dict()), {}
    original = METHODS["discard"].prune

    def restless(*args, **kwargs):
        torch.rand(7)
        return original(*args, **kwargs)

    for name, method in (("quiet", original), ("restless", restless)):
        monkeypatch.setitem(cells.METHODS, "discard", Entry("discard", False, "", method))
        cell = Cell("digits", importance, 0.5, "discard", 1, 50)
        model, _ = cells._prune(network, cell, cells.SharedInputs())
        kept[name] = model.features[3].weight
        assert all(parameter.grad is None for parameter in model.parameters())
    assert kept["quiet"].shape == (4, 4, 3, 3)
    assert torch.equal(kept["quiet"], kept["restless"])
    assert all(torch.equal(value, before[name]) for name, value in network.dense.state_dict().items())
    row = cells.measure(network, Cell("digits", importance, 0.5, "paper", 1, 50), cells.SharedInputs())
    assert not row.error


def test_lamp_keeps_the_channels_of_l2(network):
    models = [cells._prune(network, Cell("digits", name, 0.5, "discard", 0, 0), cells.SharedInputs())[0]
              for name in ("L2", cells.LIKE_L2)]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_gradients_are_those_of_the_mean_loss(network):
    drawn = list(network.data.draw("train", 300, seed=3))
    images, labels = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    expected = copy.deepcopy(network.dense)
    nn.functional.cross_entropy(expected(images), labels).backward()
    found = copy.deepcopy(network.scored(300, 3))
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6)


def test_synthetic_inputs_are_made_once_and_their_time_counts(network):
    with cells.shared_inputs() as shared:
        first = cells.measure(network, Cell("digits", "L1", 0.25, "data-free", 0, 0), shared)
        assert shared.saved == 0
        again = cells.measure(network, Cell("digits", "L1", 0.25, "data-free", 0, 0), shared)
        assert len(shared._made) == 1
        assert again.seconds > shared.saved > 0
    assert np.array_equal(first.wrong, again.wrong)


def test_a_method_that_raises_is_a_row(network, monkeypatch):
    def broken(*_args, **_kwargs):
        raise ValueError("cannot")

    monkeypatch.setitem(cells.METHODS, "paper", Entry("paper", False, "", broken))
    failed = cells.measure(network, Cell("digits", "L1", 0.5, "paper", 0, 0), cells.SharedInputs())
    assert failed.error == "ValueError: cannot"
    text = table.report(Results.of([failed], 0), "command", 0)
    assert "Failed: 1 cells without a result" in text
    assert "digits, L1, 50%, paper, seed 0: ValueError: cannot" in text


# --- comparisons


def test_the_paired_interval_is_that_of_a_bootstrap():
    generator = np.random.default_rng(0)
    ours = [generator.random(2000) < 0.3 for _ in range(3)]
    rival = np.where(generator.random(2000) < 0.7, ours[0], generator.random(2000) < 0.35)
    methods = {"data-free": dict(enumerate(row("data-free", w) for w in ours)), "paper": {0: row("paper", rival)}}
    duel = table.duel(Place("net", "L1", 0.5), "data-free", "paper", methods)
    assert duel is not None
    difference = rival.astype(float) - np.mean(ours, axis=0)
    means = 100 * difference[generator.integers(0, 2000, (4000, 2000))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    assert duel.difference == pytest.approx(100 * difference.mean())
    assert duel.half == pytest.approx((high - low) / 2, rel=0.06)


def test_the_interval_of_one_accuracy_is_the_binomial_one():
    mean, half = table.mean_and_half(table.right([row("paper", wrong(200))]))
    assert mean == pytest.approx(80)
    assert half == pytest.approx(196 * (0.8 * 0.2 / 1000) ** 0.5, rel=1e-3)


def test_with_seeded_scores_only_common_seeds_are_compared():
    methods = {"data-free": {s: row("data-free", wrong(100), seed=s) for s in (0, 1)},
               "paper": {s: row("paper", wrong(100 + 100 * s), seed=s) for s in (1, 2)}}  # fmt: skip
    random = table.duel(Place("net", "random", 0.5), "data-free", "paper", methods)
    assert random is not None
    assert random.difference == pytest.approx(10)
    del methods["paper"][1]
    assert table.duel(Place("net", "random", 0.5), "data-free", "paper", methods) is None


def test_a_loss_is_told_and_the_winner_marked():
    found = [row("discard", wrong(500)), row("paper", wrong(100)), row("data-free", wrong(200)),
             row("calibrated", wrong(99))]  # fmt: skip
    text = table.report(Results.of(found, 1000), "the command", 1000)
    assert "`the command`" in text
    assert "1 of 5 comparisons are lost" in text
    assert "- net, L1, 50%: data-free against paper -10.00 ±" in text
    assert "| paper | no | **90.00** ± 1.86 |" in text
    assert "| data-free | no | 80.00 ±" in text
    assert "| calibrated | yes | **90.10** ±" in text


def test_no_loss_is_told_as_well_and_a_tie_is_none():
    found = [row("paper", wrong(195, seed=1)), row("data-free", wrong(200)), row("calibrated", wrong(150))]
    text = table.report(Results.of(found, 1000), "c", 1000)
    assert "None: in all 3 comparisons ours is better, or tied within the interval." in text


def test_calibrated_is_compared_with_data_free_methods_but_not_the_reverse():
    found = [row("paper", wrong(100)), row("data-free", wrong(300)), row("calibrated", wrong(200))]
    lost = {(one.ours, one.rival) for one in table.duels(Results.of(found, 0)) if one.lost}
    assert lost == {("data-free", "paper"), ("calibrated", "paper")}


def test_seeds_groups_sizes_and_the_dense_network_in_the_report():
    found = [row("data-free", wrong(100 * (s + 1)), seed=s) for s in range(3)]
    found += [row("dense", wrong(50), importance="", ratio=0.0), replace(row("discard", wrong(900)), params=8)]
    found += [row("discard", wrong(80), group="conv1"), row("data-free", wrong(120), group="conv1")]
    text = table.report(Results.of(found, 1000), "c", 1000)
    assert "| data-free | no | **80.00** ±" in text
    assert "[70.00, 90.00]" in text
    assert "(dense 95.00 ± 1.35)" in text
    assert "net, L1, 50%: parameters" in text
    assert "## net, one group at a time, L1 importance" in text
    assert "Lowest difference: net, conv1 alone, L1, 50%: data-free against discard -4.00" in text


def test_rows_of_other_image_counts_stay_out():
    other = Row(Cell("net", "L1", 0.5, "calibrated", 0, 128), wrong(1))
    assert not Results.of([other], 1000).found
    assert Results.of([other], 128).found


def test_the_figure_has_both_formats():
    found = [row(name, wrong(300), ratio=ratio) for name in METHODS for ratio in (0.3, 0.5)]
    files = figure.draw(Results.of([*found, row("dense", wrong(50), importance="", ratio=0.0)], 0))
    assert files is not None
    assert files["png"].startswith(b"\x89PNG")
    assert b"<svg" in files["svg"]
    assert figure.draw(Results.of([], 0)) is None


# --- the command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for half, count in (("train", 12), ("val", 4)):
        for name in ("cat", "dog", "eel"):
            (tmp_path / "photos" / half / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (40, 48 + index, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "photos" / half / name / f"{index}.png")
    return tmp_path / "photos"


def own(folder: Path, *more: str) -> list[str]:
    return ["--model", "torchvision:resnet18", "--folder", str(folder), "--size", "32", "--images", "8",
            "--results", str(folder.parent / "out"), "--ratio", "0.5", *more]  # fmt: skip


def test_ones_own_network_from_the_command_line_and_a_second_run_computes_nothing(folder, capsys, monkeypatch):
    arguments = own(folder, "--method", "discard", "--seeds", "2", "--importance", "random")
    for shard in ("1/2", "2/2"):
        driver.main([*arguments, "--shard", shard])
    text = (folder.parent / "out" / "report.md").read_text()
    assert capsys.readouterr().out.strip().endswith(text.strip())
    assert "## torchvision:resnet18 (" in text
    assert "| discard | no | " in text
    assert "--shard 2/2" in text
    found = rows.read(folder.parent / "out")
    assert sorted(cell.method for cell in found) == ["dense", "discard", "discard"]
    assert {len(one.wrong) for one in found.values()} == {12}
    monkeypatch.setattr(cells, "measure", lambda *_: pytest.fail("a finished cell was computed again"))
    driver.main(arguments)
    driver.main(["--report-only", "--results", str(folder.parent / "out")])


def test_errors_of_the_command_say_what_to_do(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def message(*arguments: str) -> str:
        with pytest.raises(SystemExit):
            driver.main(list(arguments))
        return " ".join(capsys.readouterr().err.split())

    assert "name the folder with the data" in message()
    assert "--model and --folder go together" in message("--model", "torchvision:resnet18")
    assert "so does loading them once with the library" in message(*own(folder, "--weights", "pretrained"))
    assert "no weights file at" in message(*own(folder, "--weights", str(tmp_path / "none.safetensors")))
    assert "knows the groups of the benchmark's own networks only" in message(*own(folder, "--groups"))
    assert "must be I/N" in message("--shard", "3/2")
    assert "must lie between 0 and 1" in message("--ratio", "1.5")
    assert "images differ in size" in message(*[a for a in own(folder) if a not in ("--size", "32")])
    five = Pretrained("", 5, "", tmp_path, lambda _: nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5)))
    monkeypatch.setattr(driver, "find_pretrained", lambda _: five)
    monkeypatch.setattr(Pretrained, "cached", True)
    text = message(*own(folder, "--weights", "pretrained"))
    assert "has 5 outputs" in text
    assert "has 3 class folders" in text
    assert "give a folder with all classes of the network" in text
