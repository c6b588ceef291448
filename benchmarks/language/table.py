"""The results as one Markdown table: a row for every model, width and ratio, a column for every method."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from benchmarks.language.methods import METHODS

_INTERVAL = 1.96


def table(rows: Iterable[Mapping[str, Any]], text: str) -> Iterator[str]:
    """Line by line: the loss in nats a token on one text; cells that failed are empty.

    Bold: the least of a line, and what may be as low: the 95 % interval of its paired difference, sequence by sequence
    that both were judged on, holds 0.
    """
    cells: dict[tuple[str, ...], dict[str, float]] = {}
    each: dict[tuple[str, ...], dict[str, Sequence[float]]] = {}
    for row in rows:
        model, kind, ratio, method, _ = row["row"].split("/")
        if text in row:
            cells.setdefault((model, kind, ratio), {})[method] = row[text]
            each.setdefault((model, kind, ratio), {})[method] = row.get(f"{text}, each", ())
    names = [name for name in METHODS if any(name in found for found in cells.values())]
    dense = {model: found["dense"] for (model, _, _), found in cells.items() if "dense" in found}
    yield f"| model | width | removed | dense | {' | '.join(names)} |"
    yield "| --- | --- | ---: | ---: |" + " ---: |" * len(names)
    for (model, kind, ratio), found in cells.items():
        if kind == "-":
            continue
        least = min(found, key=lambda name: found[name])
        judged = each[model, kind, ratio]
        first = {name for name in found if name == least or _may_be_as_low(judged[name], judged[least])}
        shown = [f"**{found[n]:.3f}**" if n in first else f"{found[n]:.3f}" if n in found else "" for n in names]
        before = f"{dense[model]:.3f}" if model in dense else ""
        yield f"| {model} | {kind} | {float(ratio):.0%} | {before} | {' | '.join(shown)} |"


def _may_be_as_low(one: Sequence[float], least: Sequence[float]) -> bool:
    """Losses of the same sequences: is the mean difference within 1.96 of its standard errors?"""
    if len(one) != len(least) or len(one) < 2:
        return False
    differences = [a - b for a, b in zip(one, least, strict=True)]
    return mean(differences) <= _INTERVAL * stdev(differences) / len(differences) ** 0.5
