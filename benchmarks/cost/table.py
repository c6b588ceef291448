"""The records of rows as Markdown."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks.cost.rows import ROWS, TORCH_PRUNING

_HEADER = (
    "network", "method", "s", "processor s", "x torch-pruning", "x torch-pruning, processor", "inputs", "s per pass",
    "passes", "passes, processor", "peak GB", "x torch-pruning's peak", "s per layer", "x chain-10",
)  # fmt: skip


def report(records: dict[str, dict[str, Any]]) -> str:
    """One line for every row that was measured, in the order of the benchmark."""
    lines = ["| " + " | ".join(_HEADER) + " |", "|" + "---|" * 2 + "---:|" * (len(_HEADER) - 2)]
    for name in ROWS:
        if name in records:
            lines.append("| " + " | ".join(_cells(name, records)) + " |")
    return "\n".join(lines)


def _cells(name: str, records: dict[str, dict[str, Any]]) -> list[str]:
    record, row = records[name], ROWS[name]
    if record.get("error"):
        return [row.network, row.method, record["error"], *[""] * (len(_HEADER) - 3)]
    over, seconds = record.get("over"), record.get("seconds", [])
    more = "> " if over and not seconds else ""
    taken = seconds or ([[over, None]] if over else [])
    wall, cpu = _middle(taken, 0), _middle(taken, 1)
    ratios = [_middle(_quotients(taken, record.get("reference", [])), at) for at in (0, 1)]
    one_pass, reference = record.get("passes", []), record.get("reference", [])
    passes = [
        _difference(_middle(taken, at), _middle(reference, at), _middle(one_pass, at)) if one_pass else None
        for at in (0, 1)
    ]
    peak = record.get("peak_gb")
    plain = records.get(f"{row.network}/{TORCH_PRUNING}", {}).get("peak_gb")
    layers = wall / row.layers if row.layers and wall else None
    first = records.get("chain-10/calibrated", {}).get("seconds") if row.layers else None
    shortest = _middle(first, 0) / 10 if first else None
    return [
        row.network, row.method, _number(wall, more), _number(cpu), _number(ratios[0], more), _number(ratios[1]),
        str(record.get("inputs") or ""), _number(_middle(one_pass, 0)), more * (passes[0] is not None) +
        _number(passes[0]), _number(passes[1]), _number(peak), _number(peak / plain if peak and plain else None),
        _number(layers, more), _number(layers / shortest if layers and shortest else None, more),
    ]  # fmt: skip


def _quotients(taken: list, reference: list) -> list[list[float | None]]:
    """Turn by turn."""
    pairs = zip(taken, reference, strict=False)
    return [[a / b if a is not None else None for a, b in zip(one, other, strict=True)] for one, other in pairs]


def _middle(values: list, at: int) -> float | None:
    known = [value[at] for value in values if value[at] is not None]
    return median(known) if known else None


def _difference(whole: float | None, part: float | None, unit: float | None) -> float | None:
    return None if whole is None or part is None or not unit else (whole - part) / unit


def _number(value: float | None, more: str = "") -> str:
    """Three digits; more: "> " before a number that is only known to be larger."""
    if value is None:
        return ""
    return more + (f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}")
