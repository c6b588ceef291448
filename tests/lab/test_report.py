from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from intrafusion.lab.figure import draw
from intrafusion.lab.recipe import read_recipe
from intrafusion.lab.report import Study, to_markdown, to_text
from intrafusion.lab.results import Cell, GroupLine, Result

RECIPE = read_recipe(
    "model: {name: digits_cnn}\ndata: {name: digits, title: Figures}\ntrain: {}\n"
    "prune: {ratios: [0.5]}\noutput: 'my runs'\nfusion: {preset: paper, cost: l2}\n"
)


def study(groups: tuple[str, ...] = ("all",), ratios: tuple[float, ...] = (0.3, 0.6), **kwargs) -> Study:
    results = [Result(Cell("dense", 0.0, "all"), 877, 1000, 2_000_000, 40_600_000)]
    lines = (
        GroupLine("conv", 8, 4, 1.23456, "paper", ""),
        GroupLine("odd|one", 8, 4, None, "selection", "not understood"),
        GroupLine("same", 8, 8, None, "untouched", ""),
    )
    for group in groups:
        for ratio in ratios:
            results.append(Result(Cell("discard", ratio, group), 500, 1000, 1_000_000, 900_000))
            results.append(Result(Cell("fused", ratio, group), 612, 1000, 1_000_000, 900_000, groups=lines))
    return Study(RECIPE, tuple(results), **kwargs)


def test_the_text_table() -> None:
    assert to_text(study()) == (
        "digits_cnn on Figures: dense 87.70 % (877 of 1,000 test images), 2,000,000 parameters, 40.60 M MACs\n"
        "\n"
        "removed  discard    fused    gain              parameters               MACs\n"
        "----------------------------------------------------------------------------\n"
        "    0.3  50.00 %  61.20 %  +11.20  2,000,000 -> 1,000,000  40.60 M -> 0.90 M\n"
        "    0.6  50.00 %  61.20 %  +11.20  2,000,000 -> 1,000,000  40.60 M -> 0.90 M"
    )


def test_the_text_table_of_single_groups_names_them() -> None:
    lines = to_text(study(("layer1.conv", "layer2.conv"), (0.5,))).splitlines()
    assert lines[2].split()[0] == "group"
    assert [line.split()[0] for line in lines[4:]] == ["layer1.conv", "layer2.conv"]


def test_the_page() -> None:
    page = to_markdown(study(skipped=tuple(f"cannot read {i}.png" for i in range(25))), Path("my runs"))
    assert page.startswith("# digits_cnn on Figures\n")
    assert "| 0.3 | 50.00 % | 61.20 % | +11.20 | 2,000,000 -> 1,000,000 | 40.60 M -> 0.90 M |" in page
    assert "## Groups at 0.6 removed" in page
    assert "| `conv` | 8 -> 4 | 1.235 | paper |  |" in page
    assert "| `odd\\|one` | 8 -> 4 |  | selection | not understood |" in page
    assert "`same`" not in page
    assert "intrafusion run 'my runs/recipe.yaml'" in page
    assert "* and 5 more" in page


@pytest.mark.parametrize("groups", [("all",), ("a", "b"), tuple("abcdefghi")])
def test_the_figure_draws_both_lines_whatever_the_number_of_panels(groups: tuple[str, ...]) -> None:
    with Image.open(io.BytesIO(draw(study(groups)))) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    for colour in ((0x0B, 0x6E, 0x8F), (0xD1, 0x60, 0x3D), (0x7A, 0x7A, 0x7A)):
        assert (pixels == colour).all(1).sum() > 20 * len(groups)


def test_a_study_without_pairs_still_reports() -> None:
    assert "dense 87.70 %" in to_markdown(study(ratios=()), Path("x"))
    assert draw(study(ratios=()))
