from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from intrafusion.lab import images
from intrafusion.lab.errors import LabError
from intrafusion.lab.images import read_split


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
        array = read_split(image_root / "train", on_corrupt="skip")
        assert len(array.labels) == len(array.images) == 11
        assert array.skipped == (f"cannot read {path}: not an image",)
        assert "1 unreadable images were left out" in caplog.text


def test_skipping_a_whole_class_is_an_error(image_root: Path) -> None:
    for path in (image_root / "test" / "dog").iterdir():
        path.write_bytes(b"no")
    with pytest.raises(LabError, match=r"no readable image is left in .*test for class dog: cannot read"):
        read_split(image_root / "test", on_corrupt="skip")


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


def test_too_large_for_memory(image_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_MAX_BYTES", 1000)
    with pytest.raises(LabError, match="image_folder is for data sets that fit in memory"):
        read_split(image_root / "train")


def test_images_of_different_sizes_become_squares(image_root: Path, write_image: Callable[..., None]) -> None:
    write_image(image_root / "train" / "dog" / "0000.png", size=(80, 40))
    array = read_split(image_root / "train", size=32)
    assert array.images.shape == (12, 3, 32, 32)
    with Image.open(image_root / "train" / "cat" / "0000.png") as image:
        assert np.array_equal(array.images[0], np.asarray(image).transpose(2, 0, 1))
    with Image.open(image_root / "train" / "dog" / "0000.png") as image:
        expected = image.resize((73, 37)).crop((20, 2, 52, 34))
    assert np.array_equal(array.images[6], np.asarray(expected).transpose(2, 0, 1))


def test_a_limited_split_reads_only_so_many_files(image_root: Path) -> None:
    everything, some = read_split(image_root / "train"), read_split(image_root / "train", limit=5)
    assert len(some.labels) == 5
    assert some.classes == everything.classes
    assert all(any(np.array_equal(image, other) for other in everything.images) for image in some.images)
