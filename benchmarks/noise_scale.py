"""What fusing two networks trained on two halves gains, against the effective noise scale of their training.

    python -m benchmarks.noise_scale            # some minutes on one core; writes benchmarks/results/noise_scale.*

Learning rate x batch size on scikit-learn's digits, every other setting and the number of epochs the same. The second
network starts from the first one's initialisation, or from another. Nothing is selected on the test images. An
interrupted call goes on where it stopped, and more seeds are added to those in noise_scale.jsonl.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, pairwise, product
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import nn
from tqdm import tqdm

import intrafusion
from intrafusion.lab.data.dataset import Dataset
from intrafusion.lab.data.sources import digits
from intrafusion.lab.errors import LabError
from intrafusion.lab.landscape.loss import interpolate, score
from intrafusion.lab.models import build_model
from intrafusion.lab.recipe.sections import TrainSection
from intrafusion.lab.reports.figure import DISCARD, FUSED, INK, soften
from intrafusion.lab.reports.tables import markdown_table
from intrafusion.lab.training import train_
from intrafusion.lab.training_record import mean_noise_scale
from intrafusion.training.loop import History

RESULTS = Path(__file__).parent / "results"
RATES, BATCHES = (0.003, 0.01, 0.03, 0.1, 0.3), (32, 128)
STARTS = {"one initialisation": 0, "two initialisations": 1000}
BINS = 5
LEARNT = 90


@dataclass(frozen=True)
class Pairing:
    """Two trained networks and their fusion; accuracies and gain in per cent."""

    start: str
    epochs: int
    lr: float
    batch: int
    seed: int
    noise: float
    trace: float
    parents: float
    fused: float
    barrier: float

    @property
    def gain(self) -> float:
        return self.fused - self.parents


def measure(data: Dataset, lr: float, batch: int, seed: int, epochs: int) -> Iterator[Pairing]:
    """One pairing for each start; the first network is the same in both."""
    settings = TrainSection(epochs=epochs, lr=lr, batch_size=batch, seed=seed)
    left, right = data.parts(2, seed=seed)
    first, history = _trained(left, settings, seed)
    images = [inputs for inputs, _ in data.draw("train", 250, seed=0)]
    test = partial(score, data=data)
    for start, apart in STARTS.items():
        second, other = _trained(right, settings, seed + apart)
        fused = intrafusion.fuse([first, second], images[0][:2], batches=images, repair="statistics")
        aligned = intrafusion.align(second, first, images[0][:2]).apply(second)
        yield Pairing(
            start, epochs, lr, batch, seed,
            noise=statistics.fmean(mean_noise_scale(h.noise) for h in (history, other) if h.noise),
            trace=statistics.fmean(h.noise.epochs[-1].trace or math.nan for h in (history, other) if h.noise),
            parents=50 * (test(first).accuracy + test(second).accuracy),
            fused=100 * test(fused).accuracy,
            barrier=interpolate(first, aligned, test, steps=5, progress=False).barrier,
        )  # fmt: skip


def _trained(data: Dataset, settings: TrainSection, start: int) -> tuple[nn.Module, History]:
    torch.manual_seed(start)
    network = build_model("digits_cnn", len(data.classes))
    return network, train_(network, data, settings, progress=False)


def table(pairings: Sequence[Pairing]) -> str:
    """Markdown: one row for each learning rate and batch size, by noise scale; means over the seeds."""
    header = ["lr", "batch", "noise scale", "gradient variance", "parents", "fused", "gain", "loss barrier, aligned"]
    rows = []
    for cell in _cells(pairings):
        mean = partial(_mean, cell)
        gains = [p.gain for p in cell]
        spread = f"{statistics.fmean(gains):+.2f} ({min(gains):+.2f} to {max(gains):+.2f})"
        rows.append([
            f"{cell[0].lr:g}", str(cell[0].batch), f"{mean(lambda p: p.noise):.3g}", f"{mean(lambda p: p.trace):.3g}",
            f"{mean(lambda p: p.parents):.2f} %", f"{mean(lambda p: p.fused):.2f} %", spread,
            f"{mean(lambda p: p.barrier):.3f}",
        ])  # fmt: skip
    return markdown_table(header, rows, "r" * len(header))


def verdict(pairings: Sequence[Pairing]) -> str:
    """Whether the gain rises and falls again: the best of five bins of noise scale against the first and the last."""
    bins = _bins(pairings)
    means = [_mean(part, lambda p: p.gain) for part in bins]
    best = max(range(len(bins)), key=means.__getitem__)
    rank = spearmanr([p.noise for p in pairings], [p.gain for p in pairings])
    text = (
        f"Mean gain in {len(bins)} bins of rising noise scale: {', '.join(f'{mean:+.2f}' for mean in means)}; rank "
        f"correlation of gain with noise scale {rank.statistic:+.2f} (p = {rank.pvalue:.2g}, {len(pairings)} pairs). "
    )
    if best in (0, len(bins) - 1):
        return text + f"The largest is the {'last' if best else 'first'}: no maximum between the ends."
    steps = [_difference(bins[best], bins[end]) for end in (0, -1)]
    above = [f"{difference:+.2f} ± {error:.2f}" for difference, error in steps]
    clear = all(difference > 2 * error for difference, error in steps)
    return text + (
        f"The largest is bin {best + 1}: {above[0]} points over the first and {above[1]} over the last (± one standard "
        f"error over a bin's pairs), {'more' if clear else 'not more'} than two standard errors over both: the curve "
        f"{'rises and falls' if clear else 'is not shown to be non-monotone'}."
    )


def draw(pairings: Sequence[Pairing]) -> bytes:
    """A PNG: gain and barrier over the noise scale, a point per setting (mean and standard error), a line of bins."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    quantities: tuple[tuple[str, Callable[[Pairing], float]], ...] = (
        ("gain over the parents' mean (points)", lambda p: p.gain),
        ("loss barrier after alignment", lambda p: p.barrier),
    )
    for axis, (label, value) in zip(panels, quantities, strict=True):
        for start, colour in zip(STARTS, (FUSED, DISCARD), strict=True):
            own = [p for p in pairings if p.start == start]
            for cell in _cells(own):
                noise, mean, error = _mean(cell, lambda p: p.noise), _mean(cell, value), _error(cell, value)
                axis.errorbar(noise, mean, error, color=colour, marker="o", markersize=4, alpha=0.5, elinewidth=1)
            line = [(_mean(part, lambda p: p.noise), _mean(part, value)) for part in _bins(own)]
            axis.plot(*zip(*line, strict=True), color=colour, linewidth=1.8, label=start)
        axis.axhline(0, color=INK, linewidth=0.6)
        axis.set_xscale("log")
        axis.set_xlabel("noise scale: lr / (batch (1 - momentum)), mean over training", fontsize=8, color=INK)
        axis.set_ylabel(label, fontsize=9, color=INK)
        soften(axis)
    panels[1].set_ylim(bottom=0)
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle("Fusing two networks trained on two halves of the digits", x=0.01, ha="left", fontsize=11)
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=160, facecolor="white")
    return target.getvalue()


def _cells(pairings: Sequence[Pairing]) -> list[list[Pairing]]:
    places = sorted({(p.lr, p.batch) for p in pairings})
    cells = [[p for p in pairings if (p.lr, p.batch) == place] for place in places]
    return sorted(cells, key=lambda cell: _mean(cell, lambda p: p.noise))


def _bins(pairings: Sequence[Pairing]) -> list[list[Pairing]]:
    """Whole cells by rising noise scale, in bins of about equal size."""
    cells = _cells(pairings)
    count = min(BINS, len(cells))
    edges = [round(number * len(cells) / count) for number in range(count + 1)]
    return [list(chain(*cells[low:high])) for low, high in pairwise(edges)]


def _mean(pairings: Sequence[Pairing], value: Callable[[Pairing], float]) -> float:
    return statistics.fmean(map(value, pairings))


def _error(pairings: Sequence[Pairing], value: Callable[[Pairing], float]) -> float:
    """Standard error of the mean."""
    return statistics.stdev(map(value, pairings)) / math.sqrt(len(pairings)) if len(pairings) > 1 else 0.0


def _difference(left: Sequence[Pairing], right: Sequence[Pairing]) -> tuple[float, float]:
    """Of the mean gains, with its standard error."""
    gain: Callable[[Pairing], float] = lambda p: p.gain  # noqa: E731
    return _mean(left, gain) - _mean(right, gain), math.hypot(_error(left, gain), _error(right, gain))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--output", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    data = digits()
    chosen.output.mkdir(parents=True, exist_ok=True)
    kept = chosen.output / "noise_scale.jsonl"
    lines = kept.read_text(encoding="utf-8").splitlines() if kept.exists() else []
    read = (Pairing(**json.loads(line)) for line in lines)
    pairings = [p for p in read if p.epochs == chosen.epochs and p.seed < chosen.seeds]
    done = {(p.seed, p.lr, p.batch) for p in pairings}
    failed: list[str] = []
    for seed, lr, batch in tqdm(list(product(range(chosen.seeds), RATES, BATCHES)), desc="pairs"):
        if (seed, lr, batch) in done:
            continue
        try:
            found = list(measure(data, lr, batch, seed, chosen.epochs))
        except LabError as error:
            failed.append(f"lr {lr:g}, batch {batch}, seed {seed}: {error}")
            continue
        pairings += found
        with kept.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(p)) + "\n" for p in found)
    parts = [
        "# Gain from fusing two networks against the noise scale of their training",
        f"`python -m benchmarks.noise_scale --seeds {chosen.seeds} --epochs {chosen.epochs}`: digits_cnn, each network "
        f"on one half of {len(data.split('train'))} training images, for {chosen.epochs} epochs at every batch size: "
        "large batches and low rates are trained too briefly. "
        f"One of the {len(data.split('test'))} test images is {100 / len(data.split('test')):.2f} points. "
        "Fused: aligned by weight matching, averaged, batch-norm statistics re-estimated on 250 training images. Gain: "
        "its accuracy minus the mean of its parents'; means over the seeds, lowest to highest in brackets. The barrier "
        "is of the loss, between aligned parents, statistics interpolated. Noise scale and gradient variance: "
        "docs/noise_scale.md.",
        "![Gain and barrier over the noise scale](noise_scale.png)",
    ]
    if chosen.seeds < 3:
        parts.append(f"With {chosen.seeds} of the 3 seeds that were planned this is a first look, not yet a result.")
    for start in STARTS:
        own = [p for p in pairings if p.start == start]
        learnt = [p for cell in _cells(own) if _mean(cell, lambda p: p.parents) >= LEARNT for p in cell]
        parts += [f"## {start.capitalize()}", f"All settings. {verdict(own)}"]
        if learnt:
            parts.append(f"Only settings whose parents reach {LEARNT} % in the mean. {verdict(learnt)}")
        parts.append(table(own))
    if failed:
        parts += ["## Left out", "\n".join(f"* {line}" for line in failed)]
    text = "\n\n".join(parts) + "\n"
    (chosen.output / "noise_scale.md").write_text(text, encoding="utf-8")
    (chosen.output / "noise_scale.png").write_bytes(draw(pairings))
    print(text)


if __name__ == "__main__":
    main()
