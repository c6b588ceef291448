"""What a run with a section ``split`` shows, in sentences: what was divided, won and lost, and how much sooner."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from intrafusion.lab.split.study import OF_WHOLE, Measured, SplitStudy
from intrafusion.lab.split.tables import FROM_PARTS, SHOWN, mean_seconds, of, settings_of


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
                factors.append(mean_seconds(whole) / mean_seconds(own))
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
