"""What a run is given: weights, folders of images, ImageNet, and what it cannot work with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from intrafusion.lab import training
from intrafusion.lab.errors import LabError, RecipeError
from intrafusion.lab.models import build_model
from intrafusion.lab.recipe.loader import Recipe, load_recipe, read_recipe
from intrafusion.lab.run import run
from intrafusion.lab.weights import save_weights
from intrafusion.models import DigitsCNN
from tests.lab.small import TEXT


def test_weights_instead_of_training(recipe: Recipe, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_weights(build_model("digits_cnn"), tmp_path / "w.safetensors")
    text = TEXT.replace("train: {epochs: 1, batch_size: 128}\n", "")
    given = [f"output={recipe.output}", f"model.weights={tmp_path / 'w.safetensors'}"]
    run(read_recipe(text, "r.yaml", given), progress=False)
    assert not (Path(recipe.output) / "dense.safetensors").exists()
    save_weights(DigitsCNN(widths=(2, 2, 2)), tmp_path / "w.safetensors")
    with pytest.raises(LabError, match="does not fit DigitsCNN"):
        run(read_recipe(text, "r.yaml", given), progress=False)


def test_folders_of_images(image_root: Path, tmp_path: Path) -> None:
    text = TEXT.replace("digits_cnn", "cifar_resnet20, num_classes: 2")
    text = text.replace("ignored: [classifier]", "ignored: [conv1, layer*.conv2, linear]")
    broken = image_root / "test" / "dog" / "0000.png"
    broken.write_bytes(b"no")
    given = ["data.name=image_folder", f"data.root={image_root}", f"output={tmp_path / 'out'}", "prune.ratios=0.5",
             "data.validation=0.2", "train.batch_size=4"]  # fmt: skip
    with pytest.raises(LabError, match=rf"cannot read {broken}"):
        run(read_recipe(text, "r.yaml", given), progress=False)
    table = run(read_recipe(text, "r.yaml", [*given, "data.on_corrupt=skip"]), progress=False).table
    assert "of 5 test images" in table
    assert f"* cannot read {broken}: not an image" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.slow
def test_the_imagenet_recipe_on_images_of_many_sizes(write_image: Callable[..., None], tmp_path: Path) -> None:
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("n01440764", "n01443537")):
            for index in range(count):
                path = tmp_path / "images" / split / name / f"{name}_{index}.JPEG"
                write_image(path, seed=10 * label + index, size=(70 + 10 * index, 90))
    torch.manual_seed(0)
    save_weights(build_model("torchvision:resnet50", 2), tmp_path / "images" / "resnet50.safetensors")
    recipe = load_recipe(Path(__file__).resolve().parents[2] / "recipes" / "imagenet_resnet50.yaml", [
        f"data.root={tmp_path / 'images'}", f"output={tmp_path / 'out'}", "model.num_classes=2",
        "model.weights=resnet50.safetensors", "data.size=32",
        "data.train_images=6", "prune.ratios=0.5", "prune.images=4", "fusion=barycentre",
        "fusion.cost=cosine",  # a matrix product; the other distances between 2048 channels take most of the time
    ])  # fmt: skip
    table = run(recipe, progress=False).table
    assert table.startswith("torchvision:resnet50 on ImageNet: dense ")
    assert "of 4 test images" in table


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("model.name=digitscnn", r"model\.name: no network is called 'digitscnn'; did you mean 'digits_cnn'\?"),
        ("model.name=cifar_resnet20", r"model\.name: 'cifar_resnet20' does not accept images of 1x8x8: "),
        ("model.num_classes=7", r"model\.num_classes: 7, but the images have 10 classes"),
        ("prune.ignored=fc", r"prune\.ignored\[0\]: 'fc' matches no layer; closest: "),
        ("prune.ignored=[]", r"prune\.ignored: pruning changed the network's output"),
        (f"model.name={__name__}:two_outputs", r"model\.name: .* does not return one logit per class"),
    ],
)
def test_recipes_that_do_not_fit(recipe: Recipe, assignment: str, message: str) -> None:
    text = TEXT.replace("[classifier]", "[]") if assignment.startswith("model.name") else TEXT
    with pytest.raises(RecipeError, match=rf"\n  --set {assignment.replace('[]', '..')}: {message}"):
        run(read_recipe(text, "r.yaml", [f"output={recipe.output}", assignment]), progress=False)


def two_outputs(num_classes: int) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, num_classes + 1))


def test_mistakes_show_before_training(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "train_", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(RecipeError, match="matches no layer"):
        run(replace(recipe, prune=replace(recipe.prune, ignored=("fc",))), progress=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="device: there is no GPU that torch can use; allowed here: auto, cpu"):
        run(replace(recipe, device="cuda"), progress=False)


def test_an_output_that_is_a_file(recipe: Recipe) -> None:
    Path(recipe.output).touch()
    with pytest.raises(RecipeError, match="output: cannot write to"):
        run(recipe, progress=False)
