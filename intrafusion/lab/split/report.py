"""What a person reads of networks trained on parts of the images: tables, verdicts, CSV."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from intrafusion.lab.files import write_atomic
from intrafusion.lab.reports.report import command, markdown_table, text_table, to_csv
from intrafusion.lab.split.study import OF_WHOLE, Item, Measured, SplitStudy

SHOWN = {
    "whole": "all images", "ensemble": "ensemble of the parts", "naive": "naive average",
    "naive repaired": "naive average, repaired", "aligned": "aligned average",
    "aligned statistics": "aligned average, batch-norm statistics put right",
    "aligned repaired": "aligned average, repaired", "paf": "PaF", "fap": "FaP", "whole fused": "whole, fused",
    "whole discard": "whole, discard",
}  # fmt: skip
FROM_PARTS = ("paf", "fap")
STEPS = ("train", "prune", "fuse", "finetune")
Table = tuple[list[str], list[list[str]]]


def write_split_report(study: SplitStudy, folder: Path) -> str:
    """Write the report in Markdown and HTML, its figure and ``results.csv``; return the tables for the terminal."""
    from intrafusion.lab.split.figure import draw_schedules
    from intrafusion.lab.split.page import to_html

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


TIMES = (
    "Wall clock, mean over the seeds, with one worker for each part: what is done for every part at once counts with "
    "its slowest. The speed-up is that of the whole path, from the first training step to the network of the row, "
    "against the network that saw all images, pruned with fusion and fine-tuned as long."
)


def summary(study: SplitStudy) -> str:
    """How the images were divided and how much was trained, in one paragraph."""
    recipe, parts = study.recipe, study.parts
    epochs = recipe.train.epochs if recipe.train else 0
    overlap = recipe.split.overlap if recipe.split else 0.0
    shared = f"each with {overlap:.0%} of the others' images" if overlap else "disjoint"
    whole = "whole" in (recipe.split.schedules if recipe.split else ())
    return (
        f"{recipe.title}: {len(parts)} parts of {' and '.join(f'{size:,}' for size in parts)} training images, "
        f"{shared}; {epochs} epochs each, {epochs * sum(parts):,} sample presentations in all"
        f"{f', and {epochs * study.together:,} for the network that sees all images' if whole else ''}."
    )


def networks_table(study: SplitStudy) -> Table:
    """Trained networks and their averages: a column per seed, and the mean where there are several."""
    seeds = _unique(result.item.seed for result in study.results)
    groups: dict[tuple[str, str], dict[int, float]] = {}
    for result in study.results:
        if not result.item.ratio and result.item.method in ("part", *SHOWN):
            key = (result.item.init or "", _name(result.item))
            groups.setdefault(key, {})[result.item.seed] = result.accuracy.percent
    rows = [[init, name, *_with_mean(seeds, found)] for (init, name), found in groups.items()]
    return ["init", "network", *_with_mean_header(seeds)], rows


def schedules_table(study: SplitStudy) -> Table:
    """A row per initialisation, ratio, budget and seed; PaF and FaP against the network that saw all images."""
    methods = [name for name in (*OF_WHOLE, *FROM_PARTS) if any(r.item.method == name for r in study.results)]
    header = ["init", "removed", "epochs", "seed", *(SHOWN[name] for name in methods), "best"]
    rows = []
    for init, ratio, epochs in settings_of(study):
        seeds = _unique(r.item.seed for r in study.results if r.item.ratio == ratio)
        found = {name: of(study, name, init, ratio, epochs) for name in methods}
        for seed in seeds:
            values = {name: by[seed].accuracy.percent for name, by in found.items() if seed in by}
            if values:
                rows.append([init, f"{ratio:.4g}", str(epochs), str(seed), *_numbers(methods, values), _best(values)])
        means = {name: fmean(r.accuracy.percent for r in by.values()) for name, by in found.items() if by}
        if len(seeds) > 1 and means:
            rows.append([init, f"{ratio:.4g}", str(epochs), "mean", *_numbers(methods, means), _best(means)])
    return header, rows


def times_table(study: SplitStudy) -> Table:
    """Mean seconds of each step on the way to a pruned network, and how much sooner it is there."""
    rows = []
    for init, ratio, epochs in settings_of(study):
        whole = of(study, "whole fused", init, ratio, epochs)
        for name in ("whole fused", *FROM_PARTS):
            found = of(study, name, init, ratio, epochs)
            if found:
                steps = [fmean(r.seconds.get(step, 0.0) for r in found.values()) for step in STEPS]
                faster = f"{_total(whole) / _total(found):.2f}x" if whole else ""
                shown = [f"{value:.4g}" for value in (*steps, _total(found))]
                rows.append([init, SHOWN[name], f"{ratio:.4g}", str(epochs), *shown, faster])
    return ["init", "schedule", "removed", "epochs", *STEPS, "total", "speed-up"], rows


@dataclass(frozen=True)
class Curves:
    """Mean accuracy in per cent over the share removed: ``lines[method][ratio]``, for one initialisation and budget."""

    init: str
    epochs: int
    lines: Mapping[str, Mapping[float, float]]

    @property
    def label(self) -> str:
        """What they are of."""
        tuned = f"{shown_epochs(self.epochs)} of fine-tuning" if self.epochs else "no fine-tuning"
        return f"{self.init} init, {tuned}" if self.init else tuned


def curves(study: SplitStudy) -> list[Curves]:
    """The pruned networks by initialisation and budget; without fine-tuning each line starts at what was pruned."""
    found = []
    settings = settings_of(study)
    for init, epochs in _unique((init, epochs) for init, _, epochs in settings):
        lines: dict[str, dict[float, float]] = {}
        for name in (*OF_WHOLE, *FROM_PARTS):
            start = ("whole",) if name in OF_WHOLE else ("aligned repaired", "aligned")
            dense = next((by for by in (of(study, method, init) for method in start) if by), {})
            line = {0.0: dense} if dense and not epochs else {}
            line |= {
                ratio: of(study, name, init, ratio, epochs) for at, ratio, e in settings if (at, e) == (init, epochs)
            }
            means = {ratio: mean_accuracy(by) for ratio, by in line.items() if by}
            if set(means) - {0.0}:
                lines[name] = means
        if lines:
            found.append(Curves(init, epochs, lines))
    return found


def shown_epochs(count: int) -> str:
    """How many epochs, in words."""
    return f"{count} epoch{'' if count == 1 else 's'}"


def verdicts(study: SplitStudy) -> list[str]:
    """What alignment recovered, where training on all images at once was better, and how much sooner each is there."""
    return [*_recovered(study), *_winners(study), *_speedups(study)]


def _recovered(study: SplitStudy) -> list[str]:
    lines = []
    for init in study.recipe.split.init if study.recipe.split else ():
        naive, best = of(study, "naive", init), of(study, "aligned repaired", init) or of(study, "aligned", init)
        parts: dict[int, list[float]] = {}
        for result in study.results:
            if result.item.method == "part" and result.item.init == init:
                parts.setdefault(result.item.seed, []).append(result.accuracy.percent)
        seeds = [seed for seed in parts if seed in naive and seed in best]
        if not seeds:
            continue
        gap = fmean(max(parts[seed]) - naive[seed].accuracy.percent for seed in seeds)
        won = fmean(best[seed].accuracy.percent - naive[seed].accuracy.percent for seed in seeds)
        share = f", {won / gap:.0%} of it" if min(gap, won) > 0 else ""
        means = "alignment and repair" if of(study, "aligned repaired", init) else "alignment"
        lines.append(
            f"Init {init}: the naive average is {gap:.2f} points below the better part on average; "
            f"{means} change it by {won:+.2f} points{share}."
        )
    return lines


def _winners(study: SplitStudy) -> list[str]:
    lost, rows = [], 0
    for init, ratio, epochs in settings_of(study):
        parts = [of(study, name, init, ratio, epochs) for name in FROM_PARTS]
        whole = [of(study, name, init, ratio, epochs) for name in OF_WHOLE]
        if not any(parts) or not any(whole):
            continue
        rows += 1
        ours, theirs = (
            max(fmean(r.accuracy.percent for r in by.values()) for by in found if by) for found in (parts, whole)
        )
        if theirs > ours:
            lost.append(theirs - ours)
    if not rows:
        return []
    by = f", by {min(lost):.2f} to {max(lost):.2f} points" if lost else ""
    return [f"Training on all images at once, then pruning, is better than both PaF and FaP in {len(lost)} of {rows} "
            f"settings{by}."]  # fmt: skip


def _speedups(study: SplitStudy) -> list[str]:
    times: dict[str, list[float]] = {name: [] for name in FROM_PARTS}
    training = []
    for init, ratio, epochs in settings_of(study):
        whole = of(study, "whole fused", init, ratio, epochs)
        for name, factors in times.items():
            if (own := of(study, name, init, ratio, epochs)) and whole:
                factors.append(_total(whole) / _total(own))
                training.append(_training(whole) / _training(own))
    if not training:
        return []
    told = [f"{SHOWN[name]} {_range(factors)} in all" for name, factors in times.items() if factors]
    return [
        f"Speed-up with a worker for each part (below 1 is slower): {_range(training)} in training; {', '.join(told)}."
    ]


def _training(found: dict[int, Measured]) -> float:
    return fmean(result.seconds["train"] for result in found.values())


def _range(factors: Sequence[float]) -> str:
    low, high = (f"{value:.2f}x" for value in (min(factors), max(factors)))
    return low if low == high else f"{low} to {high}"


def mean_accuracy(found: Mapping[int, Measured]) -> float:
    """Over the seeds, in per cent."""
    return fmean(result.accuracy.percent for result in found.values())


def settings_of(study: SplitStudy) -> list[tuple[str, float, int]]:
    """Initialisation, ratio and budget of each comparison; one without parts stands for itself."""
    pruned = [r.item for r in study.results if r.item.method in (*OF_WHOLE, *FROM_PARTS)]
    inits = _unique(item.init for item in pruned if item.init) or [""]
    places = sorted({(item.ratio, item.epochs) for item in pruned})
    return [(init, ratio, epochs) for init in inits for ratio, epochs in places]


def of(study: SplitStudy, method: str, init: str, ratio: float = 0.0, epochs: int = 0) -> dict[int, Measured]:
    """By seed; what saw all images is the same for every initialisation of the parts."""
    return {
        r.item.seed: r
        for r in study.results
        if (r.item.method, r.item.ratio, r.item.epochs) == (method, ratio, epochs) and r.item.init in (None, init)
    }


def _total(found: dict[int, Measured]) -> float:
    return fmean(result.total_seconds for result in found.values())


def _best(values: dict[str, float]) -> str:
    top = max(values.values())
    return " = ".join(SHOWN[name] for name, value in values.items() if value == top)


def _numbers(methods: Sequence[str], values: dict[str, float]) -> list[str]:
    return [f"{values[name]:.2f}" if name in values else "" for name in methods]


def _with_mean_header(seeds: Sequence[int]) -> list[str]:
    return [*(f"seed {seed}" for seed in seeds), *(["mean"] if len(seeds) > 1 else [])]


def _with_mean(seeds: Sequence[int], found: dict[int, float]) -> list[str]:
    shown = [f"{found[seed]:.2f}" if seed in found else "" for seed in seeds]
    return [*shown, f"{fmean(found.values()):.2f}"] if len(seeds) > 1 else shown


def _name(item: Item) -> str:
    return SHOWN[item.method] if item.part is None else f"part {item.part}"


def _unique(values: Iterable) -> list:
    return list(dict.fromkeys(values))


def _csv_row(result: Measured) -> dict[str, object]:
    item = result.item
    row: dict[str, object] = {
        name: getattr(item, name) for name in ("method", "seed", "init", "part", "ratio", "epochs")
    }
    row |= {name: getattr(result, name) for name in ("correct", "total", "params", "macs", "digest")}
    return row | {f"{step}_s": result.seconds.get(step) for step in STEPS} | {"total_s": round(result.total_seconds, 3)}
