"""What every form of a run's report says, in words and numbers: text, Markdown, HTML and CSV say the same."""

from __future__ import annotations

import shlex
from pathlib import Path

from intrafusion.lab.measure import LATENCY_BATCHES, MEMORY_BATCH
from intrafusion.lab.pruning import ALL
from intrafusion.lab.results import Result
from intrafusion.lab.study import Study
from intrafusion.lab.widths import ADVICE, MULTIPLE, odd_note, odd_widths

_SHOWN_SKIPPED = 20
_CSV_COLUMNS = ("correct", "total", "top5", "params", "macs", "size", "memory", "seconds", "kept")

_TIMED_ONCE = "Each pair is timed once, on the fused network: the discarded one has the same shapes."
UNTIMED = (
    "Latency was not measured: cells that are computed side by side slow each other down. The same sweep with "
    "`--executor local --workers 1 --fresh` computes one after the other, and times them."
)


def command(folder: Path) -> str:
    """What does the run again."""
    return f"intrafusion run {shlex.quote(str(folder / 'recipe.yaml'))}"


def summary(study: Study) -> str:
    """The dense network in one line."""
    dense, recipe = study.dense, study.recipe
    return (
        f"{recipe.title}: dense {dense.accuracy} "
        f"({dense.correct:,} of {dense.total:,} test images), {dense.params:,} parameters, {si(dense.macs)} MACs"
    )


def verdict(study: Study) -> str:
    """How often fusion gained and lost, and by how much at the extremes; empty without pairs."""
    if not study.pairs:
        return ""
    worst, best = (choose(study.pairs, key=lambda pair: pair.gain) for choose in (min, max))
    gained = sum(pair.gain > 0 for pair in study.pairs)
    lost = sum(pair.gain < 0 for pair in study.pairs)
    return (
        f"Against discarding the same channels, fusion gains in {gained} of {len(study.pairs)} rows and loses in "
        f"{lost}: from {worst.gain:+.2f} points ({worst.label}) to {best.gain:+.2f} ({best.label})."
    )


def published_note(study: Study) -> str:
    """Where published figures come from, and that their network is another."""
    theirs = study.published
    if theirs is None:
        return ""
    dense = "not given" if theirs.dense is None else f"{theirs.dense:.2f} %"
    return (
        f"Published: {theirs.source}; {theirs.where}. It is another checkpoint (dense {dense}, ours "
        f"{study.dense.accuracy}), so compare what is lost, not the figures themselves."
    )


def table(study: Study, *, measured: bool = False) -> tuple[list[str], list[list[str]]]:
    """Header and rows, one per pair; ``measured`` adds what the run's machine decides, where it was measured."""
    pairs, dense = study.pairs, study.dense
    columns = {
        "group": [pair.group for pair in pairs],
        "removed": [f"{pair.ratio:.4g}" for pair in pairs],
        "discard": [str(pair.discard.accuracy) for pair in pairs],
        "fused": [str(pair.fused.accuracy) for pair in pairs],
        "gain": [f"{pair.gain:+.2f}" for pair in pairs],
    }
    if all(pair.group == ALL for pair in pairs):
        del columns["group"]
    if study.published:
        figures = [study.published.figures.get((pair.group, pair.ratio)) for pair in pairs]
        for index, method in enumerate(("discard", "fused")):
            columns[f"published {method}"] = [f"{both[index]:.2f} %" if both else "" for both in figures]
    if measured and all(pair.discard.top5_accuracy and pair.fused.top5_accuracy for pair in pairs):
        columns["top 5 discard"] = [str(pair.discard.top5_accuracy) for pair in pairs]
        columns["top 5 fused"] = [str(pair.fused.top5_accuracy) for pair in pairs]
    columns["parameters"] = [f"{dense.params:,} -> {pair.fused.params:,}" for pair in pairs]
    columns["MACs"] = [f"{si(dense.macs)} -> {si(pair.fused.macs, dense.macs)}" for pair in pairs]
    if measured:
        found = [measurements(pair.fused) for pair in pairs]
        columns |= {name: [each.get(name, "") for each in found] for name in measurements(dense)}
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def measurements(result: Result) -> dict[str, str]:
    """What was measured beside accuracy and counts, by name."""
    found = {}
    if result.size is not None:
        found["on disk"] = f"{si(result.size)}B"
    if result.memory is not None:
        found[f"memory, batch {MEMORY_BATCH}"] = f"{si(result.memory)}B"
    return found | latencies(result)


def latencies(result: Result) -> dict[str, str]:
    """Median and interquartile range for each batch size, by name; empty where nothing was timed."""
    return {
        f"latency, batch {timed.batch}": f"{1e3 * timed.median:.3g} ms (IQR {1e3 * timed.iqr:.2g})"
        for timed in result.latency
    }


def timing_note(study: Study) -> str:
    """Which networks were timed, or why none was."""
    return _TIMED_ONCE if study.dense.latency else UNTIMED


def rounding_note(study: Study, folder: Path) -> str:
    """Which widths at the middle ratio are no multiples of 8, and what shows the effect of rounding; empty for none."""
    odd = odd_widths((line.name, line.before, line.after) for line in study.middle_groups)
    if not odd or study.recipe.prune.round_to is not None:
        return ""
    look = f"`intrafusion inspect {shlex.quote(str(folder / 'recipe.yaml'))}`"
    return f"{odd_note(odd)} {ADVICE} {look} shows what `--set prune.round_to={MULTIPLE}` would leave."


def networks_note(study: Study) -> str:
    """Where the pruned networks are, and how one is had."""
    if not study.recipe.kept_methods:
        return ""
    return (
        "The pruned networks are in `networks/` as safetensors: `intrafusion.load(FILE)` gives one back anywhere, "
        "`intrafusion.export` makes it ONNX."
    )


def shown_skipped(study: Study) -> list[str]:
    """The first images that were left out, and how many more there are."""
    more = len(study.skipped) - _SHOWN_SKIPPED
    return [*study.skipped[:_SHOWN_SKIPPED], *([f"and {more} more"] if more > 0 else [])]


def csv_rows(study: Study) -> list[dict[str, object]]:
    """One row per cell."""
    rows: list[dict[str, object]] = []
    for result in study.results:
        timed = {latency.batch: latency for latency in result.latency}
        row = {name: getattr(result.cell, name) for name in ("method", "group", "ratio", "stage", "seed")}
        row |= {name: getattr(result, name) for name in _CSV_COLUMNS}
        row["best_epoch"] = result.curve and result.curve.best
        for batch in LATENCY_BATCHES:
            row |= {f"latency_{batch}_{part}_s": getattr(timed.get(batch), part, None) for part in ("median", "iqr")}
        rows.append(row)
    return rows


def si(count: int, like: int | None = None) -> str:
    """A count in the unit that suits it, or that suits ``like``."""
    for factor, letter in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if (count if like is None else like) >= factor:
            return f"{count / factor:.2f}{letter}"
    return str(count)
