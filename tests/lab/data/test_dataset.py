from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from intrafusion.lab.data.dataset import Split
from intrafusion.lab.data.sources import digits, image_folder
from intrafusion.lab.errors import LabError


@pytest.mark.parametrize("overlap", [0.0, 0.25])
def test_all_parts_together_are_the_same_images(overlap: float) -> None:
    data = digits()
    parts, together = data.parts(3, overlap=overlap, seed=1), data.together(3, overlap=overlap, seed=1)
    rows = [dataset.split("train").rows for dataset in (*parts, together)]
    assert torch.equal(torch.cat(rows[:-1]).sort().values, rows[-1].sort().values)
    assert all(part.digest("test") == data.digest("test") for part in parts)
    assert all(part.digest("validation") == data.digest("validation") for part in parts)
    assert (together.digest("train") == data.digest("train")) == (overlap == 0)


def test_a_limited_test_is_the_start_of_a_fixed_shuffle() -> None:
    small, large = digits(test_images=50).split("test"), digits(test_images=100).split("test")
    assert torch.equal(large.images[:50], small.images)
    assert len(small.labels.unique()) == 10
    assert len(digits(test_images=10**6).split("test")) == 539


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


def test_an_unknown_split() -> None:
    with pytest.raises(ValueError, match="split must be one of train, validation, test"):
        digits().split("testing")


@given(st.lists(st.integers(0, 9), min_size=1), st.data())
def test_taking_twice_is_taking_the_taken(indices: list[int], data: st.DataObject) -> None:
    whole = Split(torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1), torch.arange(10))
    once = whole.take(torch.tensor(indices))
    again = torch.tensor(data.draw(st.lists(st.integers(0, len(indices) - 1), min_size=1)))
    twice = once.take(again)
    assert twice.shape == (len(again), 1, 1, 1)
    assert twice.images.flatten().tolist() == twice.labels.tolist() == torch.tensor(indices)[again].tolist()
    assert torch.equal(twice.read(slice(0, 2)), twice.images[:2])
    assert twice.source is whole.source


def test_a_digest_tells_which_images_there_are_without_reading_them(image_root: Path) -> None:
    def digest(name: str = "train", **settings) -> str:
        return image_folder(image_root, **settings).digest(name)

    assert digest() == digest(seed=0, validation=0.1)
    different = [digest(), digest("validation"), digest("test"), digest("test", test_images=3), digest(seed=1),
                 digest(validation=0.4), digest(train_images=8), digest(mean=(0.5,)), digest(size=16)]  # fmt: skip
    assert len(set(different)) == len(different)
    data = image_folder(image_root)
    split = data.split("train")
    object.__setattr__(split, "source", torch.empty(0, 3, 32, 32))
    assert data.digest("train") == digest()
