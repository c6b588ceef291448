"""Small files in the layout of CIFAR, with checksums of their own."""

from __future__ import annotations

import hashlib
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import datasets

from intrafusion.lab.data import cifar
from intrafusion.lab.data.cifar import read_cifar
from intrafusion.lab.data.sources import cifar as cifar_data
from intrafusion.lab.errors import LabError
from intrafusion.lab.recipe.loader import read_recipe
from intrafusion.lab.run import run

KINDS: dict[str, Any] = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
IMAGES = 20
"""In each file."""


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (IMAGES, 3072), dtype=np.uint8)


@pytest.fixture(params=KINDS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def root(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with small batches that torchvision takes for whole, and with the archive of them."""
    kind = KINDS[name]
    folder = tmp_path / "cifar" / kind.base_folder
    folder.mkdir(parents=True)
    labels = [index % 10 for index in range(IMAGES)]

    def write(file: str, content: dict[str, Any]) -> str:
        # the real files are from Python 2, whose numpy wrote the flags of a dtype as numbers
        data = pickle.dumps(content, protocol=2).replace(b"\x89\x88\x87", b"K\x00K\x01\x87")
        (folder / file).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    key = "labels" if name == "cifar10" else "fine_labels"
    for half in ("train_list", "test_list"):
        batches = [(file, write(file, {"data": pixels(len(file) + i), key: labels}))
                   for i, (file, _) in enumerate(getattr(kind, half))]  # fmt: skip
        monkeypatch.setattr(kind, half, batches)
    meta = write(kind.meta["filename"], {kind.meta["key"]: [str(i) for i in range(cifar.CLASSES[name])]})
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": meta})
    archive = tmp_path / "cifar" / kind.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, kind.base_folder)
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    return tmp_path / "cifar"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("went to the network"))


def read(name: str, root: Path, train: bool = False, download: bool = False) -> tuple[np.ndarray, np.ndarray]:
    return read_cifar(name, root, train=train, download=download, progress=False)


def test_pixels_and_labels(name: str, root: Path) -> None:
    images, labels = read(name, root)
    assert images.shape == (IMAGES, 3, 32, 32)
    ((file, _),) = KINDS[name].test_list
    assert np.array_equal(images.reshape(IMAGES, -1), pixels(len(file)))
    assert labels.tolist() == [index % 10 for index in range(IMAGES)]
    assert len(read(name, root, train=True)[1]) == IMAGES * len(KINDS[name].train_list)


def test_the_archive_alone_is_enough_and_its_folder_is_not_written_to(name: str, root: Path, tmp_path: Path) -> None:
    expected = read(name, root)[0]
    (root / KINDS[name].base_folder).rename(tmp_path / "away")
    assert np.array_equal(read(name, root)[0], expected)
    assert [path.name for path in root.iterdir()] == [KINDS[name].filename]


def test_a_damaged_file_is_named(name: str, root: Path) -> None:
    ((file, md5),) = KINDS[name].test_list
    path = root / KINDS[name].base_folder / file
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(LabError, match=rf"holds damaged copies of: {file} \(md5 {md5}\); delete the folder"):
        read(name, root)


def test_missing_files_without_a_download_say_what_to_do(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    with pytest.raises(LabError) as error:
        read(name, tmp_path / "none")
    for part in (kind.base_folder, kind.filename, kind.tgz_md5, "data.download=true", "slow", "mirror", str(tmp_path)):
        assert part in str(error.value)
    assert not (tmp_path / "none").exists()


def test_a_part_of_the_archive_is_not_taken_for_the_whole(name: str, root: Path, tmp_path: Path) -> None:
    (root / KINDS[name].base_folder).rename(tmp_path / "away")
    archive = root / KINDS[name].filename
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(LabError, match=rf"{archive} is damaged or not whole: its md5 is not {KINDS[name].tgz_md5}"):
        read(name, root)


def test_a_download_replaces_what_is_broken_and_its_failure_says_what_to_do(
    name: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = KINDS[name]
    whole = (root / kind.filename).read_bytes()
    asked: list[str] = []

    def fetch(url: str, path: Path, md5: str, *, progress: bool) -> None:
        asked.append(url)
        if len(asked) == 1:
            raise LabError("the download broke off")
        path.write_bytes(whole)

    monkeypatch.setattr(cifar, "fetch", fetch)
    read(name, root, download=True)
    assert asked == []  # the folder is there
    new = tmp_path / "new"
    with pytest.raises(LabError, match=rf"broke off\. That host is slow .*put {kind.filename} \(md5 .*\) into {new}"):
        read(name, new, download=True)
    assert len(read(name, new, download=True)[1]) == IMAGES
    read(name, new, download=True)
    assert asked == [kind.url] * 2


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LabError, match=r"cannot download cifar10 to .*file/x: Not a directory; set data\.root"):
        read("cifar10", tmp_path / "file" / "x", download=True)


def test_nothing_is_read_before_a_split_is_asked_for(tmp_path: Path) -> None:
    data = cifar_data("cifar100", tmp_path)
    assert (data.shape, len(data.classes)) == ((3, 32, 32), 100)
    with pytest.raises(LabError, match="cifar100 is neither in"):
        data.split("test")


def test_a_run(name: str, root: Path, tmp_path: Path) -> None:
    classes = cifar.CLASSES[name]
    text = f"""\
model: {{name: "{__name__}:tiny", num_classes: {classes}}}
data: {{name: {name}, root: {root}, validation: 0.5, train_images: 16, test_images: 12}}
train: {{epochs: 1, batch_size: 5}}
prune: {{ratios: [0.5], ignored: ["5"]}}
fusion: barycentre
output: {tmp_path / "out"}
threads: 1
"""
    table = run(read_recipe(text, "r.yaml"), progress=False).table
    assert f"tiny on {name}: dense " in table
    assert "of 12 test images" in table


def tiny(num_classes: int) -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, stride=4), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(2),
        torch.nn.Flatten(), torch.nn.Linear(16, num_classes),
    )  # fmt: skip
