"""Images of one's own: a function that a recipe names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from intrafusion.lab.data.own import own
from intrafusion.lab.errors import LabError, RecipeError
from intrafusion.lab.recipe.loader import read_recipe
from intrafusion.lab.run import run
from tests.lab.data.test_sources import RECIPE

calls: list[tuple[str, Path | None]] = []


def stripes(half: str, root: Path | None, count: int = 40) -> tuple[Tensor, Tensor]:
    """Class `c` has a bright row `c`."""
    calls.append((half, root))
    labels = torch.arange(count if half == "train" else count // 2) % 4
    noise = torch.Generator().manual_seed(len(labels))
    images = torch.randint(0, 60, (len(labels), 3, 8, 8), generator=noise, dtype=torch.uint8)
    images[torch.arange(len(labels)), :, labels] += 190
    return images, labels


def read_only(half: str, root: Path | None) -> tuple[np.ndarray, np.ndarray]:
    images, labels = (part.numpy() for part in stripes(half, root))
    images.flags.writeable = labels.flags.writeable = False
    return images, labels


ZEROS = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
RETURNED: dict[str, tuple[Any, str]] = {
    "nothing": (None, "for 'test' a NoneType; expected images uint8 [N, C, H, W] and labels int64 [N]"),
    "floats": ((ZEROS.float(), torch.tensor([0, 1])), "for 'test' float32 [2, 3, 8, 8], int64 [2]; expected images"),
    "few labels": ((ZEROS, torch.tensor([0])), "for 'test' uint8 [2, 3, 8, 8], int64 [1]; expected images"),
    "no image": ((ZEROS[:0], torch.tensor([]).long()), "uint8 [0, 3, 8, 8], int64 [0]; expected images"),
    "classes": ((ZEROS, torch.tensor([0, 4])), "labels from 0 to 4; with model.num_classes=4: from 0 to 3"),
}


def returned(half: str, root: Path | None) -> Any:
    return RETURNED[str(root)][0]


def broken(half: str, root: Path | None) -> Any:
    raise KeyError("moon")


def uneven(half: str, root: Path | None) -> tuple[Tensor, Tensor]:
    images, labels = stripes(half, root)
    return (images[..., :4] if half == "train" else images), labels


@pytest.mark.parametrize("function", ["stripes", "read_only"])
def test_a_function_is_a_data_set(function: str) -> None:
    calls.clear()
    data = own(f"{__name__}:{function}", 4, Path("somewhere"), validation=0.2, test_images=6, mean=(0.1,))
    assert (data.shape, data.classes) == ((3, 8, 8), ("0", "1", "2", "3"))
    assert calls == [("test", Path("somewhere"))]
    assert [len(data.split(name)) for name in ("train", "validation", "test")] == [32, 8, 6]
    assert [half for half, _ in calls] == ["test", "train"]
    assert (data.mean, data.std) == ((0.1,), (0.25,))


@pytest.mark.parametrize("case", RETURNED)
def test_what_a_function_returns_is_checked(case: str) -> None:
    with pytest.raises(LabError) as error:
        own(f"{__name__}:returned", 4, Path(case))
    assert f"'{__name__}:returned' returned " in str(error.value)
    assert RETURNED[case][1] in str(error.value)


def test_a_function_that_fails_or_is_not_there() -> None:
    with pytest.raises(LabError, match=r"broken': the call with 'test' and root=None failed: 'moon'"):
        own(f"{__name__}:broken", 4)
    with pytest.raises(LabError, match="has no 'stripe'"):
        own(f"{__name__}:stripe", 4)
    with pytest.raises(LabError, match="images of 3x8x4 for training, images of 3x8x8 for the test"):
        own(f"{__name__}:uneven", 4).split("train")


def test_a_run_on_images_of_ones_own(tmp_path: Path) -> None:
    text = RECIPE.replace(
        "fake, size: 8, test_images: 40, train_images: 200", f"'{__name__}:stripes', train_images: 36"
    )
    text = text.replace(":tiny}", ":tiny, num_classes: 4}").replace("OUT", str(tmp_path / "run"))
    recipe = read_recipe(text.replace(f"{__name__}:tiny", "tests.lab.data.test_sources:tiny"))
    assert "of 20 test images" in run(recipe, progress=False).table
    allowed = "imagenet, image_folder, image_halves, fake"
    with pytest.raises(RecipeError, match=rf"data\.size: not for .*:stripes; only for {allowed}"):
        read_recipe(text, "recipe", ["data.size=8"])
