"""The tables and curves of a run with a section ``split``, which its text, its pages and its figure show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

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


TIMES = (
    "Wall clock, mean over the seeds, with one worker for each part: what is done for every part at once counts with "
    "its slowest. The speed-up is that of the whole path, from the first training step to the network of the row, "
    "against the network that saw all images, pruned with fusion and fine-tuned as long."
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
                faster = f"{mean_seconds(whole) / mean_seconds(found):.2f}x" if whole else ""
                shown = [f"{value:.4g}" for value in (*steps, mean_seconds(found))]
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


def mean_seconds(found: Mapping[int, Measured]) -> float:
    """Of the whole path, over the seeds."""
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
