"""Other images like given ones."""

from __future__ import annotations

import pytest
import torch

from intrafusion.correct.augmentation import augmented

X = torch.randn(64, 3, 16, 24, generator=torch.Generator().manual_seed(1))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_images_are_mirrored_moved_and_half_of_them_mixed():
    found = augmented((X,), seeded())[0]
    assert (found.shape, found.dtype) == (X.shape, X.dtype)
    assert not torch.equal(found, augmented((X,), seeded(1))[0])
    assert torch.equal(found, augmented((X,), seeded())[0])
    numbers = torch.arange(64.0)[:, None, None, None].expand(64, 1, 16, 16)  # the number of the image at every place
    mixed = augmented((numbers,), seeded())[0].flatten(1)
    assert torch.allclose(mixed, mixed[:, :1].expand_as(mixed), atol=1e-4)  # of whole images
    assert ((mixed >= 0) & (mixed <= 63)).all()
    alone = (mixed[:, 0] - torch.arange(64.0)).abs() < 1e-4
    assert 20 < alone.sum() < 44


def test_an_image_moves_as_a_whole_by_an_eighth_at_most():
    places = torch.arange(16.0 * 24).reshape(1, 1, 16, 24).expand(64, 1, 16, 24)
    down, right = (
        augmented((places,), seeded())[0][:, 0].long() // 24,
        augmented((places,), seeded())[0][:, 0].long() % 24,
    )
    seen_down, seen_right = down[:, 4:12, 6:18], right[:, 4:12, 6:18]  # far from the mirrored edges
    steps = (seen_right[:, :, 1:] - seen_right[:, :, :-1]).flatten(1)
    unmixed = (steps.abs() == 1).all(dim=1)
    assert unmixed.sum() > 20
    assert set(steps[unmixed][:, 0].tolist()) == {1, -1}  # mirrored by chance
    assert (seen_down[unmixed][:, 1:] - seen_down[unmixed][:, :-1] == 1).all()
    moved = seen_down[unmixed][:, 0, 0] - 4
    assert moved.abs().max() <= 2
    assert len(moved.unique()) > 2


def test_several_tensors_of_images_are_changed_alike():
    found = augmented({"left": X, "right": 2 * X}, seeded())
    assert torch.allclose(found["right"], 2 * found["left"])
    assert not torch.equal(found["left"], X)


def test_bytes_are_images_too():
    images = (X * 40 + 128).clamp(0, 255).to(torch.uint8)
    found = augmented((images,), seeded())[0]
    assert found.dtype == torch.uint8
    assert (found.int() - augmented((images.double(),), seeded())[0]).abs().max() <= 1


@pytest.mark.parametrize(
    "batch",
    [
        (torch.randn(4, 7),),
        {"input_ids": torch.randint(9, (4, 7))},
        (X[:4], torch.randn(4, 2)),
        (torch.randint(255, (4, 3, 8, 8)),),
        ([X[0], X[1]],),
    ],
    ids=["vectors", "tokens", "images and vectors", "numbers", "a list"],
)
def test_other_inputs_stay(batch):
    assert augmented(batch, seeded()) is batch
