"""The results of a run, one line each, in a file that survives being interrupted."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from intrafusion.lab.errors import LabError
from intrafusion.lab.measure import Accuracy, Latency
from intrafusion.training.noise_scale import NoiseHistory

Method = Literal["dense", "discard", "fused"]
Stage = Literal["pruned", "finetuned"]


@dataclass(frozen=True)
class Cell:
    """One thing to measure: a method, a ratio in [0, 1), and a group's name or ``"all"``; as pruned, or fine-tuned."""

    method: Method
    ratio: float
    group: str
    stage: Stage = "pruned"
    seed: int | None = None

    def plain(self) -> dict[str, Any]:
        """What the cell is, in plain values; only a fine-tuned one has a stage and a seed."""
        return {name: value for name, value in asdict(self).items() if value not in ("pruned", None)}


@dataclass(frozen=True)
class Curve:
    """How a network was fine-tuned.

    losses: mean training loss of epochs 1, 2, ...; validation: per cent, from epoch 0 (before the first step) on;
    best: the epoch that was chosen on them; test: ``(epoch, correct)`` for the epochs that were to be reported; noise:
    of the gradient, ``None`` on older lines.
    """

    losses: tuple[float, ...]
    validation: tuple[float, ...]
    best: int
    test: tuple[tuple[int, int], ...] = ()
    noise: NoiseHistory | None = None


@dataclass(frozen=True)
class GroupLine:
    """What happened to one group.

    cost: ``None`` where nothing was transported; plan: see :class:`intrafusion.prune.report.GroupReport`.
    """

    name: str
    before: int
    after: int
    cost: float | None
    merged: str
    reason: str
    plan: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Result:
    """What was measured for a cell; older lines lack what has a default.

    kept: digest of the removed channels; seconds: of pruning and evaluating; top5: images whose label is among the five
    largest logits, ``None`` for five classes or fewer; size: bytes on disk; memory: bytes of a forward pass on a GPU;
    latency: one entry per batch size, none for a discarded network, whose shapes are the fused one's, nor after
    fine-tuning, which changes no shape; curve: of a fine-tuned network, whose accuracy is that of its best epoch.
    """

    cell: Cell
    correct: int
    total: int
    params: int
    macs: int
    kept: str = ""
    groups: tuple[GroupLine, ...] = ()
    seconds: float = 0.0
    top5: int | None = None
    size: int | None = None
    memory: int | None = None
    latency: tuple[Latency, ...] = ()
    curve: Curve | None = None

    @property
    def accuracy(self) -> Accuracy:
        """Correct and total as one value."""
        return Accuracy(self.correct, self.total)

    @property
    def top5_accuracy(self) -> Accuracy | None:
        """The same for the five largest logits, where it was measured."""
        return None if self.top5 is None else Accuracy(self.top5, self.total)


Kept = TypeVar("Kept")


class LineStore(Generic[Kept]):
    """A file of JSON lines: lines are only ever added, each is on the disk before the next thing is computed.

    A last line without its line break is what an interrupted write leaves: it is removed and what it stood for
    computed again. Of several lines with one key the last counts.

    Args:
        read: makes a result of a line's plain values. plain: the reverse.

    Raises:
        LabError: a line before the last cannot be read.
    """

    def __init__(
        self, path: Path, read: Callable[[dict[str, Any]], Kept], plain: Callable[[Kept], dict[str, Any]]
    ) -> None:
        self.path = path
        self._read, self._plain = read, plain
        self._results: dict[str, Kept] = {}
        if path.exists():
            self._load()

    def get(self, key: str) -> Kept | None:
        """The result stored under a key, if there is one."""
        return self._results.get(key)

    def forget(self) -> None:
        """Treat every stored result as not there; the lines stay in the file."""
        self._results.clear()

    def add(self, key: str, result: Kept, identity: dict[str, Any]) -> None:
        """Append a line with everything the key was made from; returns once it is on the disk."""
        line = {"key": key, **self._plain(result), "identity": identity}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            _write_all(handle, (json.dumps(finite(line), allow_nan=False) + "\n").encode())
            os.fsync(handle)
        finally:
            os.close(handle)
        self._results[key] = result

    def _load(self) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self.path, whole)
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                entry = json.loads(line)
                self._results[entry["key"]] = self._read(entry)
            except (ValueError, KeyError, TypeError) as error:
                raise LabError(
                    f"{self.path}:{number} cannot be read ({type(error).__name__}: {error}); "
                    "remove that line to compute its cell again"
                ) from None


class ResultStore(LineStore[Result]):
    """``results.jsonl`` of a run: one :class:`Result` a line."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, _result, lambda result: {**asdict(result), "cell": result.cell.plain()})


def key_of_identity(identity: dict[str, Any]) -> str:
    """Sixteen hexadecimal digits of plain, nested values; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def _result(entry: dict[str, Any]) -> Result:
    return Result(
        Cell(**entry["cell"]),
        *(int(entry[name]) for name in ("correct", "total", "params", "macs")),
        kept=entry["kept"],
        groups=tuple(_group_line(group) for group in entry["groups"]),
        seconds=float(entry["seconds"]),
        **{name: entry.get(name) for name in ("top5", "size", "memory")},
        latency=tuple(Latency(**timing) for timing in entry.get("latency", ())),
        curve=_curve(entry["curve"]) if entry.get("curve") else None,
    )


def _curve(entry: dict[str, Any]) -> Curve:
    test = tuple((epoch, correct) for epoch, correct in entry["test"])
    noise = NoiseHistory.from_plain(entry["noise"]) if entry.get("noise") else None
    return Curve(tuple(entry["losses"]), tuple(entry["validation"]), entry["best"], test, noise)


def _group_line(group: dict[str, Any]) -> GroupLine:
    return GroupLine(**{**group, "plan": tuple((target, share) for target, share in group.get("plan", ()))})


def _write_all(handle: int, data: bytes) -> None:
    while data:
        data = data[os.write(handle, data) :]


def finite(value: Any) -> Any:
    """The same without nan and infinity, which JSON does not know: they become null."""
    if isinstance(value, dict):
        return {key: finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [finite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
