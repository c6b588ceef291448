from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from intrafusion.lab.data import images
from intrafusion.lab.data.dataset import Dataset
from intrafusion.lab.data.sources import digits, fake, image_folder, image_halves, imagenet
from intrafusion.lab.errors import LabError
from intrafusion.lab.inspection import inspect
from intrafusion.lab.measure import evaluate
from intrafusion.lab.recipe.loader import read_recipe
from intrafusion.lab.recipe.sections import TrainSection
from intrafusion.lab.run import run
from intrafusion.lab.training import train_

RECIPE = """\
model: {name: MODULE:tiny}
data: {name: fake, size: 8, test_images: 40, train_images: 200}
train: {epochs: 1, batch_size: 50}
prune: {ratios: [0.5], ignored: ["4"]}
fusion: barycentre
output: OUT
threads: 1
""".replace("MODULE", __name__)


def tiny(num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, num_classes)
    )


def test_digits_splits() -> None:
    data = digits()
    sizes = {name: len(data.split(name)) for name in ("train", "validation", "test")}
    assert sum(sizes.values()) == 1797
    assert sizes["test"] == 539
    assert data.split("test").labels.bincount().min() > 50
    pixels = {bytes(image.numpy()) for image in data.split("test").images}
    assert not pixels & {bytes(image.numpy()) for image in data.split("train").images}


def test_the_test_images_do_not_depend_on_the_seed_but_the_validation_images_do() -> None:
    first, second = digits(seed=0), digits(seed=1)
    assert first.digest("test") == second.digest("test")
    assert first.digest("validation") != second.digest("validation")
    assert first.digest("validation") == digits(seed=0).digest("validation")


def test_image_folder_holds_out_validation_images(image_root: Path) -> None:
    data = image_folder(image_root, validation=1 / 3)
    assert data.shape == (3, 32, 32)
    assert data.classes == ("cat", "dog")
    assert [len(data.split(name)) for name in ("train", "validation", "test")] == [8, 4, 6]
    assert data.split("validation").labels.tolist() == [0, 0, 1, 1]


def test_val_stands_in_for_test(image_root: Path) -> None:
    (image_root / "test").rename(image_root / "val")
    data = image_folder(image_root, size=16, train_images=8)
    assert data.shape == (3, 16, 16)
    assert (len(data.split("test")), len(data.split("train"))) == (6, 8)


@pytest.mark.parametrize("prefix", [None, "", "sample/"])
def test_every_second_image_of_a_folder_without_halves_is_for_the_test(
    tmp_path: Path, write_image: Callable[..., None], make_archive: Callable[..., Path], prefix: str | None
) -> None:
    root = tmp_path / "sample"
    for label, name in enumerate(("n02", "n00", "n03", "n01")):
        write_image(root / name / f"{name}.jpg", seed=label, size=(20, 16))
    data = image_halves(root if prefix is None else make_archive(root, prefix), size=8, resize=10)
    assert (data.classes, data.shape) == (("n00", "n01", "n02", "n03"), (3, 8, 8))
    assert [data.split(name).labels.tolist() for name in ("train", "test")] == [[0, 2], [1, 3]]
    with pytest.raises(LabError, match="leaves no validation images of the 2 training images"):
        data.split("validation")  # one image a class
    assert len(image_halves(root, train_images=1, test_images=1).split("train")) == 1


def test_halves_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(LabError, match=r"nowhere is neither a folder of class folders nor a tar archive"):
        image_halves(tmp_path / "nowhere")
    with pytest.raises(LabError, match="holds no class folders"):
        image_halves(tmp_path)


def test_errors(image_root: Path) -> None:
    with pytest.raises(LabError, match=r"a validation share of 0\.01 leaves no validation images of the 12"):
        image_folder(image_root, validation=0.01).split("validation")
    (image_root / "test" / "dog").rename(image_root / "test" / "elk")
    with pytest.raises(LabError, match="train/ and test/ hold different classes: dog, elk in only one"):
        image_folder(image_root)


def test_no_image_is_decoded_before_a_split_is_asked_for(image_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    real = images._read_image
    monkeypatch.setattr(images, "_read_image", lambda path, *size: read.append(path) or real(path, *size))
    assert image_folder(image_root).shape == (3, 32, 32)
    assert len(read) == 1
    data = image_folder(image_root, size=16)
    assert data.shape == (3, 16, 16)
    assert len(read) == 1
    data.split("test")
    assert len(read) == 7


@pytest.fixture
def imagenet_root(tmp_path: Path, write_image: Callable[..., None]) -> Path:
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("n01443537", "n01440764")):
            for index in range(count):
                path = tmp_path / "ilsvrc" / split / name / f"{name}_{index}.JPEG"
                write_image(path, seed=10 * label + index, size=(30 + index, 40))
    return tmp_path / "ilsvrc"


def test_imagenet_is_its_validation_images_cut_to_224(imagenet_root: Path, tmp_path: Path) -> None:
    data = imagenet(imagenet_root, validation=0.25)
    assert (data.shape, data.classes) == ((3, 224, 224), ("n01440764", "n01443537"))
    assert [len(data.split(name)) for name in ("train", "validation", "test")] == [6, 2, 4]
    assert data.split("test").images.shape == (4, 3, 224, 224)
    unpacked = tmp_path / "archive" / "ILSVRC" / "Data" / "CLS-LOC"
    shutil.copytree(imagenet_root, unpacked)
    (unpacked / "test").mkdir()
    assert torch.equal(imagenet(tmp_path / "archive").split("test").images, data.split("test").images)


def test_imagenet_needs_training_images_only_for_what_uses_them(imagenet_root: Path) -> None:
    shutil.rmtree(imagenet_root / "train")
    data = imagenet(imagenet_root, size=32)
    assert len(data.split("test")) == 4
    with pytest.raises(LabError, match=r"ilsvrc/train does not exist"):
        data.split("train")


def test_imagenet_in_other_folders(imagenet_root: Path, image_root: Path, tmp_path: Path) -> None:
    with pytest.raises(LabError, match=rf"{tmp_path} holds no folder val/; expected {tmp_path}/val/<wnid>/\*\.JPEG"):
        imagenet(tmp_path)
    (image_root / "test").rename(image_root / "val")
    with pytest.raises(LabError, match=r"WordNet ids such as n01440764, not cat, dog; .* data\.name: image_folder"):
        imagenet(image_root)
    flat = imagenet_root / "val"
    for folder in [path for path in flat.iterdir() if path.is_dir()]:
        for path in folder.iterdir():
            path.rename(flat / path.name)
        folder.rmdir()
    with pytest.raises(LabError, match=r"val holds 4 images .*validation archive is flat; move each .* valprep\.sh"):
        imagenet(imagenet_root)


def test_inspect_decodes_nothing(imagenet_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_read_image", lambda *_: pytest.fail("decoded an image"))
    text = RECIPE.replace("fake, size: 8", f"imagenet, size: 8, root: {imagenet_root}").replace(
        "tiny", "tiny, num_classes: 2"
    )
    assert "8 -> 4" in str(inspect(read_recipe(text, "r.yaml"), progress=False))


def test_fake_images_are_the_same_every_time_and_different_in_each_split() -> None:
    first, second = (
        fake(5, size=16, train_images=100, test_images=50),
        fake(5, size=16, train_images=100, test_images=50),
    )
    assert [len(first.split(name)) for name in ("train", "validation", "test")] == [90, 10, 50]
    for name in ("train", "test"):
        assert first.digest(name) == second.digest(name)
        assert first.split(name).labels.bincount().tolist() == [len(first.split(name)) // 5] * 5
    assert not torch.equal(first.split("test").images[:50], first.split("train").images[:50])
    assert first.split("test").images.float().std() > 20
    assert fake(5, size=16).split("test").images.shape == (500, 3, 16, 16)


def test_a_network_learns_fake_images() -> None:
    data = fake(4, size=8, train_images=300, test_images=100)
    model = tiny(4)
    before = accuracy(model, data)
    train_(model, data, TrainSection(epochs=3, lr=0.02, batch_size=30), progress=False)
    assert before < 60 < 80 < accuracy(model, data)


def accuracy(model: nn.Module, data: Dataset) -> float:
    return evaluate(model.eval(), data, "test", progress=False).percent


def test_a_run_on_fake_images(tmp_path: Path) -> None:
    table = run(read_recipe(RECIPE, "r.yaml", [f"output={tmp_path / 'out'}"]), progress=False).table
    assert "tiny on fake: dense " in table
    assert "of 40 test images" in table
    wider = [f"output={tmp_path / 'wide'}", "model.num_classes=3"]
    assert "of 40 test images" in run(read_recipe(RECIPE, "r.yaml", wider), progress=False).table
