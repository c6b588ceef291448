"""The figure of a run: accuracy over the share of channels removed."""

from __future__ import annotations

import io
import math
from itertools import zip_longest
from typing import Any

from intrafusion.lab.pruning import ALL
from intrafusion.lab.reports.finetuned import finetuned
from intrafusion.lab.study import Pair, Study

FUSED, DISCARD, DENSE, INK, GRID = "#0b6e8f", "#d1603d", "#7a7a7a", "#222222", "#e4e4e4"


def draw(study: Study) -> bytes:
    """A PNG: one panel for all groups at once, or one small panel per group."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(pair.group for pair in study.pairs))
    columns = _columns(max(1, len(groups)))
    rows = max(1, math.ceil(len(groups) / columns))
    small = len(groups) > 1
    size = (3.0 * columns + 0.8, 2.4 * rows + 0.8) if small else (6.6, 4.2)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for index, axis in enumerate(axes.flat):
        if index >= max(1, len(groups)):
            axis.set_visible(False)
            continue
        group = groups[index] if groups else ALL
        _panel(axis, study, [pair for pair in study.pairs if pair.group == group], labelled=index == 0)
        axis.tick_params(labelbottom=index + columns >= len(groups))
        if group != ALL:
            axis.set_title(group, fontsize=9, loc="left", color=INK)
    figure.suptitle(
        f"{study.recipe.title}, no fine-tuning",
        x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK,
    )  # fmt: skip
    figure.supxlabel("channels removed (%)", fontsize=9, color=INK)
    figure.supylabel("test accuracy (%)", fontsize=9, color=INK)
    return png(figure)


def draw_finetuning(study: Study) -> bytes:
    """A PNG: validation accuracy over the epochs of fine-tuning, one panel per pair; the axes start where it is."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = finetuned(study)
    columns = _columns(len(found))
    rows = math.ceil(len(found) / columns)
    figure = Figure(figsize=(3.4 * columns + 0.8, 2.6 * rows + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, tuned in zip_longest(axes.flat, found):
        if tuned is None:
            axis.set_visible(False)
            continue
        for method, colour in (("discard", DISCARD), ("fused", FUSED)):
            values = tuned.validation(method)[1:]
            epochs = range(1, len(values) + 1)
            axis.plot(epochs, values, color=colour, marker="o", markersize=4, linewidth=1.8, label=method)
        low = min(value for method in ("discard", "fused") for value in tuned.validation(method)[1:])
        axis.set_ylim(low - 0.05 * (101 - low), 100.3)
        axis.set_title(tuned.pair.label, fontsize=9, loc="left", color=INK)
        axis.xaxis.get_major_locator().set_params(integer=True)
        soften(axis)
    axes.flat[0].legend(fontsize=8, frameon=False)
    figure.suptitle(
        f"{study.recipe.title}, fine-tuned", x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK
    )  # fmt: skip
    figure.supxlabel("epochs of fine-tuning", fontsize=9, color=INK)
    figure.supylabel("validation accuracy (%)", fontsize=9, color=INK)
    return png(figure)


def png(figure: Any) -> bytes:
    """A matplotlib figure as the content of a file."""
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=160, facecolor="white")
    return target.getvalue()


def _columns(count: int) -> int:
    """Up to four in a row; three or four, whichever leaves fewer gaps, for more."""
    return count if count <= 4 else min((3, 4), key=lambda columns: (-count % columns, columns))


def _panel(axis: Any, study: Study, pairs: list[Pair], *, labelled: bool) -> None:
    dense = study.dense.accuracy.percent
    axis.axhline(dense, color=DENSE, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    pairs = sorted(pairs, key=lambda pair: pair.ratio)
    ratios = [0.0, *(100 * pair.ratio for pair in pairs)]
    fused = [dense, *(pair.fused.accuracy.percent for pair in pairs)]
    discard = [dense, *(pair.discard.accuracy.percent for pair in pairs)]
    axis.plot(ratios, discard, color=DISCARD, marker="o", markersize=4, linewidth=1.8, zorder=2)
    axis.plot(ratios, fused, color=FUSED, marker="o", markersize=4, linewidth=1.8, zorder=3)
    style(axis)
    if labelled:
        _label_lines(axis, ratios[-1], {"fused": fused[-1], "discard": discard[-1]}, dense)


def style(axis: Any) -> None:
    """The look of a panel: channels removed from 0 to 100 %, accuracy from 0 to 100 %, light lines to read off."""
    axis.set_xlim(-2, 101)
    axis.set_ylim(0, 105)
    soften(axis)


def soften(axis: Any) -> None:
    """Light lines to read off, and no frame but the lower edge."""
    axis.grid(axis="y", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(length=0, labelsize=8, colors=INK)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _label_lines(axis: Any, x: float, ends: dict[str, float], dense: float) -> None:
    """Names beside the ends of the lines, moved apart where they would touch."""
    colours = {"fused": FUSED, "discard": DISCARD}
    lower, upper = sorted(ends, key=lambda name: ends[name])
    gap = max(0.0, 8 - (ends[upper] - ends[lower]))
    heights = {lower: ends[lower] - gap / 2, upper: ends[upper] + gap / 2}
    if heights[lower] < 2:
        heights = {lower: 2.0, upper: max(heights[upper], 10.0)}
    for name, height in heights.items():
        axis.annotate(
            f"{name} {ends[name]:.1f}", (x, height), xytext=(6, 0), textcoords="offset points", va="center",
            fontsize=8, color=colours[name], fontweight="bold",
        )  # fmt: skip
    axis.annotate(
        f"dense {dense:.1f}", (100, dense), xytext=(0, 2), textcoords="offset points", ha="right", va="bottom",
        fontsize=8, color=DENSE, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
    )  # fmt: skip
