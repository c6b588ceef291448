"""What a report says about fine-tuning: both networks of every pair, side by side, after the same epochs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from intrafusion.lab.pruning import ALL
from intrafusion.lab.results import Result
from intrafusion.lab.study import Pair, Study
from intrafusion.lab.training_record import noise_note, noise_table

METHODS = ("discard", "fused")


@dataclass(frozen=True)
class Tuned:
    """A pair after fine-tuning: one result per seed for each method, in the same order of seeds."""

    pair: Pair
    discard: tuple[Result, ...]
    fused: tuple[Result, ...]

    @cached_property
    def reported(self) -> list[int]:
        """The epochs whose test accuracy was asked for."""
        curve = self.fused[0].curve
        return [epoch for epoch, _ in curve.test] if curve else []

    def after(self, epoch: int) -> tuple[list[float], list[float]]:
        """Test accuracies after an epoch in per cent: discarded and fused, one per seed."""

        def percent(result: Result) -> float:
            correct = dict(result.curve.test)[epoch] if result.curve else 0
            return 100 * correct / result.total

        return [percent(r) for r in self.discard], [percent(r) for r in self.fused]

    def best(self) -> tuple[list[float], list[float]]:
        """Test accuracies of the epochs that were best on the validation split, as :meth:`after`."""
        return [r.accuracy.percent for r in self.discard], [r.accuracy.percent for r in self.fused]

    def validation(self, method: str) -> list[float]:
        """Mean validation accuracy over the seeds, from epoch 0 on."""
        curves = [result.curve.validation for result in getattr(self, method) if result.curve]
        return [fmean(values) for values in zip(*curves, strict=True)]


def finetuned(study: Study) -> list[Tuned]:
    """One entry per pair of a study, none where the recipe does not fine-tune."""
    found = []
    for pair in study.pairs:
        place = (pair.group, pair.ratio)
        own = [r for r in study.results if r.curve and (r.cell.group, r.cell.ratio) == place]
        both = [tuple(r for r in own if r.cell.method == method) for method in METHODS]
        if both[0] and len(both[0]) == len(both[1]):
            found.append(Tuned(pair, *both))
    return found


def finetuned_table(study: Study) -> tuple[list[str], list[list[str]]]:
    """Header and rows: for each pair its start, the reported epochs and the epoch that was best on validation."""
    rows = []
    for tuned in finetuned(study):
        start = [tuned.pair.discard.accuracy.percent], [tuned.pair.fused.accuracy.percent]
        entries = [("0", *start), *((str(epoch), *tuned.after(epoch)) for epoch in tuned.reported)]
        entries.append(("best on validation", *tuned.best()))
        for epochs, discard, fused in entries:
            gains = [b - a for a, b in zip(discard, fused, strict=True)]
            row = [f"{tuned.pair.ratio:.4g}", epochs, _percents(discard), _percents(fused), _several(gains, "+.2f")]
            rows.append([tuned.pair.group, *row])
    header = ["group", "removed", "epochs", "discard", "fused", "gain"]
    if all(tuned.pair.group == ALL for tuned in finetuned(study)):
        return header[1:], [row[1:] for row in rows]
    return header, rows


def finetuned_note(study: Study) -> str:
    """How both were fine-tuned, and what was chosen on what."""
    settings, found = study.recipe.finetune, finetuned(study)
    if settings is None or not found:
        return ""
    taught = f", taught by the dense network (temperature {settings.temperature:g}, weight {settings.alpha:g})"
    seeds = len(settings.seeds)
    chosen = "; ".join(
        f"{tuned.pair.label}: {_epochs(tuned.discard)} (discard), {_epochs(tuned.fused)} (fused)" for tuned in found
    )
    return (
        f"Both networks of a pair get the same training: {settings.epochs} epochs of {settings.optimizer}, learning "
        f"rate {settings.lr:g}, {settings.schedule} schedule, augmentation {settings.augmentation}"
        f"{taught if settings.teacher else ''}, and the same order of images. Test accuracies are of "
        f"{'one seed' if seeds == 1 else f'{seeds} seeds: mean (lowest to highest)'}; the epochs in the table were "
        f"named in advance, and the best epoch is chosen on the validation split of the training images: {chosen}."
    )


def finetuned_noise(study: Study) -> tuple[str, tuple[list[str], list[list[str]]]]:
    """Note and table of how noisy the fine-tuning at the middle ratio was; empty where it was not recorded."""
    at_middle = [tuned for tuned in finetuned(study) if tuned.pair.ratio == study.middle]
    for tuned in at_middle[:1]:
        kept = {name: [r.curve.noise for r in getattr(tuned, name) if r.curve and r.curve.noise] for name in METHODS}
        if all(kept.values()):
            return f"{tuned.pair.label}, while fine-tuning. {noise_note(kept['fused'][0])}", noise_table(kept)
    return "", ([], [])


def _epochs(results: Sequence[Result]) -> str:
    epochs = [str(result.curve.best) for result in results if result.curve]
    return f"epoch{'s' if len(epochs) > 1 else ''} {', '.join(epochs)}"


def _percents(values: Sequence[float]) -> str:
    return _several(values, ".2f", " %")


def _several(values: Sequence[float], form: str, unit: str = "") -> str:
    """The mean, and the extremes where there are several."""
    show: Callable[[float], str] = lambda value: format(value, form)  # noqa: E731
    extremes = f" ({show(min(values))} to {show(max(values))})" if len(values) > 1 else ""
    return f"{show(fmean(values))}{unit}{extremes}"
