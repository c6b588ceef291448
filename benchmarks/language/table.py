"""The results as one Markdown table: a row for every model, width and ratio, a column for every method."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from benchmarks.language.methods import METHODS


def table(rows: Iterable[Mapping[str, Any]], text: str) -> Iterator[str]:
    """Line by line: the loss in nats a token on one text; the least of a line in bold, cells that failed empty."""
    cells: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        model, kind, ratio, method, _ = row["row"].split("/")
        if text in row:
            cells.setdefault((model, kind, ratio), {})[method] = row[text]
    names = [name for name in METHODS if any(name in found for found in cells.values())]
    dense = {model: found["dense"] for (model, _, _), found in cells.items() if "dense" in found}
    yield f"| model | width | removed | dense | {' | '.join(names)} |"
    yield "| --- | --- | ---: | ---: |" + " ---: |" * len(names)
    for (model, kind, ratio), found in cells.items():
        if kind == "-":
            continue
        least = min(found.values())
        shown = [
            f"**{found[n]:.3f}**" if found.get(n) == least else f"{found[n]:.3f}" if n in found else "" for n in names
        ]
        before = f"{dense[model]:.3f}" if model in dense else ""
        yield f"| {model} | {kind} | {float(ratio):.0%} | {before} | {' | '.join(shown)} |"
