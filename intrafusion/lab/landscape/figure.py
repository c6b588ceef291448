"""Figures of the loss between networks."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from intrafusion.lab.landscape.loss import Path, Slice
from intrafusion.lab.reports.figure import DENSE, DISCARD, FUSED, GRID, INK

_COLOURS = (FUSED, DISCARD, DENSE, "#6a4c93", "#8a9a2b")


def draw_paths(paths: Mapping[str, Path], title: str, *, split: str = "test") -> bytes:
    """A PNG with two panels, loss and accuracy (%) on a split over t, one line per named path."""
    figure = _figure((8.4, 3.4))
    panels = figure.subplots(1, 2)
    for number, (name, path) in enumerate(paths.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        for axis, values in zip(panels, (path.loss, 100 * path.accuracy), strict=True):
            axis.plot(path.t, values, color=colour, marker="o", markersize=3.5, linewidth=1.8, label=name)
    for axis, label in zip(panels, (f"{split} loss", f"{split} accuracy (%)"), strict=True):
        axis.set_xlabel("t", fontsize=9, color=INK)
        axis.set_ylabel(label, fontsize=9, color=INK)
        axis.grid(axis="y", color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
        _plain(axis)
    panels[0].legend(frameon=False, fontsize=8)
    return _png(figure, title)


def draw_plane(plane: Slice, names: Sequence[str], title: str, *, levels: int = 12, split: str = "test") -> bytes:
    """A PNG of the loss over a plane, as filled contours on a logarithmic scale, the three networks marked."""
    figure = _figure((5.6, 4.4))
    axis = figure.subplots()
    loss = np.log10(np.clip(np.nan_to_num(plane.loss, nan=np.inf), 1e-6, 1e6))
    edges = np.linspace(loss.min(), max(loss.max(), loss.min() + 1e-6), levels + 1)
    filled = axis.contourf(plane.x, plane.y, loss, levels=edges, cmap="viridis_r")
    bar = figure.colorbar(filled, ax=axis, ticks=edges[::3])
    bar.ax.set_yticklabels([f"{10**edge:.3g}" for edge in edges[::3]])
    bar.set_label(f"{split} loss", fontsize=9, color=INK)
    bar.ax.tick_params(length=0, labelsize=8, colors=INK)
    axis.plot(*plane.corners.T, linestyle="none", marker="o", markersize=7, markerfacecolor="white", color=INK)
    for name, (x, y) in zip(names, plane.corners, strict=True):
        axis.annotate(name, (x, y), xytext=(7, 5), textcoords="offset points", fontsize=8, color=INK, fontweight="bold")
    axis.set_aspect("equal")
    axis.set_xlabel("distance in parameters", fontsize=9, color=INK)
    _plain(axis)
    return _png(figure, title)


def _figure(size: tuple[float, float]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plain(axis: Any) -> None:
    axis.tick_params(length=0, labelsize=8, colors=INK)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _png(figure: Any, title: str) -> bytes:
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=160, facecolor="white")
    return target.getvalue()
