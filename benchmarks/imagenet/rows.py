"""What is measured: which channels go and how many, by which method; one JSON line each, only ever added."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from benchmarks.rivals.rows import pack, unpack

DENSE = "dense"
MEASURED = {
    "calibrated, measured widths": "calibrated",
    "calibrated, measured widths, descent": "calibrated, descent",
    "discard, measured widths": "discard",
}
"""Methods with the ratios that `calibrated` measures, at the MACs of equal ones."""
STEPS = 1000
"""Of a descent."""
ON_DEMAND = ("calibrated, descent", "calibrated, measured widths, descent")
"""Only measured where they are asked for: they take hours without a GPU."""
METHODS = (
    "discard", "paper, same channels", "paper", "GRAIL", "data-free", "calibrated", "calibrated, descent", *MEASURED,
)  # fmt: skip
"""In the order of the table; `discard` is the twin of all but `paper`, which scores channels its own way."""
BY_DEFAULT = tuple(method for method in METHODS if method not in ON_DEMAND)


@dataclass(frozen=True)
class Removal:
    """What goes.

    groups: `all`, streams too, or `expanded`, only the widths within inverted residual blocks. amount: the share of
    each group's channels that goes, or, if macs, of the network's multiply-accumulates that stays.
    """

    groups: str
    amount: float
    macs: bool = False

    def __str__(self) -> str:
        groups = "" if self.groups == "all" else " of the expanded widths"
        return f"{self.amount:g} of the MACs left" if self.macs else f"{self.amount:.0%} of the channels{groups}"


REMOVALS = (
    Removal("expanded", 0.3),
    *(Removal("all", ratio) for ratio in (0.1, 0.2, 0.3)),
    *(Removal("all", share, macs=True) for share in (0.9, 0.8, 0.7)),
    Removal("all", 0.5),
    Removal("all", 0.5, macs=True),
)
"""In the order in which they are measured."""


@dataclass(frozen=True)
class Row:
    """One method at one removal.

    ratio: share of the channels of each pruned group that went. right, agrees: bool [N], for each image that judges,
    whether the network names its class, and the class that the dense network names. kept: a digest of which channels
    stay. seconds, processor: on the clock and of the processor, of the pruning alone, synthetic inputs included.
    device: what it ran on, if that was not the processor alone.
    """

    removal: Removal
    method: str
    ratio: float
    right: np.ndarray
    agrees: np.ndarray
    params: int
    macs: int
    kept: str
    seconds: float
    processor: float
    commit: str
    device: str = ""

    @property
    def key(self) -> tuple[Removal, str]:
        return self.removal, self.method


def wanted(removals: Sequence[Removal], methods: Sequence[str]) -> Iterator[tuple[Removal, str]]:
    """The dense network, then removal by removal every method that is asked for and fits."""
    yield Removal("none", 0.0), DENSE
    for removal in removals:
        yield from ((removal, method) for method in of(removal) if method in methods)


def of(removal: Removal) -> tuple[str, ...]:
    """The methods of a removal: ratios are measured where MACs are what is given."""
    return tuple(method for method in METHODS if removal.macs or method not in MEASURED)


def append(path: Path, row: Row) -> None:
    """Add a line and return once it is on the disk; what an interrupted write has left stays a line of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {field.name: getattr(row, field.name) for field in fields(Row)} | {"removal": asdict(row.removal)}
    for name in ("right", "agrees"):
        entry |= {name: pack(entry[name]), f"{name}_of": [int(entry[name].sum()), len(entry[name])]}
    broken = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * broken + json.dumps(entry) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> dict[tuple[Removal, str], Row]:
    """The last row of each key; a line that is no whole row counts as not measured."""
    found = (_parse(line) for line in (path.read_text().splitlines() if path.exists() else ()))
    return {row.key: row for row in found if row is not None}


def _parse(line: str) -> Row | None:
    try:
        entry = json.loads(line)
        for name in ("right", "agrees"):
            entry[name] = unpack(entry[name], entry.pop(f"{name}_of")[1])
        return Row(**entry | {"removal": Removal(**entry["removal"])})
    except (ValueError, KeyError, TypeError):
        return None
