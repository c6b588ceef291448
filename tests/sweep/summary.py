"""The rows of a sweep in a file, and what they say together."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from statistics import median

from tests.sweep.checks import Row


def append(path: Path, row: Row) -> None:
    """One more line; the last one of a seed and preset holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(asdict(row)) + "\n")


def read(path: Path) -> dict[tuple[int, str], Row]:
    """The rows so far, by seed and preset."""
    rows = [Row(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
    return {(row.seed, row.preset): row for row in rows}


def summary(rows: list[Row]) -> str:
    """A table with a line for each preset, then the kinds of what is wrong, most frequent first, with seeds."""
    lines = ["preset       nets  refused  crash  worse  unwarned  dup checked  dup wrong  state  ours/twin  seconds"]
    for preset in dict.fromkeys(row.preset for row in rows):
        lines.append(_line(preset, [row for row in rows if row.preset == preset]))
    for kind, seeds in _kinds(rows):
        shown = ", ".join(map(str, seeds[:8])) + (", …" if len(seeds) > 8 else "")
        lines.append(f"{len(seeds):5d}  {kind}  [seeds {shown}]")
    return "\n".join(lines)


def _line(preset: str, rows: list[Row]) -> str:
    faults = Counter(fault for row in rows for fault in row.faults())
    ratios = [row.ours / row.twin for row in rows if row.ours is not None and row.twin]
    refused, worse = sum(bool(row.error) and row.named for row in rows), sum(row.worse for row in rows)
    doubled = sum(row.duplicates is not None for row in rows)
    return (
        f"{preset:11s} {len(rows):5d} {refused:8d} {faults['crash']:6d} {worse:6d} "
        f"{faults['worse without a warning']:9d} {doubled:12d} {faults['duplicates not exact']:10d} "
        f"{faults['state changed by an error']:6d} {median(ratios) if ratios else 0:10.3f} "
        f"{sum(row.seconds for row in rows):8.0f}"
    )


def _kinds(rows: list[Row]) -> list[tuple[str, list[int]]]:
    kinds: dict[str, list[int]] = {}
    for row in rows:
        for fault in row.faults():
            detail = {"crash": f"{row.where}: {_general(row.error)}", "state changed by an error": _general(row.state)}
            kinds.setdefault(f"{row.preset}: {fault} {detail.get(fault, '')}".rstrip(), []).append(row.seed)
    return sorted(kinds.items(), key=lambda kind: -len(kind[1]))


def _general(message: str) -> str:
    """A message without the names and numbers of one network, in one line."""
    return re.sub(r"\d+", "#", message.replace("\n", " "))[:240]
