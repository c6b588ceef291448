"""What reports say about fine-tuning."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from intrafusion.lab.recipe.loader import read_recipe
from intrafusion.lab.reports.contents import csv_rows, table
from intrafusion.lab.reports.figure import draw_finetuning
from intrafusion.lab.reports.finetuned import finetuned, finetuned_note, finetuned_table
from intrafusion.lab.reports.page import to_html
from intrafusion.lab.reports.report import to_markdown, to_text
from intrafusion.lab.reports.tables import to_csv
from intrafusion.lab.results import Cell, Curve, Result
from intrafusion.lab.study import Study
from tests.lab.reports.test_report import Page, study

RECIPE = read_recipe(
    "model: {name: digits_cnn}\ndata: {name: digits, title: Figures}\ntrain: {}\nprune: {ratios: [0.3, 0.6]}\n"
    "output: out\nfinetune: {epochs: 3, at: [1, 3], seeds: [0, 4], teacher: true, augmentation: flip}\n"
)


def tuned(seeds: tuple[int, ...] = (0, 4), groups: tuple[str, ...] = ("all",)) -> Study:
    """Correct of 1,000 images: 800 and 900 after epoch 1, 850 and 880 at the end; each seed adds its number."""
    plain = study(groups)
    results = list(plain.results)
    for seed in seeds:
        for pair in plain.pairs:
            for method, first, last in (("discard", 800, 850), ("fused", 900, 880)):
                curve = Curve((1.0, 0.5, 0.4), (10.0, 80.0, 85.5, 85.0), 2, ((1, first + seed), (3, last + seed)))
                cell = Cell(method, pair.ratio, pair.group, "finetuned", seed)
                results.append(Result(cell, last + 5 + seed, 1000, 1_000_000, 900_000, curve=curve))
    section = RECIPE.finetune
    assert section is not None
    return replace(plain, recipe=replace(RECIPE, finetune=replace(section, seeds=seeds)), results=tuple(results))


def test_the_table_has_the_start_the_reported_epochs_and_the_chosen_one() -> None:
    header, rows = finetuned_table(tuned((0,)))
    assert header == ["removed", "epochs", "discard", "fused", "gain"]
    assert rows[:4] == [
        ["0.3", "0", "50.00 %", "61.20 %", "+11.20"],
        ["0.3", "1", "80.00 %", "90.00 %", "+10.00"],
        ["0.3", "3", "85.00 %", "88.00 %", "+3.00"],
        ["0.3", "best on validation", "85.50 %", "88.50 %", "+3.00"],
    ]
    assert [row[0] for row in rows[4:]] == ["0.6"] * 4


def test_several_seeds_show_their_mean_and_extremes() -> None:
    _, rows = finetuned_table(tuned())
    assert rows[1][2:] == ["80.20 % (80.00 to 80.40)", "90.20 % (90.00 to 90.40)", "+10.00 (+10.00 to +10.00)"]
    assert finetuned(tuned())[0].validation("fused") == [10.0, 80.0, 85.5, 85.0]


def test_single_groups_are_named() -> None:
    header, rows = finetuned_table(tuned(groups=("a", "b")))
    assert header[0] == "group"
    assert [row[0] for row in rows] == ["a"] * 8 + ["b"] * 8


def test_the_note_says_what_was_chosen_on_what() -> None:
    note = finetuned_note(tuned())
    for part in (
        "3 epochs of sgd, learning rate 0.01, cosine schedule, augmentation flip",
        "taught by the dense network (temperature 4, weight 0.9)",
        "2 seeds: mean (lowest to highest)",
        "best epoch is chosen on the validation split of the training images: 0.3 removed: epochs 2, 2 (discard), ",
    ):
        assert part in note


def test_results_before_fine_tuning_stay_what_they_are() -> None:
    assert table(tuned()) == table(study())


def test_every_report_has_the_section_and_only_if_something_was_fine_tuned() -> None:
    shown, plain = tuned(), study()
    assert "## After fine-tuning" in to_markdown(shown, Path("x"))
    assert "(finetuned.png)" in to_markdown(shown, Path("x"))
    assert "fine-tuning" not in to_markdown(plain, Path("x"))
    assert "after fine-tuning both alike:" in to_text(shown)
    assert "fine-tuning" not in to_text(plain)
    page = Page(to_html(shown, Path("x")))
    assert page.open == []
    assert "After fine-tuning" in page.text
    assert "After fine-tuning" not in Page(to_html(plain, Path("x"))).text
    charts = [svg["aria-label"] or "" for svg in page.having("svg")]
    assert sum("Validation accuracy" in label for label in charts) == 2
    assert page.having("td").count({"class": "number win"}) >= 8


def test_the_axis_of_the_page_starts_near_the_curves() -> None:
    source = to_html(tuned(), Path("x"))
    chart = source[source.index("Validation accuracy, in %, over") :].split("</figure>")[0]
    assert ">80</text>" in chart
    assert ">25</text>" not in chart


@pytest.mark.parametrize("groups", [("all",), tuple("abc")])
def test_the_figure_is_drawn(groups: tuple[str, ...]) -> None:
    with Image.open(io.BytesIO(draw_finetuning(tuned(groups=groups)))) as image:
        assert min(image.size) > 300


def test_the_csv_tells_fine_tuned_rows_apart() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(csv_rows(tuned())))))
    assert {(row["stage"], row["seed"], row["best_epoch"]) for row in rows} == {
        ("pruned", "", ""), ("finetuned", "0", "2"), ("finetuned", "4", "2")
    }  # fmt: skip
