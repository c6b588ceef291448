"""The ratio that leaves a wanted share of a network's operations or parameters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from intrafusion.lab.errors import LabError
from intrafusion.lab.files import write_atomic

TOLERANCE = 0.02
_STEPS = 12


class UnreachableTarget(LabError):
    """No ratio leaves the wanted share of the network."""


def find_ratio(left: Callable[[float], float], wanted: float) -> float:
    """The best of the ratios that bisecting [0, 1) looks at.

    Args:
        left: the share that a ratio leaves, in [0, 1]; it does not rise with the ratio.
        wanted: the share that is to be left, in (0, 1).

    Raises:
        UnreachableTarget: the best is more than ``TOLERANCE`` of the wanted share away from it.
    """
    low, high = 0.0, 1.0
    tried: list[tuple[float, float, float]] = []
    for _ in range(_STEPS):
        ratio = (low + high) / 2
        share = left(ratio)
        tried.append((abs(share - wanted), ratio, share))
        low, high = (ratio, high) if share > wanted else (low, ratio)
    error, ratio, share = min(tried)
    if error > TOLERANCE * wanted:
        raise UnreachableTarget(
            f"{wanted:g} cannot be met within {TOLERANCE:.0%}: the nearest is {share:.4f}, at ratio {ratio:.4f}; "
            "what is left falls in steps of whole channels (or of round_to), and layers that are ignored stay"
        )
    return ratio


def measured_once(search: Callable[[], float], path: Path, key: str) -> float:
    """A ratio found by measuring stays, in a file: found again it would be another, and so would every cell."""
    known = json.loads(path.read_text()) if path.is_file() else {}
    if known.get("key") != key:
        known = {"key": key, "ratio": search()}
        write_atomic(path, json.dumps(known))
    return known["ratio"]
