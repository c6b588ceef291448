"""The figure of a run with a section ``split``: accuracy over the share of channels removed, for every schedule."""

from __future__ import annotations

from collections.abc import Sequence

from intrafusion.lab.reports.figure import DISCARD, FUSED, INK, png, soften
from intrafusion.lab.split.tables import SHOWN, Curves

_LOOK = {
    "whole fused": (FUSED, "o"), "whole discard": (DISCARD, "s"), "paf": ("#7a4fb5", "^"), "fap": ("#2e7d46", "D"),
}  # fmt: skip


def draw_schedules(title: str, found: Sequence[Curves]) -> bytes:
    """A PNG: a row for each initialisation, a panel for each budget of fine-tuning; all share their axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(dict.fromkeys(curves.init for curves in found))
    columns = sorted({curves.epochs for curves in found})
    figure = Figure(figsize=(3.4 * len(columns) + 0.8, 2.6 * len(rows) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), len(columns), sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat:
        axis.set_visible(False)  # where nothing is finished yet
    for curves in found:
        axis = axes[rows.index(curves.init), columns.index(curves.epochs)]
        axis.set_visible(True)
        for method, line in curves.lines.items():
            colour, mark = _LOOK[method]
            ratios = [100 * ratio for ratio in line]
            axis.plot(ratios, list(line.values()), color=colour, marker=mark, markersize=4, label=SHOWN[method])
        axis.set_title(curves.label, fontsize=9, loc="left", color=INK)
        axis.set_xlim(-2, 101)
        soften(axis)
    axes[rows.index(found[0].init), columns.index(found[0].epochs)].legend(fontsize=8, frameon=False)
    figure.suptitle(f"{title}, trained in parts", x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    figure.supxlabel("channels removed (%)", fontsize=9, color=INK)
    figure.supylabel("test accuracy (%)", fontsize=9, color=INK)
    return png(figure)
