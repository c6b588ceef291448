"""The command `intrafusion landscape` from files to figures, on a network of a few channels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from intrafusion import cli
from intrafusion.lab.data.sources import digits
from intrafusion.lab.landscape.loss import Path as Line
from intrafusion.lab.landscape.report import Landscape, LandscapeSettings
from intrafusion.lab.recipe.sections import TrainSection
from intrafusion.lab.training import train_
from intrafusion.lab.weights import save_weights
from intrafusion.models import DigitsCNN

RECIPE = """\
model: {name: "tests.lab.landscape.test_report:pico"}
data: {name: digits, test_images: 100}
train: {}
prune: {ratios: [0.5], ignored: [classifier]}
output: unused
threads: 1
"""
OUTPUT = ["r.yaml", "--output", "out", "--steps", "3"]


def pico(num_classes: int = 10) -> nn.Module:
    """Small enough to be trained in a test."""
    return DigitsCNN(widths=(4, 4, 4), num_classes=num_classes)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A trained network, two from other starts, and a copy of the first with its channels in another order."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE)
    networks = {}
    for name in "abc":
        torch.manual_seed(ord(name))
        networks[name] = pico()
        train_(networks[name], digits(), TrainSection(epochs=1, batch_size=128), progress=False)
    state = networks["a"].state_dict()
    order = torch.tensor([2, 0, 3, 1])
    moved = {key: value[order] if key.startswith(("features.0.", "features.1.")) and value.dim() else value
             for key, value in state.items()}  # fmt: skip
    moved["features.3.weight"] = state["features.3.weight"][:, order]
    networks["shuffled"] = pico()
    networks["shuffled"].load_state_dict(moved)
    for name, network in networks.items():
        save_weights(network, tmp_path / f"{name}.safetensors")
    return [f"{name}.safetensors" for name in networks]


def test_a_shuffled_copy_has_a_barrier_only_until_it_is_aligned(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, *_, shuffled = files
    assert cli.main(["landscape", a, shuffled, *OUTPUT, "--images", "60"]) == cli.OK
    captured = capsys.readouterr()
    assert "126 validation images; A: loss " in captured.out
    assert captured.out.endswith("\nreport: out/landscape.md\n")
    found = json.loads((tmp_path / "out" / "landscape.json").read_text())
    lines = found["lines"]
    assert list(lines) == ["naive", "aligned", "aligned, re-estimated"]
    assert lines["naive"]["loss_barrier"] > 1e-3
    assert lines["aligned"]["loss_barrier"] < 1e-5
    assert lines["aligned"]["accuracy_barrier"] == 0
    assert lines["naive"]["loss"][0] == lines["aligned"]["loss"][0]
    assert found["networks"] == {"A": a, "B": shuffled}
    assert found["plane"] is None
    assert list(found["unaligned"]) == ["classifier"]


def test_a_third_network_makes_a_plane(files: list[str], tmp_path: Path) -> None:
    a, b, c, _ = files
    assert cli.main(["landscape", a, b, *OUTPUT, "--third", c, "--resolution", "2", "--images", "60"]) == cli.OK
    found = json.loads((tmp_path / "out" / "landscape.json").read_text())
    assert found["networks"] == {"A": a, "B": b, "C": c}
    assert np.shape(found["plane"]["loss"]) == (2, 2)
    report = (tmp_path / "out" / "landscape.md").read_text()
    for name in ("landscape_line.png", "landscape_plane.png"):
        assert f"({name})" in report
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_the_plane_through_a_network_and_its_own_copy_is_an_error_before_anything_is_written(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, _, shuffled = files
    assert cli.main(["landscape", a, b, *OUTPUT, "--third", shuffled, "--resolution", "2"]) == cli.FAILED
    assert "lie on one line" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_json_and_the_test_split_and_no_statistics(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "landscape_plane.png").touch()  # of an earlier call
    assert cli.main(["landscape", *files[:2], *OUTPUT, "--split", "test", "--images", "0", "--json"]) == cli.OK
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "out" / "landscape.json").read_text())
    assert (found["split"], found["images"], found["plane"]) == ("test", 100, None)
    assert list(found["lines"]) == ["naive", "aligned"]
    assert not (tmp_path / "out" / "landscape_plane.png").exists()


def test_bad_files_are_named_and_nothing_is_written(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_weights(DigitsCNN(widths=(4, 4, 6)), tmp_path / "wider.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"no weights")
    for second, message in (
        ("nowhere.safetensors", "no weights file at nowhere.safetensors"),
        (
            "wider.safetensors",
            "wider.safetensors does not fit DigitsCNN:\n  shapes differ: classifier.weight is [10, 24]",
        ),
        ("torn.safetensors", "torn.safetensors is truncated or not a safetensors file"),
    ):
        for order in ([files[0], second], [second, files[0]], [*files[:2], "--third", second]):
            assert cli.main(["landscape", *order, *OUTPUT]) == cli.FAILED
            captured = capsys.readouterr()
            assert message in captured.err
            assert captured.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--steps", "1"], ["--images", "-1"], ["--split", "train"]])
def test_wrong_settings_are_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(["landscape", "a", "b", *OUTPUT, *arguments])
    assert error.value.code == cli.USAGE
    assert arguments[0] in capsys.readouterr().err


def test_a_loss_that_is_not_finite_half_way_is_null_in_json() -> None:
    line = Line(np.array([0.0, 0.5, 1.0]), np.array([1.0, np.nan, 1.0]), np.array([0.9, 0.1, 0.9]))
    found = Landscape("x", LandscapeSettings(), (Path("a"), Path("b")), 10, {"naive": line}, {}).plain()
    assert found["lines"]["naive"]["loss"] == [1.0, None, 1.0]
    assert found["lines"]["naive"]["loss_barrier"] is None
    assert found["lines"]["naive"]["accuracy_barrier"] == pytest.approx(0.8)
