"""Pictures for the HTML report: inline SVG whose colours come from the page, so that they follow its colour scheme."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 360, 250  # as wide as a phone, so that letters keep their size there
_LEFT, _RIGHT, _TOP, _BOTTOM = 34, 12, 18, 40
_FLOORS = ((90, 2), (80, 5), (50, 10), (0, 25))  # where the accuracy axis starts, and its steps
_LABELLED = 80  # a plan of more channels than this has no room for their numbers


@dataclass(frozen=True)
class Point:
    """An accuracy in per cent at ``x``; ``spread`` is drawn as a bar of that width, ``title`` is shown on hovering."""

    x: float
    accuracy: float
    title: str
    spread: float = 0.0


def accuracy_chart(
    lines: Mapping[str, Sequence[Point]], dense: Point | None, *, alt: str, x_label: str, joined: bool,
    x_top: float = 0.0,
) -> str:  # fmt: skip
    """Accuracy from 0 to 100 % over x up to ``x_top`` at least: one line per method, from the dense network's point on.

    Joined by lines, x starts at 0; otherwise every point stands for itself, and x starts near the first. Without
    ``dense`` the lines have only their own points, and accuracy starts at the highest of 0, 50, 80 and 90 % below them.
    """
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    start = [dense] if dense else []
    drawn = [point for points in lines.values() for point in points]
    found = [point.x for point in (*drawn, *start)]
    lowest = 0.0 if dense else min(point.accuracy for point in drawn)
    floor, every = next((floor, every) for floor, every in _FLOORS if lowest >= floor)
    low, top = min(found), max(*found, x_top)
    ticks = _ticks(0.0 if joined else low, top)
    first, last = ticks[0], ticks[-1]

    def x(value: float) -> float:
        share = (min(max(value, first), last) - first) / (last - first)
        return round(_LEFT + (right - _LEFT) * share, 1)

    def y(value: float) -> float:
        return round(bottom - (bottom - _TOP) * (value - floor) / (100 - floor), 1)

    parts = []
    for tick in range(floor, 101, every):
        parts.append(f'<path class="grid" d="M{_LEFT} {y(tick)}H{right}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(tick) + 4}" text-anchor="end">{tick}</text>')
    for tick in ticks:
        parts.append(f'<text x="{x(tick)}" y="{bottom + 16}" text-anchor="middle">{tick:.4g}</text>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    if dense:
        parts.append(f'<path class="level" d="M{_LEFT} {y(dense.accuracy)}H{right}"/>')
    for method, points in lines.items():
        if joined:
            corners = sorted([*start, *points], key=lambda point: point.x)
            path = "L".join(f"{x(point.x)} {y(point.accuracy)}" for point in corners)
            parts.append(f'<path class="line {method}" d="M{path}"/>')
        parts += [_mark(x(point.x), y(point.accuracy), method, point) for point in points]
        for point in points:
            if point.spread:
                ends = x(point.x - point.spread / 2), x(point.x + point.spread / 2)
                parts.append(f'<path class="spread {method}" d="M{ends[0]} {y(point.accuracy)}H{ends[1]}"/>')
    if dense:
        parts.append(_mark(x(dense.x), y(dense.accuracy), "dense", dense))
    return _svg(parts, _HEIGHT, alt)


def plan_picture(plan: Sequence[tuple[int, float]], alt: str) -> str:
    """Channels on the left, kept channels on the right, a curve from each channel to its main target.

    plan: as :class:`intrafusion.prune.report.GroupReport` has it. The order is that of the targets: no curves cross.
    """
    order = sorted(range(len(plan)), key=lambda channel: (plan[channel][0] < 0, plan[channel][0], channel))
    targets = sorted({target for target, _ in plan if target >= 0})
    labelled = len(plan) <= _LABELLED
    height = round(min(10.0 * len(plan), 800) + 40)
    left, right = (44, _WIDTH - 44) if labelled else (12, _WIDTH - 12)

    def places(names: Sequence[int]) -> dict[int, float]:
        step = (height - 40) / max(1, len(names))
        return {name: round(30 + (index + 0.5) * step, 1) for index, name in enumerate(names)}

    sources, ends = places(order), places(targets)
    parts = [
        f'<text x="{left}" y="14" text-anchor="middle">all {len(plan)}</text>',
        f'<text x="{right}" y="14" text-anchor="middle">kept {len(targets)}</text>',
    ]
    for channel in order:
        target, share = plan[channel]
        start = sources[channel]
        if labelled:
            parts.append(f'<text class="small" x="{left - 6}" y="{start + 3}" text-anchor="end">{channel}</text>')
        if target < 0:
            parts.append(
                f'<circle class="left-out" cx="{left}" cy="{start}" r="3"><title>{channel}: left out</title></circle>'
            )
            continue
        kind = "stays" if target == channel else "merges"
        curve = f"M{left} {start}C{_WIDTH / 2} {start} {_WIDTH / 2} {ends[target]} {right} {ends[target]}"
        title = f"{channel} to {target}, {share:.0%} of it"
        opacity = max(0.15, share)
        parts.append(
            f'<path class="flow {kind}" stroke-opacity="{opacity:.2f}" d="{curve}"><title>{title}</title></path>'
        )
    if labelled:
        parts += [f'<text class="small" x="{right + 6}" y="{y + 3}">{target}</text>' for target, y in ends.items()]
    return _svg(parts, height, alt)


def _mark(x: float, y: float, method: str, point: Point) -> str:
    """Shapes that are told apart without colours too: a disc for fused, a square for discard, a diamond for dense."""
    title = f"<title>{escape(point.title)}</title>"
    if method == "fused":
        return f'<circle class="mark fused" cx="{x}" cy="{y}" r="4">{title}</circle>'
    if method == "paf":
        return f'<path class="mark paf" d="M{x} {y - 5:.1f}l4.5 8h-9z">{title}</path>'
    turn = f' transform="rotate(45 {x} {y})"' if method in ("dense", "fap") else ""
    place = f'x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7"'
    return f'<rect class="mark {method}" {place}{turn}>{title}</rect>'


def _svg(parts: Sequence[str], height: float, alt: str) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(alt)}">{"".join(parts)}</svg>'


def _ticks(low: float, top: float) -> list[float]:
    """Round numbers from ``low`` or less to ``top`` or more, at most eight."""
    span = top - low if top - low > abs(top) / 1000 else abs(top) or 1.0
    unit = 10.0 ** math.floor(math.log10(span / 5))
    step = next(unit * factor for factor in (1, 2, 5, 10) if span / (unit * factor) <= 6)
    first = math.floor(low / step + 1e-9)
    last = max(first + 1, math.ceil(top / step - 1e-9))
    return [step * index for index in range(first, last + 1)]
