"""The results of the benchmark: one JSON line a cell, only ever added, in one file per process."""

from __future__ import annotations

import base64
import json
import os
import warnings
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

DENSE = "dense"
ALL = "all"


@dataclass(frozen=True)
class Cell:
    """One thing to measure.

    network: a name of the benchmark, or of the user's own network. importance: a name of `cells.IMPORTANCES`. ratio:
    share of the channels that go, in [0, 1). seed: of the images, synthetic inputs, random scores and k-means. images:
    how many training images the method or the importance sees. group: the one layer whose group is pruned, or `all`.
    """

    network: str
    importance: str
    ratio: float
    method: str
    seed: int
    images: int
    group: str = ALL

    def __str__(self) -> str:
        group = "" if self.group == ALL else f"{self.group}, "
        return f"{self.network}, {group}{self.importance}, {self.ratio:.0%}, {self.method}, seed {self.seed}"


@dataclass(frozen=True)
class Row:
    """What was measured for a cell.

    wrong: bool [N], which test images are classified wrongly, in the order of the split. seconds: for the pruning
    alone. params, macs: of the pruned network, macs for one image. error: what the method raised; the rest then says
    nothing.
    """

    cell: Cell
    wrong: np.ndarray
    seconds: float = 0.0
    params: int = 0
    macs: int = 0
    error: str = ""


def append(path: Path, row: Row) -> None:
    """Add a line to a file and return once it is on the disk; what an interrupted write left there is removed first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    measured: dict[str, Any] = {"error": row.error}
    if not row.error:
        measured = {
            "correct": int((~row.wrong).sum()), "total": len(row.wrong), "seconds": round(row.seconds, 2),
            "params": row.params, "macs": row.macs, "wrong": pack(row.wrong),
        }  # fmt: skip
    with path.open("a+b") as file:
        file.seek(0)
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
        file.write((json.dumps({**asdict(row.cell), **measured}) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> dict[Cell, Row]:
    """The rows of all files of a folder; of several with one cell the last counts, but a result before an error.

    A line that cannot be read, such as the last one of an interrupted write, is left out with a warning that names it.
    """
    rows: dict[Cell, Row] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            try:
                row = _parse(line)
            except (ValueError, KeyError, TypeError, zlib.error) as error:
                message = f"{path}:{number} is damaged ({error}) and left out; its cell counts as not done"
                warnings.warn(message, stacklevel=2)
                continue
            if not row.error or row.cell not in rows or rows[row.cell].error:
                rows[row.cell] = row
    return rows


def pack(bits: np.ndarray) -> str:
    """bool [N] as text, for a line of JSON."""
    return base64.b64encode(zlib.compress(np.packbits(bits).tobytes(), 9)).decode()


def unpack(text: str, count: int) -> np.ndarray:
    """The bool [count] that `pack` made a text of."""
    data = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)
    return np.unpackbits(data, count=count).astype(bool)


def finished(rows: Iterable[Row]) -> set[Cell]:
    """The cells with a result; one whose method raised is tried again."""
    return {row.cell for row in rows if not row.error}


def _parse(line: str) -> Row:
    entry = json.loads(line)
    cell = Cell(**{field.name: entry[field.name] for field in fields(Cell)})
    if "error" in entry:
        return Row(cell, np.zeros(0, dtype=bool), error=entry["error"])
    wrong = unpack(entry["wrong"], entry["total"])
    if int((~wrong).sum()) != entry["correct"]:
        raise ValueError("the images that are wrong do not agree with their number")
    return Row(cell, wrong, entry["seconds"], entry["params"], entry["macs"])
