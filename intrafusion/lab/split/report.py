"""The report of a run with a section ``split`` as it is written: tables for the terminal, pages, a figure and CSV."""

from __future__ import annotations

from pathlib import Path

from intrafusion.lab.files import write_atomic
from intrafusion.lab.reports.contents import command
from intrafusion.lab.reports.tables import markdown_table, text_table, to_csv
from intrafusion.lab.split.figure import draw_schedules
from intrafusion.lab.split.page import to_html
from intrafusion.lab.split.study import Measured, SplitStudy
from intrafusion.lab.split.tables import STEPS, TIMES, curves, networks_table, schedules_table, times_table
from intrafusion.lab.split.verdicts import summary, verdicts


def write_split_report(study: SplitStudy, folder: Path) -> str:
    """Write the report in Markdown and HTML, its figure and ``results.csv``; return the tables for the terminal."""
    found = curves(study)
    if found:
        write_atomic(folder / "accuracy.png", draw_schedules(study.recipe.title, found))
    write_atomic(folder / "report.html", to_html(study, folder))
    if study.results:
        write_atomic(folder / "results.csv", to_csv([_csv_row(result) for result in study.results]))
    titles = ["before pruning, accuracy in %:", "pruned, accuracy in %:"]
    tables = [networks_table(study), schedules_table(study)]
    times = times_table(study)
    parts = [f"# {study.recipe.title}, trained in {len(study.parts)} parts", summary(study)]
    for title, table in zip(("## Before pruning", "## Pruned"), tables, strict=True):
        parts += [title, markdown_table(*table, "ll" + "r" * (len(table[0]) - 2))] if table[1] else []
    parts += ["![Accuracy over the share of channels removed](accuracy.png)"] if found else []
    parts += [*verdicts(study), "## Seconds of each step", TIMES, markdown_table(*times, "ll" + "r" * 8)]
    parts += ["## Again", f"```\n{command(folder)}\n```"]
    parts.append(f"Threads: {study.environment['threads']}, on {study.environment['device']}.")
    write_atomic(folder / "report.md", "\n\n".join(parts) + "\n")
    shown = [f"{title}\n\n{text_table(*table)}" for title, table in zip(titles, tables, strict=True) if table[1]]
    return "\n\n".join([summary(study), *shown, *verdicts(study)])


def _csv_row(result: Measured) -> dict[str, object]:
    item = result.item
    row: dict[str, object] = {
        name: getattr(item, name) for name in ("method", "seed", "init", "part", "ratio", "epochs")
    }
    row |= {name: getattr(result, name) for name in ("correct", "total", "params", "macs", "digest")}
    return row | {f"{step}_s": result.seconds.get(step) for step in STEPS} | {"total_s": round(result.total_seconds, 3)}
