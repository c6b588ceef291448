from __future__ import annotations

import csv
import io
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from intrafusion.lab.measure import Latency
from intrafusion.lab.recipe.loader import read_recipe
from intrafusion.lab.reports.contents import csv_rows, table, verdict
from intrafusion.lab.reports.figure import draw
from intrafusion.lab.reports.page import to_html
from intrafusion.lab.reports.report import to_markdown, to_text
from intrafusion.lab.reports.svg import _ticks
from intrafusion.lab.reports.tables import to_csv
from intrafusion.lab.results import Cell, GroupLine, Result
from intrafusion.lab.study import Study

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


def test_the_steps_of_a_group_are_one_line() -> None:
    shown = study(ratios=(0.5,))
    plan = ((0, 1.0), (0, 1.0))
    steps = (
        GroupLine("conv", 8, 6, 1.0, "paper", "odd shape", plan),
        GroupLine("other", 9, 9, None, "untouched", ""),
        GroupLine("conv", 6, 4, 2.0, "paper", "", plan),
        GroupLine("other", 9, 5, 3.0, "paper", "", plan),
    )
    fused = replace(shown.results[-1], groups=steps)
    assert replace(shown, results=(*shown.results[:-1], fused)).middle_groups == [
        GroupLine("conv", 8, 4, None, "paper", "odd shape"), GroupLine("other", 9, 5, None, "paper", ""),
    ]  # fmt: skip


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


VGG_ROOTS = tuple(f"features.{index}" for index in (0, 4, 8, 11, 15, 18, 22, 25))
VGG = read_recipe(
    "model: {name: cifar_vgg11_bn}\ndata: {name: digits, title: CIFAR-10 (JPEG)}\ntrain: {}\n"
    "prune: {ratios: [0.3, 0.6], groups: each}\noutput: x\n"
)


def measured(plain: Study) -> Study:
    """With everything a run measures, and a loss of fusion in the last row."""
    times = tuple(Latency(batch, 0.001 * batch, 0.0001, "a <processor>", 2) for batch in (1, 64))
    results = [
        replace(r, top5=990, size=8_000_000, memory=1_000, latency=() if r.cell.method == "discard" else times)
        for r in plain.results
    ]
    plan = ((0, 1.0), (0, 0.6), (2, 1.0), (2, 0.9), (4, 1.0), (-1, 0.0), (6, 1.0), (6, 1.0))
    lines = (GroupLine("conv", 8, 4, 1.25, "paper", "", plan), *results[-1].groups[1:])
    results[-1] = replace(results[-1], correct=400, groups=lines)
    return replace(plain, results=tuple(results), environment={"torch": "2.4 & more", "device": "a <processor>"})


class Page(HTMLParser):
    """Every tag with its attributes, the text, and whether tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def having(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


STUDIES = {
    "measured": measured(study(skipped=("cannot read <b>.png",))),
    "each": measured(replace(study(VGG_ROOTS), recipe=VGG)),
    "old results": study(),
    "no pairs": study(ratios=()),
}


@pytest.mark.parametrize("name", STUDIES)
def test_the_html_page_stands_alone_and_fits_any_screen(name: str) -> None:
    source = to_html(STUDIES[name], Path("my <runs>"))
    page = Page(source)
    assert page.open == []
    assert not re.search(r"(https?:)?//|@import|url\(|<script|<link|<img|<iframe", source)
    assert page.having("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.having("meta")
    assert next(tag for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)) == "h1"
    assert len(page.having("h1")) == 1
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.having("svg"))
    # No width in pixels beyond a phone's, in styles or attributes; pictures are as wide as their box.
    assert all(int(width) <= 320 for width in re.findall(r"[^-]width: *(\d+)px", source))
    assert all(int(width) <= 320 for width in re.findall(r"minmax\((?!min)(\d+)px", source))
    assert all("width" not in svg for svg in page.having("svg"))
    assert len(page.having("table")) == sum(box.get("class") == "scroll" for box in page.having("div"))
    assert "prefers-color-scheme: dark" in source
    assert "my <runs>/recipe.yaml" in page.text


def test_the_html_page_shows_losses_failures_and_foreign_text_as_they_are() -> None:
    source = to_html(STUDIES["measured"], Path("x"))
    page = Page(source)
    assert '<td class="number loss">-10.00</td>' in source
    assert '<td class="number win">+11.20</td>' in source
    assert "fusion gains in 1 of 2 rows and loses in 1: from -10.00 points (0.6 removed)" in page.text
    assert "a <processor>" in page.text
    assert "cannot read <b>.png" in page.text
    assert "not understood" in page.text
    assert sum(path.get("class", "") == "flow stays" for path in page.having("path")) == 4
    assert sum(path.get("class", "") == "flow merges" for path in page.having("path")) == 3
    assert sum(circle.get("class", "") == "left-out" for circle in page.having("circle")) == 1
    assert len(page.having("svg")) == 5  # ratio, MACs, two latencies, a plan


def test_every_cell_is_a_line_of_the_csv() -> None:
    shown = STUDIES["measured"]
    rows = list(csv.DictReader(io.StringIO(to_csv(csv_rows(shown)))))
    assert [row["method"] for row in rows] == [r.cell.method for r in shown.results]
    assert [int(row["correct"]) for row in rows] == [r.correct for r in shown.results]
    assert [row["latency_64_median_s"] for row in rows] == ["0.064", "", "0.064", "", "0.064"]
    assert rows[1]["top5"] == "990"
    assert next(csv.DictReader(io.StringIO(to_csv(csv_rows(study())))))["size"] == ""


def test_measured_columns_are_there_only_where_something_was_measured() -> None:
    assert table(study(), measured=True) == table(study())
    header, rows = table(STUDIES["measured"], measured=True)
    assert dict(zip(header, rows[0], strict=True))["latency, batch 64"] == "64 ms (IQR 0.1)"
    assert {"top 5 discard", "top 5 fused", "on disk", "memory, batch 64"} < set(header)


def test_why_nothing_was_timed_is_said_and_how_to_do_it() -> None:
    for page in (to_markdown, to_html):
        assert "--executor local --workers 1 --fresh" in page(study(), Path("out"))
        timed = page(measured(study()), Path("out"))
        assert "--workers 1" not in timed
        assert "Each pair is timed once" in timed


def test_widths_that_are_no_multiples_of_eight_are_named() -> None:
    for page in (to_markdown, to_html):
        text = page(study(), Path("my runs"))
        assert "no multiples of 8: conv 4, odd|one 4. " in text
        assert "--set prune.round_to=8" in text
        rounded = replace(RECIPE, prune=replace(RECIPE.prune, round_to=4))
        assert "no multiples" not in page(replace(study(), recipe=rounded), Path("out"))


def test_published_figures_stand_beside_ours_where_the_set_up_is_the_papers() -> None:
    header, rows = table(STUDIES["each"])
    columns = [header.index(name) for name in ("group", "removed", "published discard", "published fused")]
    shown = [[row[column] for column in columns] for row in rows]
    assert shown[0] == ["features.0", "0.3", "88.22 %", "79.10 %"]
    assert shown[-2] == ["features.25", "0.3", "89.30 %", "89.31 %"]
    assert shown[-1] == ["features.25", "0.6", "", ""]  # the paper has no 60 %
    assert "another checkpoint (dense 89.56 %, ours 87.70 %)" in to_markdown(STUDIES["each"], Path("x"))
    for other in (
        replace(study(VGG_ROOTS[1:]), recipe=VGG),
        replace(study(VGG_ROOTS), recipe=replace(VGG, data=replace(VGG.data, title="CIFAR-1000"))),
        replace(study(VGG_ROOTS), recipe=replace(VGG, prune=replace(VGG.prune, importance="random"))),
        study(VGG_ROOTS),
    ):
        assert other.published is None


def test_the_verdict_of_nothing_is_nothing() -> None:
    assert verdict(study(ratios=())) == ""


@given(st.floats(1e-9, 1e12), st.one_of(st.just(0.0), st.floats(0.5, 1)))
def test_ticks_are_few_and_hold_everything(top: float, share: float) -> None:
    ticks = _ticks(share * top, top)
    assert ticks[0] <= share * top * (1 + 1e-6)
    assert ticks[-1] >= top * (1 - 1e-6)
    assert 2 <= len(ticks) <= 8
    steps = [b - a for a, b in pairwise(ticks)]
    assert all(math.isclose(step, steps[0], rel_tol=1e-6) for step in steps)
