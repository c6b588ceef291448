"""How the dense network was trained: kept beside it, and shown by the reports."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from intrafusion.lab.errors import LabError
from intrafusion.lab.reports.comparison import Comparison, every_row
from intrafusion.lab.reports.finetuned import finetuned_noise
from intrafusion.lab.reports.page import to_html
from intrafusion.lab.reports.report import to_markdown
from intrafusion.lab.study import Study
from intrafusion.lab.training_record import (
    TRAINING,
    TrainingRecord,
    copy_training,
    noise_note,
    noise_table,
    read_training,
    write_training,
)
from intrafusion.training.noise_scale import NoiseHistory, NoisyEpoch
from tests.lab.reports.test_finetuned import tuned
from tests.lab.reports.test_report import Page, study

EPOCHS = (NoisyEpoch(1, 0.05, 0.0078125, 20.0), NoisyEpoch(2, 0.025, 0.00390625))
NOISE = NoiseHistory("lr / (batch (1 - momentum))", 0.0005, "flip", EPOCHS)
RECORD = TrainingRecord("abc", (1.5, 0.5), NOISE)


@pytest.mark.parametrize("record", [RECORD, replace(RECORD, noise=None)])
def test_what_is_written_is_read_back(record: TrainingRecord, tmp_path: Path) -> None:
    assert read_training(tmp_path) is None
    write_training(tmp_path, record)
    assert read_training(tmp_path) == record
    copy_training(None, tmp_path)
    assert read_training(tmp_path) is None


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"key": "a", "losses": [], "noise": {"epochs": [{}]}}'])
def test_a_broken_file_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / TRAINING).write_text(content)
    with pytest.raises(LabError, match=r"training\.json is broken .* remove it"):
        read_training(tmp_path)


def test_the_table_has_a_row_for_each_epoch_and_means_of_what_was_measured() -> None:
    other = replace(NOISE, epochs=(replace(EPOCHS[0], trace=30.0), EPOCHS[1]))
    header, rows = noise_table({"discard": [NOISE], "fused": [NOISE, other]})
    assert header == ["epoch", "lr", "noise scale", "gradient variance discard", "gradient variance fused"]
    assert rows == [["1", "0.05", "0.007812", "20", "25"], ["2", "0.025", "0.003906", "", ""]]
    assert "Weight decay 0.0005, augmentation flip." in noise_note(NOISE)


def test_a_long_training_is_shown_at_twelve_epochs_from_the_first_to_the_last() -> None:
    noise = replace(NOISE, epochs=tuple(NoisyEpoch(epoch, 0.1, 0.1) for epoch in range(1, 201)))
    shown = [int(row[0]) for row in noise_table({"": [noise]})[1]]
    assert (len(shown), shown[0], shown[-1]) == (12, 1, 200)
    assert {right - left for left, right in pairwise(shown)} == {18, 19}


def test_reports_show_the_training_where_there_is_a_record() -> None:
    for shown, record in ((True, RECORD), (False, None), (False, replace(RECORD, noise=None))):
        found = study(training=record)
        markdown, page = to_markdown(found, Path("x")), Page(to_html(found, Path("x")))
        assert ("| 1 | 0.05 | 0.007812 | 20 |" in markdown) == shown
        assert ("Training of the dense network" in page.text) == shown
        assert page.open == []


def test_reports_show_the_noise_of_fine_tuning_at_the_middle_ratio() -> None:
    plain = tuned()
    assert finetuned_noise(plain)[0] == ""
    curved = [replace(r, curve=r.curve and replace(r.curve, noise=NOISE)) for r in plain.results]
    recorded = replace(plain, results=tuple(curved))
    note, (_, rows) = finetuned_noise(recorded)
    assert note.startswith("0.6 removed, while fine-tuning. Noise scale: ")
    assert rows[0] == ["1", "0.05", "0.007812", "20", "20"]
    assert "| 1 | 0.05 | 0.007812 | 20 | 20 |" in to_markdown(recorded, Path("x"))
    assert note in Page(to_html(recorded, Path("x"))).text


def test_a_sweep_shows_the_mean_scale_where_it_differs() -> None:
    louder = replace(RECORD, noise=replace(NOISE, epochs=(NoisyEpoch(1, 0.1, 0.5),)))

    def columns(*records: TrainingRecord | None) -> dict[str, list[str]]:
        points: list[tuple[dict[str, str], Study]] = [
            ({"train.lr": f"{number}"}, study(ratios=(0.5,), training=record)) for number, record in enumerate(records)
        ]
        header, rows = every_row(Comparison(tuple(points)))
        return dict(zip(header, map(list, zip(*rows, strict=True)), strict=True))

    assert columns(RECORD, louder, None)["noise scale"] == ["0.005859", "0.5", ""]
    assert "noise scale" not in columns(RECORD, RECORD)
