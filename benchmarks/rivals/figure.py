"""The figure: accuracy over the share of channels removed, one panel a network."""

from __future__ import annotations

import io

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.rivals.methods import METHODS
from benchmarks.rivals.table import OURS, Results, mean_and_half, right
from intrafusion.lab.reports.figure import DENSE, INK, style

_COLOURS = {"data-free": "#0072b2", "calibrated": "#d55e00"}
_RIVALS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#8c8c8c", "#b8a800", "#5c4a72", "#4d4d4d")
_MARKERS = "svD^<>pXhP"


def draw(results: Results, importance: str = "L1") -> dict[str, bytes] | None:
    """{"png": ..., "svg": ...}, or None if there is nothing to draw for the importance.

    Ours are thick, methods that see images are solid, those that see none are dashed. Colours are those of Okabe and
    Ito, told apart by colour-blind readers; each rival has a marker of its own as well.
    """
    networks = [network for network, name in results.tables(groups=False) if name == importance]
    if not networks:
        return None
    figure = Figure(figsize=(4.6 * len(networks) + 2.2, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(networks), sharey=True, squeeze=False)[0]
    lines = {}
    for axis, network in zip(axes, networks, strict=True):
        style(axis)
        axis.set_title(network, fontsize=10, loc="left", color=INK)
        places = results.places(network, importance)
        start = {network: results.dense[network]} if network in results.dense else {}
        dense = [mean_and_half(right(start.values()))[0]] if start else []
        if dense:
            axis.axhline(dense[0], color=DENSE, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
            axis.annotate(f"dense {dense[0]:.1f}", (100, dense[0]), xytext=(0, 2), textcoords="offset points",
                          ha="right", va="bottom", fontsize=8, color=DENSE)  # fmt: skip
        for name in METHODS:
            at = [(place.ratio, results.found[place][name]) for place in places if name in results.found[place]]
            if at:
                x = [0.0] * len(dense) + [100 * ratio for ratio, _ in at]
                y = dense + [mean_and_half(right(rows.values()))[0] for _, rows in at]
                lines[name] = axis.plot(x, y, **_look(name))[0]
    order = sorted(lines, key=lambda name: (METHODS[name].images, name not in OURS))
    labels = [f"{name} ({'images' if METHODS[name].images else 'no data'})" for name in order]
    legend = figure.legend(
        [lines[name] for name in order], labels, loc="outside right center", frameon=False, fontsize=8
    )
    for name, text in zip(order, legend.get_texts(), strict=True):
        text.set_fontweight("bold" if name in OURS else "normal")
    figure.suptitle(f"Whole networks, {importance} importance, no fine-tuning", x=0.01, ha="left", fontsize=11,
                    fontweight="bold", color=INK)  # fmt: skip
    figure.supxlabel("channels removed (%)", fontsize=9, color=INK)
    figure.supylabel("test accuracy (%)", fontsize=9, color=INK)
    files = {}
    with matplotlib.rc_context({"svg.hashsalt": "intrafusion"}):
        for kind, metadata in (("png", {}), ("svg", {"Date": None})):
            target = io.BytesIO()
            figure.savefig(target, format=kind, dpi=160, facecolor="white", metadata=metadata)
            files[kind] = target.getvalue()
    return files


def _look(name: str) -> dict:
    line = "solid" if METHODS[name].images else (0, (4, 1.5))
    if name in OURS:
        return {
            "color": _COLOURS[name],
            "linestyle": line,
            "linewidth": 2.8,
            "marker": "o",
            "markersize": 5,
            "zorder": 4,
        }
    index = [other for other in METHODS if other not in OURS].index(name)
    return {
        "color": _RIVALS[index % len(_RIVALS)], "linestyle": line, "linewidth": 1.2,
        "marker": _MARKERS[index % len(_MARKERS)], "markersize": 4, "zorder": 2,
    }  # fmt: skip
