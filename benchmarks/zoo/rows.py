"""The rows of the zoo: a network and a preset."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch

from benchmarks.zoo.entries import Entry, entries

PRESETS = ("discard", "paper", "barycentre", "data-free", "calibrated")
EXACT = ("barycentre", "data-free", "calibrated")
"""Presets under which exact duplicates must go without a trace; the published sums are no such method."""


@dataclass(frozen=True)
class Row:
    """One line of the table, measured in a process of its own."""

    entry: Entry
    preset: str

    @property
    def name(self) -> str:
        return f"{self.entry.name}/{self.preset}"


def rows(patterns: Iterable[str] = (), presets: Iterable[str] = PRESETS, largest: float = float("inf")) -> list[Row]:
    """Cheapest networks first. patterns: of networks' names (all without any); largest: millions of parameters."""
    patterns = list(patterns)
    chosen = [
        entry
        for entry in entries().values()
        if entry.millions <= largest
        and (not patterns or any(fnmatch(entry.name, p) or fnmatch(entry.name, f"*:{p}") for p in patterns))
    ]
    return [Row(entry, preset) for entry in chosen for preset in presets]
