"""The HTML page of a run with a section ``split``, from results that are made up."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from intrafusion.lab.recipe.loader import read_recipe
from intrafusion.lab.split.page import to_html
from intrafusion.lab.split.report import write_split_report
from intrafusion.lab.split.study import Item, Measured, SplitStudy
from intrafusion.lab.split.tables import curves
from intrafusion.lab.split.verdicts import verdicts
from tests.lab.split.test_run import TEXT

SECONDS = {"train": 2.0, "prune": 0.5, "fuse": 0.5, "finetune": 1.0}


def measured(method: str, correct: int, *, init: str | None = "same", ratio: float = 0.0, epochs: int = 0) -> Measured:
    train = SECONDS["train"] * (1 if init else 2)
    item = Item(method, 0, init, 0 if method == "part" else None, ratio, epochs)  # type: ignore[arg-type]
    return Measured(item, correct, 1000, 1, 1, "0", SECONDS | {"train": train})


def study(*results: Measured) -> SplitStudy:
    recipe = read_recipe(TEXT, "r", ["data.title=<b>digits</b>"])
    return SplitStudy(recipe, results, (100, 100), 200, {"device": "<i>a processor</i>", "threads": "1"})


DENSE = (measured("part", 950), measured("aligned repaired", 960), measured("whole", 980, init=None))
RESULTS = (
    *DENSE,
    measured("paf", 900, ratio=0.5), measured("fap", 920, ratio=0.5),
    measured("whole fused", 950, init=None, ratio=0.5), measured("whole discard", 500, init=None, ratio=0.5),
    measured("paf", 960, ratio=0.5, epochs=1), measured("fap", 940, ratio=0.5, epochs=1),
    measured("whole fused", 950, init=None, ratio=0.5, epochs=1),
    measured("whole discard", 900, init=None, ratio=0.5, epochs=1),
)  # fmt: skip
OTHER = (measured("aligned", 500, init="different"), measured("fap", 400, init="different", ratio=0.5))


class Tags(HTMLParser):
    def __init__(self, source: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_it_stands_alone_and_holds_nothing_wider_than_a_phone() -> None:
    source = to_html(study(*RESULTS), Path("my <runs>"))
    tags = Tags(source).found
    assert not [tag for tag, _ in tags if tag in ("script", "link", "img", "iframe", "b", "i", "runs")]
    assert all("src" not in attributes and "href" not in attributes for _, attributes in tags)
    assert "http" not in source.replace("http-equiv", "")
    assert all("width" not in attributes for tag, attributes in tags if tag == "svg")
    assert all(int(width) <= 320 for width in re.findall(r"[^-]width: *(\d+)px", source))
    assert source.count("<table") == source.count('<div class="scroll"')


def test_wins_and_losses_stand_side_by_side() -> None:
    source = to_html(study(*RESULTS), Path("x"))
    assert '<td class="number loss">-3.00</td>' in source
    assert '<td class="number win">+1.00</td>' in source
    assert "better than both PaF and FaP in 1 of 2 settings, by 3.00 to 3.00 points" in source


def test_curves_begin_at_what_was_pruned_and_end_at_the_results() -> None:
    plain, tuned = curves(study(*RESULTS))
    assert plain.lines["paf"] == {0.0: 96.0, 0.5: 90.0}
    assert plain.lines["whole discard"] == {0.0: 98.0, 0.5: 50.0}
    assert tuned.lines["fap"] == {0.5: 94.0}


def test_the_speed_up_counts_the_slower_too() -> None:
    told = verdicts(study(*RESULTS))[-1]
    assert told.endswith("2.00x in training; PaF 1.50x in all, FaP 1.50x in all.")
    slow = Measured(Item("paf", 0, "same", None, 0.5), 900, 1000, 1, 1, "0", SECONDS | {"fuse": 8.5})
    assert "PaF 0.50x in all" in verdicts(study(slow, measured("whole fused", 1, init=None, ratio=0.5)))[-1]


@pytest.mark.parametrize("results", [(), DENSE, RESULTS[:4], RESULTS[5:6], (*DENSE, *RESULTS[6:8], *OTHER)])
def test_a_run_that_is_not_finished_has_a_page_and_a_figure(results: tuple[Measured, ...], tmp_path: Path) -> None:
    write_split_report(study(*results), tmp_path)
    assert "</html>" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "accuracy.png").is_file() == any(result.item.ratio for result in results)
