from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from intrafusion.lab.data import stratified
from intrafusion.lab.errors import LabError
from intrafusion.lab.sources import digits, image_folder


@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.floats(0.01, 0.99), st.integers(0, 5))
def test_stratified_parts_are_disjoint_complete_and_balanced(labels: list[int], share: float, seed: int) -> None:
    tensor = torch.tensor(labels)
    rest, taken = stratified(tensor, share, seed=seed)
    assert sorted([*rest.tolist(), *taken.tolist()]) == list(range(len(labels)))
    for value in set(labels):
        assert int((tensor[taken] == value).sum()) == round(share * labels.count(value))
    again = stratified(tensor, share, seed=seed)
    assert torch.equal(again[1], taken)


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


def test_a_limited_test_is_the_start_of_a_fixed_shuffle() -> None:
    small, large = digits(test_images=50).split("test"), digits(test_images=100).split("test")
    assert torch.equal(large.images[:50], small.images)
    assert len(small.labels.unique()) == 10
    assert len(digits(test_images=10**6).split("test")) == 539


def test_image_folder_holds_out_validation_images(image_root: Path) -> None:
    data = image_folder(image_root, validation=1 / 3)
    assert data.shape == (3, 32, 32)
    assert data.classes == ("cat", "dog")
    assert [len(data.split(name)) for name in ("train", "validation", "test")] == [8, 4, 6]
    assert data.split("validation").labels.tolist() == [0, 0, 1, 1]


def test_normalisation(image_root: Path) -> None:
    data = image_folder(image_root, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    images, labels = next(data.batches("test", 4))
    raw = data.split("test").images[:4].double() / 255
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1), torch.tensor([0.5, 1.0, 2.0]).view(1, 3, 1, 1)
    assert images.dtype == torch.float32
    assert torch.allclose(images.double(), (raw - mean) / std, atol=1e-6)
    assert labels.tolist() == data.split("test").labels[:4].tolist()
    with pytest.raises(LabError, match=r"data\.std has 2 values; the images have 3 channels"):
        image_folder(image_root, std=(1.0, 2.0))


def test_batches_cover_every_image_once_in_seeded_order() -> None:
    data = digits()
    order = [label for _, labels in data.batches("train", 100) for label in labels.tolist()]
    assert order == data.split("train").labels.tolist()

    def shuffled(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [x for _, labels in data.batches("train", 100, generator=generator) for x in labels.tolist()]

    assert shuffled(0) == shuffled(0) != shuffled(1)
    assert sorted(shuffled(0)) == sorted(order)


def test_drawn_images_are_a_seeded_choice_and_a_smaller_one_is_its_start() -> None:
    data = digits()
    images, labels = (torch.cat(parts) for parts in zip(*data.draw("train", 300, seed=1), strict=True))
    assert images.shape == (300, 1, 8, 8)
    assert torch.equal(next(data.draw("train", 20, seed=1))[0], images[:20])
    assert not torch.equal(next(data.draw("train", 20, seed=2))[1], labels[:20])
    assert sum(len(part) for _, part in data.draw("train", 10**6, seed=0)) == len(data.split("train"))


def test_val_stands_in_for_test(image_root: Path) -> None:
    (image_root / "test").rename(image_root / "val")
    data = image_folder(image_root, size=16, train_images=8)
    assert data.shape == (3, 16, 16)
    assert (len(data.split("test")), len(data.split("train"))) == (6, 8)


def test_errors(image_root: Path) -> None:
    with pytest.raises(LabError, match=r"a validation share of 0\.01 leaves no validation images of the 12"):
        image_folder(image_root, validation=0.01).split("validation")
    with pytest.raises(ValueError, match="split must be one of train, validation, test"):
        digits().split("testing")
    (image_root / "test" / "dog").rename(image_root / "test" / "elk")
    with pytest.raises(LabError, match="train/ and test/ hold different classes: dog, elk in only one"):
        image_folder(image_root)
