"""The report of a run as it is written: a table for the terminal, pages in Markdown and HTML, a figure and CSV."""

from __future__ import annotations

from pathlib import Path

from intrafusion.lab.files import write_atomic
from intrafusion.lab.reports.contents import (
    command,
    csv_rows,
    measurements,
    networks_note,
    published_note,
    rounding_note,
    shown_skipped,
    summary,
    table,
    timing_note,
    verdict,
)
from intrafusion.lab.reports.figure import draw, draw_finetuning
from intrafusion.lab.reports.finetuned import finetuned, finetuned_noise, finetuned_note, finetuned_table
from intrafusion.lab.reports.page import to_html
from intrafusion.lab.reports.tables import markdown_table, text_table, to_csv
from intrafusion.lab.study import Study
from intrafusion.lab.training_record import noise_note, noise_table


def write_report(study: Study, folder: Path) -> str:
    """Write ``report.md``, ``report.html``, ``results.csv`` and ``accuracy.png``; return the table for the terminal."""
    write_atomic(folder / "accuracy.png", draw(study))
    if finetuned(study):
        write_atomic(folder / "finetuned.png", draw_finetuning(study))
    write_atomic(folder / "results.csv", to_csv(csv_rows(study)))
    write_atomic(folder / "report.md", to_markdown(study, folder))
    write_atomic(folder / "report.html", to_html(study, folder))
    return to_text(study)


def to_text(study: Study) -> str:
    """The summary and the tables, aligned with spaces."""
    parts = [summary(study), text_table(*table(study))]
    header, rows = finetuned_table(study)
    if rows:
        parts += ["after fine-tuning both alike:", text_table(header, rows)]
    return "\n\n".join(parts)


def to_markdown(study: Study, folder: Path) -> str:
    """The page: what was run, the table, the figure, what happened to each group, and how to do it again."""
    recipe = study.recipe
    header, rows = table(study, measured=True)
    dense = measurements(study.dense)
    parts = [
        f"# {recipe.title}",
        f"{summary(study)}. {verdict(study)}".rstrip(),
        f"Channels are ranked by `{recipe.prune.importance}`; `discard` and `fused` keep the same ones and are not "
        f"fine-tuned here. Fusion: `{recipe.fusion_text()}`. A gain is in points of accuracy.",
        markdown_table(header, rows, "r" * len(header)),
        *([f"The dense network: {'; '.join(f'{name}: {text}' for name, text in dense.items())}."] if dense else []),
        timing_note(study),
        *([published_note(study)] if study.published else []),
        "![Accuracy over the share of channels removed](accuracy.png)",
        *_finetuned_part(study),
        *_training_part(study),
        *_groups_part(study, folder),
        *_skipped_part(study),
        *([f"## The networks\n\n{networks_note(study)}"] if study.recipe.kept_methods else []),
        "## Again",
        f"```\n{command(folder)}\n```",
        "Every number with its cell is in `results.jsonl` and `results.csv`, every setting in `recipe.yaml`, every "
        "version in `environment.json`; `report.html` shows more.",
    ]
    return "\n\n".join(parts) + "\n"


def _finetuned_part(study: Study) -> list[str]:
    header, rows = finetuned_table(study)
    if not rows:
        return []
    return [
        "## After fine-tuning",
        finetuned_note(study),
        markdown_table(header, rows, "r" * len(header)),
        "![Validation accuracy over the epochs of fine-tuning](finetuned.png)",
        *_noise_part(*finetuned_noise(study)),
    ]


def _training_part(study: Study) -> list[str]:
    noise = study.training and study.training.noise
    return (
        ["## Training of the dense network", *_noise_part(noise_note(noise), noise_table({"": [noise]}))]
        if noise
        else []
    )


def _noise_part(note: str, rows: tuple[list[str], list[list[str]]]) -> list[str]:
    return [note, markdown_table(*rows, "r" * len(rows[0]))] if note else []


def _groups_part(study: Study, folder: Path) -> list[str]:
    lines = study.middle_groups
    if not lines:
        return []
    rows = [
        [
            f"`{line.name}`",
            f"{line.before} -> {line.after}",
            "" if line.cost is None else f"{line.cost:.4g}",
            line.merged,
            line.reason,
        ]
        for line in lines
    ]
    header = ["group", "channels", "plan cost", "merged by", "note"]
    note = rounding_note(study, folder)
    return [
        f"## Groups at {study.middle:.4g} removed",
        markdown_table(header, rows, "lrrll"),
        *([note] if note else []),
    ]


def _skipped_part(study: Study) -> list[str]:
    if not study.skipped:
        return []
    return ["## Test images left out", "\n".join(f"* {entry}" for entry in shown_skipped(study))]
