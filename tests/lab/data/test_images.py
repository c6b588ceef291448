from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import transforms

from intrafusion.lab.data import image_cache, images
from intrafusion.lab.data.images import Decoding, image_shape, read_split
from intrafusion.lab.errors import LabError

SKIP = Decoding(on_corrupt="skip")


def test_pixels_labels_and_classes(image_root: Path) -> None:
    array = read_split(image_root / "train")
    assert array.images.shape == (12, 3, 32, 32)
    assert array.images.dtype == np.uint8
    assert array.classes == ("cat", "dog")
    assert array.labels.tolist() == [0] * 6 + [1] * 6
    with Image.open(image_root / "train" / "dog" / "0002.png") as image:
        assert np.array_equal(array.images[8], np.asarray(image).transpose(2, 0, 1))


def test_decoded_once_until_a_file_changes(
    image_root: Path, write_image: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read_split(image_root / "test")
    decoded: list[Path] = []
    real = images._read_image
    monkeypatch.setattr(images, "_read_image", lambda path, *size: decoded.append(path) or real(path, *size))
    again = read_split(image_root / "test")
    assert decoded == []
    assert again.digest == first.digest
    assert np.array_equal(again.images, first.images)
    write_image(image_root / "test" / "cat" / "0000.png", seed=999)
    os.utime(image_root / "test" / "cat" / "0000.png", (1, 1))
    assert read_split(image_root / "test").digest != first.digest
    assert len(decoded) == 6


def test_a_damaged_cache_is_made_again(image_root: Path, own_cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = read_split(image_root / "test")
    (array,) = own_cache.rglob("images.npy")
    array.write_bytes(array.read_bytes()[:500])
    with caplog.at_level(logging.WARNING):
        assert read_split(image_root / "test").digest == first.digest
    assert "damaged" in caplog.text
    assert not [path for path in (own_cache / "images").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_an_unreadable_image_is_named(image_root: Path, content: bytes | None) -> None:
    path = image_root / "train" / "cat" / "0003.png"
    path.write_bytes(path.read_bytes()[:600] if content is None else content)
    with pytest.raises(LabError, match=rf"^cannot read {path}: "):
        read_split(image_root / "train")


def test_unreadable_images_can_be_skipped(image_root: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = image_root / "train" / "dog" / "0001.png"
    path.write_bytes(b"no")
    for _ in range(2):  # decoded, then from the cache
        caplog.clear()
        array = read_split(image_root / "train", SKIP)
        assert len(array.labels) == len(array.images) == 11
        assert array.skipped == (f"cannot read {path}: not an image",)
        assert "1 unreadable images were left out" in caplog.text


def test_skipping_a_whole_class_is_an_error(image_root: Path) -> None:
    for path in (image_root / "test" / "dog").iterdir():
        path.write_bytes(b"no")
    with pytest.raises(LabError, match=r"no readable image is left in .*test for class dog: cannot read"):
        read_split(image_root / "test", SKIP)


def test_different_sizes_are_named(image_root: Path, write_image: Callable[..., None]) -> None:
    odd = image_root / "train" / "dog" / "0000.png"
    write_image(odd, size=(40, 32))
    with pytest.raises(LabError, match=rf"images differ in size: {odd} is 40x32, .*0000.png is 32x32"):
        read_split(image_root / "train")


def test_empty_folders(image_root: Path, tmp_path: Path) -> None:
    (image_root / "train" / "eel").mkdir()
    (image_root / "train" / "eel" / "notes.txt").write_text("x")
    with pytest.raises(LabError, match=r"class folder .*/train/eel holds no images \(\.bmp, "):
        read_split(image_root / "train")
    with pytest.raises(LabError, match="holds no class folders; expected"):
        read_split(image_root / "train" / "eel")
    with pytest.raises(LabError, match="does not exist"):
        read_split(tmp_path / "nowhere")


def test_grey_images_hidden_files_and_case(image_root: Path) -> None:
    folder = image_root / "test" / "cat"
    Image.fromarray(np.full((32, 32), 7, dtype=np.uint8)).save(folder / "grey.PNG")
    (folder / "._0000.png").write_bytes(b"resource fork")
    array = read_split(image_root / "test")
    assert len(array.labels) == 7
    assert (array.images[3] == 7).all()


@pytest.fixture
def unwritable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("INTRAFUSION_CACHE", str(tmp_path / "file" / "cache"))


@pytest.mark.usefixtures("unwritable_cache")
def test_without_a_cache_images_are_in_memory(
    image_root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (image_root / "train" / "cat" / "0003.png").write_bytes(b"no")
    array = read_split(image_root / "train", SKIP)
    assert "cannot be written" in caplog.text
    assert "INTRAFUSION_CACHE" in caplog.text
    monkeypatch.setenv("INTRAFUSION_CACHE", str(tmp_path / "better"))
    stored = read_split(image_root / "train", SKIP)
    assert np.array_equal(array.images, stored.images)
    assert (array.labels.tolist(), array.digest) == (stored.labels.tolist(), stored.digest)


@pytest.mark.usefixtures("unwritable_cache")
def test_too_large_for_memory_and_no_cache(image_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_cache, "MEMORY_LIMIT", 1000)
    with pytest.raises(LabError, match=r"cannot be written \(.*\), and the 12 images of .*train do not fit in memory"):
        read_split(image_root / "train")


def test_a_full_disk_is_noticed_before_anything_is_decoded_in_vain(
    image_root: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usage = image_cache.shutil.disk_usage(image_root)._replace(free=12 * 3 * 32 * 32 - 1)
    monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda _: usage)
    assert len(read_split(image_root / "train").labels) == 12
    assert "No space left on device" in caplog.text
    assert not list(own_cache.rglob("*.npy"))
    caplog.clear()
    assert len(read_split(image_root / "test").labels) == 6
    assert caplog.text == ""


def test_a_failure_while_decoding_leaves_nothing_in_the_cache(image_root: Path, own_cache: Path) -> None:
    (image_root / "train" / "dog" / "0005.png").write_bytes(b"no")
    with pytest.raises(LabError, match="cannot read"):
        read_split(image_root / "train")
    assert [path.suffix for path in (own_cache / "images").iterdir()] == [".lock"]


def test_images_are_mapped_and_writing_to_them_changes_no_file(image_root: Path) -> None:
    first = read_split(image_root / "test")
    assert isinstance(first.images, np.memmap)
    first.images[:] = 0
    assert read_split(image_root / "test").images.any()


@pytest.mark.parametrize("workers", [1, 3])
def test_the_order_does_not_depend_on_the_workers(
    image_root: Path, workers: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(images, "_AHEAD", 2)
    array = read_split(image_root / "train", Decoding(workers=workers))
    monkeypatch.setenv("INTRAFUSION_CACHE", str(tmp_path / "other"))
    assert read_split(image_root / "train").digest == array.digest


def test_the_shape_is_known_from_one_image(image_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    real = images._read_image
    monkeypatch.setattr(images, "_read_image", lambda path, *size: read.append(path) or real(path, *size))
    assert image_shape(image_root / "test", Decoding()) == (3, 32, 32)
    assert len(read) == 1
    assert image_shape(image_root / "test", Decoding(size=16)) == (3, 16, 16)
    assert len(read) == 1
    (image_root / "test" / "cat" / "0000.png").write_bytes(b"no")
    assert image_shape(image_root / "test", SKIP) == (3, 32, 32)
    with pytest.raises(LabError, match=r"cannot read .*test/cat/0000.png: not an image"):
        image_shape(image_root / "test", Decoding())


def test_images_of_different_sizes_become_the_squares_of_torchvision(
    image_root: Path, write_image: Callable[..., None]
) -> None:
    write_image(image_root / "train" / "dog" / "0000.png", size=(80, 40))
    array = read_split(image_root / "train", Decoding(size=32))
    assert array.images.shape == (12, 3, 32, 32)
    with Image.open(image_root / "train" / "cat" / "0000.png") as image:
        assert np.array_equal(array.images[0], np.asarray(image).transpose(2, 0, 1))
    with Image.open(image_root / "train" / "dog" / "0000.png") as image:
        expected = transforms.Compose([transforms.Resize(37), transforms.CenterCrop(32)])(image)
    assert np.array_equal(array.images[6], np.asarray(expected).transpose(2, 0, 1))
    larger = read_split(image_root / "train", Decoding(size=32, resize=40)).images[6]
    with Image.open(image_root / "train" / "dog" / "0000.png") as image:
        assert np.array_equal(larger, np.asarray(image)[4:36, 24:56].transpose(2, 0, 1))


def test_a_limited_split_reads_only_so_many_files(image_root: Path) -> None:
    everything, some = read_split(image_root / "train"), read_split(image_root / "train", limit=5)
    assert len(some.labels) == 5
    assert some.classes == everything.classes
    assert all(any(np.array_equal(image, other) for other in everything.images) for image in some.images)
