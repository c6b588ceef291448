"""The report: tables, and every cell in which our methods lose."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import torch
import torch_pruning as tp

from benchmarks.rivals.cells import SEEDED_IMPORTANCES
from benchmarks.rivals.methods import METHODS
from benchmarks.rivals.rows import ALL, DENSE, Row

OURS = ("data-free", "calibrated")
_NORMAL = 1.959964
"""Half the width of a 95 % interval in standard errors."""


@dataclass(frozen=True)
class Place:
    """Where methods meet: the same network, channels' scores and share of channels removed."""

    network: str
    importance: str
    ratio: float
    group: str = ALL

    def __str__(self) -> str:
        group = "" if self.group == ALL else f", {self.group} alone"
        return f"{self.network}{group}, {self.importance}, {self.ratio:.0%}"


@dataclass(frozen=True)
class Duel:
    """Ours against a rival on the same test images: the difference and half its 95 % interval's width, in points."""

    place: Place
    ours: str
    rival: str
    difference: float
    half: float

    @property
    def lost(self) -> bool:
        """The rival is better by more than the interval."""
        return self.difference + self.half < 0

    def __str__(self) -> str:
        return f"{self.place}: {self.ours} against {self.rival} {self.difference:+.2f} ± {self.half:.2f} points"


@dataclass
class Results:
    """Rows by place, method and seed."""

    dense: dict[str, Row] = field(default_factory=dict)
    found: dict[Place, dict[str, dict[int, Row]]] = field(default_factory=dict)
    errors: list[Row] = field(default_factory=list)

    @staticmethod
    def of(rows: Iterable[Row], images: int) -> Results:
        """What was measured with this number of images, or with none; methods that are no more are left out."""
        results = Results()
        for row in rows:
            cell = row.cell
            if cell.images not in (0, images) or cell.method not in (DENSE, *METHODS):
                continue
            if row.error:
                results.errors.append(row)
            elif cell.method == DENSE:
                results.dense[cell.network] = row
            else:
                place = Place(cell.network, cell.importance, cell.ratio, cell.group)
                results.found.setdefault(place, {}).setdefault(cell.method, {})[cell.seed] = row
        return results

    def places(self, network: str, importance: str | None = None, *, groups: bool = False) -> list[Place]:
        """The places of a network (and one importance), smallest ratio first; single groups, or all at once."""
        chosen = [
            place
            for place in self.found
            if place.network == network and importance in (None, place.importance) and (place.group != ALL) == groups
        ]
        return sorted(chosen, key=lambda place: place.ratio)

    def tables(self, *, groups: bool) -> list[tuple[str, str]]:
        """(network, importance) of every table there is something for."""
        return list(dict.fromkeys((p.network, p.importance) for p in self.found if (p.group != ALL) == groups))


def right(rows: Iterable[Row]) -> np.ndarray:
    """float [N]: for each test image the share of the rows (seeds) that classify it correctly."""
    return np.mean([~row.wrong for row in rows], axis=0)


def mean_and_half(values: np.ndarray) -> tuple[float, float]:
    """Mean of [N] values and half the width of its 95 % interval (normal approximation), both times 100."""
    return 100 * float(values.mean()), 100 * _NORMAL * float(values.std()) / len(values) ** 0.5


def duel(place: Place, ours: str, rival: str, methods: dict[str, dict[int, Row]]) -> Duel | None:
    """The paired difference, each method as the mean over its seeds; None if they have no test images in common.

    With an importance that depends on the seed, two methods keep the same channels for the same seed only: then the
    seeds that both have count.
    """
    first, second = methods[ours], methods[rival]
    if place.importance in SEEDED_IMPORTANCES:
        both = first.keys() & second.keys()
        first, second = ({seed: rows[seed] for seed in both} for rows in (first, second))
    if not first or not second:
        return None
    return Duel(place, ours, rival, *mean_and_half(right(first.values()) - right(second.values())))


def duels(results: Results, *, groups: bool = False) -> list[Duel]:
    """Each of ours against every method that sees no more than it does: data-free ones, or all of them."""
    found = []
    for place, methods in results.found.items():
        if (place.group != ALL) != groups:
            continue
        for ours, rival in product(OURS, methods):
            if ours in methods and rival != ours and (METHODS[ours].images or not METHODS[rival].images):
                found.append(duel(place, ours, rival, methods))
    return [one for one in found if one is not None]


def report(results: Results, command: str, images: int) -> str:
    """The report as markdown."""
    parts = [
        "# Structured pruning without fine-tuning: ours and what a user would pick instead",
        f"`{command}` (torch {torch.__version__}, torch-pruning {tp.__version__})",
        "Test accuracy in % ± half the width of its 95 % interval over the test images; with several seeds the mean, "
        "and [lowest, highest]. Every method of a column keeps the same number of channels, and the same channels "
        "unless the method chooses its own. Bold: the best of the methods that see no image, and the best of those "
        f"that see {images:,} unlabelled training images. Taylor importance is computed from the same images with "
        "their labels, for every method. LAMP keeps the channels of L2 where every layer loses the same share. "
        "Seconds: the median over the row. Nothing was chosen on the test images.",
    ]
    parts += [_table(results, *table) for table in results.tables(groups=False)]
    if results.tables(groups=False):
        parts += ["## Where ours is not the best", _losses(duels(results))]
    if results.tables(groups=True):
        parts += [_group_table(results, *table) for table in results.tables(groups=True)]
        parts += ["## Single groups in which ours is not the best", _losses(duels(results, groups=True), worst=True)]
    sizes = [_uneven(place, methods) for place, methods in results.found.items()]
    if any(sizes):
        parts += ["## Networks of different size in one column", "\n".join(f"- {line}" for line in sizes if line)]
    if results.errors:
        lines = [f"- {row.cell}: {row.error}" for row in results.errors]
        parts += [f"## Failed: {len(lines)} cells without a result", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _table(results: Results, network: str, importance: str) -> str:
    places = results.places(network, importance)
    lines = [
        "| method | sees images | " + " | ".join(f"{place.ratio:.0%} removed" for place in places) + " | seconds |",
        "| --- | --- |" + " ---: |" * (len(places) + 1),
    ]
    for sees in (False, True):
        names = [name for name, method in METHODS.items() if method.images == sees]
        best = [
            max((_accuracy(results.found[place][name]) for name in names if name in results.found[place]), default=0.0)
            for place in places
        ]
        for name in names:
            rows = [results.found[place].get(name, {}) for place in places]
            if not any(rows):
                continue
            cells = [_cell(found, top) if found else "–" for found, top in zip(rows, best, strict=True)]
            seconds = statistics.median(row.seconds for found in rows for row in found.values())
            lines.append(f"| {name} | {'yes' if sees else 'no'} | " + " | ".join(cells) + f" | {seconds:.0f} |")
    title = f"## {network}, {importance} importance{_dense(results, network)}"
    return "\n\n".join([title, "\n".join(lines), _left(results, places)]).strip()


def _group_table(results: Results, network: str, importance: str) -> str:
    places = results.places(network, importance, groups=True)
    ratios = sorted({place.ratio for place in places})
    groups = list(dict.fromkeys(place.group for place in places))
    names = [name for name in METHODS if any(name in results.found[place] for place in places)]
    lines = [
        "| group | method | " + " | ".join(f"{ratio:.0%} removed" for ratio in ratios) + " |",
        "| --- | --- |" + " ---: |" * len(ratios),
    ]
    for group, name in product(groups, names):
        at = [results.found.get(Place(network, importance, ratio, group), {}).get(name) for ratio in ratios]
        lines.append(f"| {group} | {name} | " + " | ".join(_cell(rows) if rows else "–" for rows in at) + " |")
    return f"## {network}, one group at a time, {importance} importance{_dense(results, network)}\n\n" + "\n".join(
        lines
    )


def _losses(all_duels: Sequence[Duel], *, worst: bool = False) -> str:
    """The duels that are lost, or that there are none; and the lowest difference of each of ours."""
    if not all_duels:
        return "Nothing to compare yet."
    lost = sorted((one for one in all_duels if one.lost), key=lambda one: one.difference)
    rule = (
        "A rival counts as better if it is so by more than the 95 % interval of the paired difference on the same test "
        "images (each comparison by itself, seeds averaged). `data-free` is compared with the methods that see no "
        "image, `calibrated` with all."
    )
    verdict = (
        f"{len(lost)} of {len(all_duels)} comparisons are lost:\n\n" + "\n".join(f"- {one}" for one in lost)
        if lost
        else f"None: in all {len(all_duels)} comparisons ours is better, or tied within the interval."
    )
    parts = [rule, verdict]
    if worst:
        parts.append(f"Lowest difference: {min(all_duels, key=lambda one: one.difference)}.")
    return "\n\n".join(parts)


def _accuracy(rows: dict[int, Row]) -> float:
    return 100 * float(right(rows.values()).mean())


def _cell(rows: dict[int, Row], best: float = float("inf")) -> str:
    mean, half = mean_and_half(right(rows.values()))
    text = f"**{mean:.2f}** ± {half:.2f}" if mean >= best else f"{mean:.2f} ± {half:.2f}"
    each = [100 * float((~row.wrong).mean()) for row in rows.values()]
    return f"{text} [{min(each):.2f}, {max(each):.2f}]" if len(each) > 1 else text


def _dense(results: Results, network: str) -> str:
    if network not in results.dense:
        return ""
    mean, half = mean_and_half(right([results.dense[network]]))
    return f" (dense {mean:.2f} ± {half:.2f})"


def _left(results: Results, places: Sequence[Place]) -> str:
    """What the smallest ratio to the largest leave of the dense network's parameters and operations."""
    if not places or places[0].network not in results.dense:
        return ""
    dense = results.dense[places[0].network]
    rows = [next(iter(next(iter(results.found[place].values())).values())) for place in places]
    params = " / ".join(f"{row.params / dense.params:.0%}" for row in rows)
    macs = " / ".join(f"{row.macs / dense.macs:.0%}" for row in rows)
    return f"Parameters left: {params}. Multiply-accumulates left: {macs}."


def _uneven(place: Place, methods: dict[str, dict[int, Row]]) -> str:
    sizes = {name: sorted({row.params for row in rows.values()}) for name, rows in methods.items()}
    if len({size for found in sizes.values() for size in found}) <= 1:
        return ""
    return f"{place}: parameters " + ", ".join(f"{name} {'/'.join(map(str, size))}" for name, size in sizes.items())
