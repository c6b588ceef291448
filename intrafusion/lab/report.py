"""From results to what a person reads: a table for the terminal, a Markdown page and a figure."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from intrafusion.lab.files import write_atomic
from intrafusion.lab.pruning import ALL
from intrafusion.lab.recipe import Recipe
from intrafusion.lab.results import Result

_SHOWN_SKIPPED = 20


@dataclass(frozen=True)
class Pair:
    """A discarded and a fused network that keep the same channels."""

    group: str
    ratio: float
    discard: Result
    fused: Result

    @property
    def gain(self) -> float:
        """Points of accuracy that fusion saves."""
        return self.fused.accuracy.percent - self.discard.accuracy.percent


@dataclass(frozen=True)
class Study:
    """All results of a run, the dense network first, and the images that were left out of the test."""

    recipe: Recipe
    results: tuple[Result, ...]
    skipped: tuple[str, ...] = ()

    @property
    def dense(self) -> Result:
        """The network before pruning."""
        return next(result for result in self.results if result.cell.method == "dense")

    @property
    def pairs(self) -> list[Pair]:
        """One entry per group and ratio, in the order of the run."""
        fused = {(r.cell.group, r.cell.ratio): r for r in self.results if r.cell.method == "fused"}
        discarded = [r for r in self.results if r.cell.method == "discard"]
        return [Pair(r.cell.group, r.cell.ratio, r, fused[r.cell.group, r.cell.ratio]) for r in discarded]


def write_report(study: Study, folder: Path) -> str:
    """Write ``report.md`` and ``accuracy.png`` into ``folder`` and return the table for the terminal."""
    from intrafusion.lab.figure import draw

    write_atomic(folder / "accuracy.png", draw(study))
    write_atomic(folder / "report.md", to_markdown(study, folder))
    return to_text(study)


def to_text(study: Study) -> str:
    """The summary and the table, aligned with spaces."""
    header, rows = _table(study)
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([_summary(study), "", text[0], "-" * len(text[0]), *text[1:]])


def to_markdown(study: Study, folder: Path) -> str:
    """The page: what was run, the table, the figure, what happened to each group, and how to do it again."""
    recipe = study.recipe
    header, rows = _table(study)
    command = f"intrafusion run {shlex.quote(str(folder / 'recipe.yaml'))}"
    parts = [
        f"# {recipe.title}",
        _summary(study) + ".",
        f"Channels are ranked by `{recipe.prune.importance}`; `discard` and `fused` keep the same ones and are not "
        f"fine-tuned. Fusion: `{recipe.fusion_text()}`. A gain is in points of accuracy.",
        _markdown_table(header, rows, "r" * len(header)),
        "![Accuracy over the share of channels removed](accuracy.png)",
        *_groups_part(study),
        *_skipped_part(study),
        "## Again",
        f"```\n{command}\n```",
        "Every number with its cell is in `results.jsonl`, every setting in `recipe.yaml`, every version in "
        "`environment.json`.",
    ]
    return "\n\n".join(parts) + "\n"


def _summary(study: Study) -> str:
    dense, recipe = study.dense, study.recipe
    return (
        f"{recipe.title}: dense {dense.accuracy} "
        f"({dense.correct:,} of {dense.total:,} test images), {dense.params:,} parameters, {_si(dense.macs)} MACs"
    )


def _table(study: Study) -> tuple[list[str], list[list[str]]]:
    single = any(pair.group != ALL for pair in study.pairs)
    header = [*(["group"] if single else []), "removed", "discard", "fused", "gain", "parameters", "MACs"]
    rows = []
    for pair in study.pairs:
        size = f"{study.dense.params:,} -> {pair.fused.params:,}"
        work = f"{_si(study.dense.macs)} -> {_si(pair.fused.macs, study.dense.macs)}"
        numbers = [f"{pair.ratio:.4g}", str(pair.discard.accuracy), str(pair.fused.accuracy), f"{pair.gain:+.2f}"]
        rows.append([*([pair.group] if single else []), *numbers, size, work])
    return header, rows


def _groups_part(study: Study) -> list[str]:
    pairs = [pair for pair in study.pairs if pair.fused.groups]
    if not pairs:
        return []
    chosen = min((pair.ratio for pair in pairs), key=lambda ratio: abs(ratio - 0.5))
    lines = [line for pair in pairs if pair.ratio == chosen for line in pair.fused.groups]
    lines = [line for line in lines if line.before != line.after or line.reason]
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
    return [f"## Groups at {chosen:.4g} removed", _markdown_table(header, rows, "lrrll")]


def _skipped_part(study: Study) -> list[str]:
    if not study.skipped:
        return []
    listed = "\n".join(f"* {entry}" for entry in study.skipped[:_SHOWN_SKIPPED])
    more = len(study.skipped) - _SHOWN_SKIPPED
    return ["## Test images left out", listed + (f"\n* and {more} more" if more > 0 else "")]


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], sides: str) -> str:
    rules = ["---:" if side == "r" else "---" for side in sides]
    lines = [header, rules, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _si(count: int, like: int | None = None) -> str:
    """A count in the unit that suits it, or that suits ``like``."""
    for factor, letter in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if (count if like is None else like) >= factor:
            return f"{count / factor:.2f}{letter}"
    return str(count)
