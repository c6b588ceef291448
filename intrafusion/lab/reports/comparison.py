"""The report of a sweep: every point beside the others, as a table, a page in Markdown and HTML, and CSV."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from pathlib import Path

from intrafusion.lab.files import write_atomic
from intrafusion.lab.pruning import ALL
from intrafusion.lab.reports.contents import UNTIMED, csv_rows, latencies, published_note
from intrafusion.lab.reports.html_parts import LEGEND, document, html_table
from intrafusion.lab.reports.page import against_ratio
from intrafusion.lab.reports.tables import markdown_table, text_table, to_csv
from intrafusion.lab.results import Result
from intrafusion.lab.study import Pair, Study
from intrafusion.lab.training_record import mean_noise_scale

Table = tuple[list[str], list[list[str]]]
NOTHING = "nothing is measured yet"


@dataclass(frozen=True)
class Comparison:
    """The points of a sweep of which the dense network is measured, each with the settings that set it apart.

    Attributes:
        missing: cells that are not finished.
    """

    points: tuple[tuple[Mapping[str, str], Study], ...]
    missing: int = 0

    @property
    def title(self) -> str:
        """What was pruned, and what was varied."""
        titles = list(dict.fromkeys(study.recipe.title for _, study in self.points))
        return f"{' and '.join(titles)}: {', '.join(self.keys.values())} varied"

    @cached_property
    def keys(self) -> dict[str, str]:
        """The keys that were varied, each with its shortest name that is no other's."""
        paths = list(dict.fromkeys(key for settings, _ in self.points for key in settings))
        last = [path.split(".")[-1] for path in paths]
        return {path: name if last.count(name) == 1 else path for path, name in zip(paths, last, strict=True)}

    def label(self, settings: Mapping[str, str]) -> str:
        """A point in a few words."""
        return ", ".join(f"{self.keys[key]} {value}" for key, value in settings.items()) or "the recipe as it is"

    @property
    def by_group(self) -> bool:
        """Whether each group was pruned alone, everywhere."""
        return all(study.recipe.prune.groups == "each" for _, study in self.points)


def write_comparison(comparison: Comparison, folder: Path) -> str:
    """Write ``report.md``, ``report.html`` and ``results.csv``; return the table for the terminal.

    Nothing is written, and a sentence returned, where no point has results.
    """
    if not comparison.points:
        return NOTHING
    rows = [{**settings, **row} for settings, study in comparison.points for row in csv_rows(study)]
    columns = dict.fromkeys([*comparison.keys, *(name for row in rows for name in row)])
    write_atomic(folder / "results.csv", to_csv([{name: row.get(name) for name in columns} for row in rows]))
    write_atomic(folder / "report.md", to_markdown(comparison, folder))
    write_atomic(folder / "report.html", to_html(comparison, folder))
    return f"{comparison.title}\n\n{text_table(*every_row(comparison))}"


def to_markdown(comparison: Comparison, folder: Path) -> str:
    """The page with the tables."""
    parts = [f"# {comparison.title}", verdict(comparison), _PROTOCOL]
    for heading, (header, rows), note in _tables(comparison):
        parts += [f"## {heading}", *([note] if note else []), markdown_table(header, rows, "r" * len(header))]
    parts += ["## Again", f"```\n{command(folder)}\n```", _WHERE]
    return "\n\n".join(parts) + "\n"


def to_html(comparison: Comparison, folder: Path) -> str:
    """The page with a chart of every point and the tables."""
    charts = [
        against_ratio(study.dense, _overall(study), comparison.label(settings))
        for settings, study in comparison.points
        if study.pairs
    ]
    mean = "<p>Means over the groups, each pruned alone.</p>" if comparison.by_group else ""
    parts = [
        f"<p>{escape(verdict(comparison)).replace('`', '')}</p><p>{escape(_PROTOCOL)}</p>",
        "<h2>Accuracy, in % of the test images</h2>" + LEGEND + mean if charts else "",
        f'<div class="figures">{"".join(charts)}</div>' if charts else "",
    ]
    for heading, table, note in _tables(comparison):
        parts += [f"<h2>{escape(heading)}</h2>", f"<p>{escape(note)}</p>" if note else "", html_table(*table)]
    parts += [f"<h2>Again</h2><pre>{escape(command(folder))}</pre>", f"<p>{escape(_WHERE).replace('`', '')}</p>"]
    return document(comparison.title, parts)


_PROTOCOL = (
    "In every row, discard and fused keep the same channels, have the same shapes and are not fine-tuned; a gain is in "
    "points of accuracy."
)
_WHERE = (
    "Every point has a folder of its own with its recipe, its results and its report; `results.csv` here has the rows "
    "of all of them."
)


def command(folder: Path) -> str:
    """What writes the report again from the folder."""
    return f"intrafusion report {shlex.quote(str(folder))}"


def verdict(comparison: Comparison) -> str:
    """How often fusion gained and lost, where, what is unfinished, and why latencies are missing."""
    pairs = [(settings, pair) for settings, study in comparison.points for pair in study.pairs]
    parts = []
    if pairs:
        (least, worst), (most, best) = (choose(pairs, key=lambda entry: entry[1].gain) for choose in (min, max))
        gained, lost = (sum(pair.gain * sign > 0 for _, pair in pairs) for sign in (1, -1))
        parts.append(
            f"Against discarding the same channels, fusion gains in {gained} of {len(pairs)} rows and loses in {lost}: "
            f"from {worst.gain:+.2f} points ({comparison.label(least)}, {worst.label}) to {best.gain:+.2f} "
            f"({comparison.label(most)}, {best.label})."
        )
    if comparison.missing:
        parts.append(f"{comparison.missing} cells are not finished.")
    if not all(study.dense.latency for _, study in comparison.points):
        parts.append(UNTIMED)
    return " ".join(parts)


def every_row(comparison: Comparison, *, measured: bool = False) -> Table:
    """One row per point, group and ratio; ``measured`` adds the latency, where it was measured everywhere."""
    pairs = [(settings, study, pair) for settings, study in comparison.points for pair in study.pairs]
    columns = {name: [s.get(key, "") for s, _, _ in pairs] for key, name in comparison.keys.items()}
    if any(pair.group != ALL for _, _, pair in pairs):
        columns["group"] = [pair.group for _, _, pair in pairs]
    scales = [mean_noise_scale(s.training.noise) if s.training and s.training.noise else None for _, s, _ in pairs]
    if len({f"{scale}" for scale in scales}) > 1:
        columns["noise scale"] = ["" if scale is None else f"{scale:.4g}" for scale in scales]
    columns |= {
        "removed": [f"{pair.ratio:.4g}" for _, _, pair in pairs],
        "dense": [str(study.dense.accuracy) for _, study, _ in pairs],
        "discard": [str(pair.discard.accuracy) for _, _, pair in pairs],
        "fused": [str(pair.fused.accuracy) for _, _, pair in pairs],
        "gain": [f"{pair.gain:+.2f}" for _, _, pair in pairs],
    }
    timed = [latencies(pair.fused) for _, _, pair in pairs]
    if measured and timed and all(timed):
        columns |= {name: [each[name] for each in timed] for name in timed[0]}
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def _tables(comparison: Comparison) -> list[tuple[str, Table, str]]:
    """Headings, tables and notes, the ones by group in the layout of the paper."""
    found = [("Every row", every_row(comparison, measured=True), "")]
    if not comparison.by_group:
        return found
    ours = {(name, p.group): (p.discard.accuracy.percent, p.fused.accuracy.percent)
            for name, _, pairs in _columns(comparison) for p in pairs}  # fmt: skip
    found.insert(0, ("Each group alone", _by_group(comparison, ours), "The accuracy in %, and the gain from fusing."))
    theirs = {
        (name, pair.group): study.published.figures[pair.group, pair.ratio]
        for name, study, pairs in _columns(comparison)
        for pair in pairs
        if study.published and (pair.group, pair.ratio) in study.published.figures
    }
    if theirs:
        note = next(published_note(study) for _, study in comparison.points if study.published)
        found.insert(1, ("As published", _by_group(comparison, theirs), note))
    return found


def _columns(comparison: Comparison) -> list[tuple[str, Study, list[Pair]]]:
    """What makes a block of columns: a point and a ratio, with the pairs of all groups."""
    found = []
    for settings, study in comparison.points:
        for ratio in dict.fromkeys(pair.ratio for pair in study.pairs):
            shown = {key: value for key, value in settings.items() if key != "prune.ratios"}
            name = (
                f"{comparison.label(shown)}, {ratio:.0%}" if shown else f"{study.recipe.prune.importance}, {ratio:.0%}"
            )
            found.append((name, study, [pair for pair in study.pairs if pair.ratio == ratio]))
    return found


def _by_group(comparison: Comparison, figures: Mapping[tuple[str, str], tuple[float, float]]) -> Table:
    """Groups down, points and ratios across, as ``discard -> fused (gain)``, with the means below."""
    names = list(dict.fromkeys(name for name, _ in figures))
    groups = list(dict.fromkeys(pair.group for _, study in comparison.points for pair in study.pairs))

    def shown(pairs: Sequence[tuple[float, float]]) -> str:
        discard, fused = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
        return f"{discard:.2f} -> {fused:.2f} ({fused - discard:+.2f})"

    rows = [
        [group, *(shown([figures[name, group]]) if (name, group) in figures else "" for name in names)]
        for group in groups
    ]
    mean = ["mean", *(shown([figures[name, group] for group in groups if (name, group) in figures]) for name in names)]
    return ["group", *names], [*rows, mean]


def _overall(study: Study) -> list[Pair]:
    """The pairs of the whole network, or of every ratio the mean over the groups, to a whole image."""
    if not any(pair.group != ALL for pair in study.pairs):
        return study.pairs
    found = []
    for ratio in dict.fromkeys(pair.ratio for pair in study.pairs):
        pairs = [pair for pair in study.pairs if pair.ratio == ratio]
        found.append(Pair(ALL, ratio, _mean([p.discard for p in pairs]), _mean([p.fused for p in pairs])))
    return found


def _mean(results: Sequence[Result]) -> Result:
    cell = replace(results[0].cell, group=ALL)
    return replace(results[0], cell=cell, correct=round(sum(result.correct for result in results) / len(results)))
