"""The trained networks and the real CIFAR-10 images; needs the folder named by INTRAFUSION_DATA."""

from __future__ import annotations

from pathlib import Path

import pytest

from intrafusion.lab.data.dataset import Dataset
from intrafusion.lab.data.sources import image_folder
from intrafusion.lab.measure import Accuracy, evaluate
from intrafusion.lab.models import build_model
from intrafusion.lab.recipe.loader import load_recipe
from intrafusion.lab.run import run
from intrafusion.lab.weights import load_weights_

pytestmark = pytest.mark.slow
RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "cifar10_resnet20.yaml"


@pytest.fixture
def cifar10(cifar10_archive: Path, image_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    monkeypatch.setenv("INTRAFUSION_CACHE", str(image_cache))
    return image_folder(cifar10_archive, progress=False)


def score(network: str, file: str, data: Dataset, root: Path) -> Accuracy:
    model = build_model(network)
    load_weights_(model, root / "checkpoints" / f"{file}.safetensors")
    return evaluate(model, data, batch_size=250, progress=False)


def test_ten_thousand_test_images_in_ten_equal_classes(cifar10: Dataset) -> None:
    assert cifar10.classes[:3] == ("airplane", "automobile", "bird")
    assert cifar10.split("test").labels.bincount().tolist() == [1000] * 10
    assert cifar10.shape == (3, 32, 32)


def test_resnet20_scores_87_70_on_all_test_images(cifar10: Dataset, shared_data: Path) -> None:
    found = score("cifar_resnet20", "resnet20_cifar10", cifar10, shared_data)
    assert found.total == 10_000
    assert found.percent == pytest.approx(87.70, abs=0.1)


def test_vgg11_scores_1758_of_2000(cifar10: Dataset, cifar10_archive: Path, shared_data: Path) -> None:
    data = image_folder(cifar10_archive, test_images=2000, progress=False)
    found = score("cifar_vgg11_bn", "vgg11_bn_cifar10", data, shared_data)
    assert found.total == 2000
    assert abs(found.correct - 1758) <= 2  # rounding may turn a tie on another machine


def test_the_shipped_recipe_shows_that_fusion_helps(cifar10: Dataset, cifar10_archive: Path, tmp_path: Path) -> None:
    """Published on 10,000 images at 30 %: 36.76 discarded, 67.74 fused."""
    given = [f"data.root={cifar10_archive}", f"output={tmp_path / 'out'}", "data.test_images=1000", "prune.ratios=0.3"]
    run(load_recipe(RECIPE, [*given, "fusion=paper"]), progress=False)
    lines = (tmp_path / "out" / "report.md").read_text().splitlines()
    cells = next(line for line in lines if line.startswith("| 0.3 |")).split("|")
    discard, fused = (float(cell.split()[0]) for cell in cells[2:4])
    assert discard == pytest.approx(36.8, abs=5)
    assert fused == pytest.approx(67.7, abs=5)
