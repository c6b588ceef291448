# ruff: noqa: T201
"""The whole sweep, resumable.

python -m tests.sweep --count 500 --from 0           # go on where the last run stopped, then print the summary
python -m tests.sweep --failing                      # run again what was wrong, with the code of now
python -m tests.sweep --seeds 3,17 --presets paper   # these, again
python -m tests.sweep --show 17                      # the code of a network
"""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path

import torch

from tests.sweep.checks import PARTS, PRESETS, Row, check
from tests.sweep.generator import draw
from tests.sweep.shrink import shrink
from tests.sweep.summary import append, read, summary


def main(arguments: list[str] | None = None) -> int:
    """Returns how many rows are wrong, at most 1."""
    asked = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    if asked.show is not None:
        print(draw(asked.show))
        return 0
    if asked.shrink is not None:
        print(*shrink(draw(asked.shrink), asked.presets.split(",")[0], asked.parts.split(",")), sep="\n")
        return 0
    rows = read(asked.out)
    for seed, preset in _wanted(asked, rows):
        row = _row(seed, preset, asked.parts.split(","))
        rows[seed, preset] = row
        append(asked.out, row)
        faults = ", ".join(row.faults())
        print(f"seed {seed} {preset}: {faults or 'right'} ({row.seconds} s)", flush=True)
        if faults and asked.verbose:
            print(row)
    print(summary(list(rows.values())))
    return int(any(row.faults() for row in rows.values()))


def _row(seed: int, preset: str, parts: list[str]) -> Row:
    try:
        return check(draw(seed), preset, parts)
    except Exception:  # a mistake of the sweep's own must not end it
        return Row(seed, preset, error=traceback.format_exc(limit=-3), named=False, where="tests/sweep")


def _wanted(asked: argparse.Namespace, rows: dict[tuple[int, str], Row]) -> list[tuple[int, str]]:
    presets = asked.presets.split(",")
    if asked.failing:
        return [key for key, row in rows.items() if row.faults() and key[1] in presets]
    if asked.seeds:
        return [(int(seed), preset) for seed in asked.seeds.split(",") for preset in presets]
    wanted = [(seed, preset) for seed in range(asked.start, asked.start + asked.count) for preset in presets]
    return [key for key in wanted if key not in rows]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("tests.sweep", description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--from", type=int, default=0, dest="start")
    parser.add_argument("--presets", default=",".join(PRESETS))
    parser.add_argument("--parts", default=",".join(PARTS), help="what is checked; a step always is")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep.jsonl"))
    parser.add_argument("--seeds", help="these, again: 3,17")
    parser.add_argument("--failing", action="store_true", help="run again what was wrong")
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--show", type=int, help="print the code of this network, and nothing else")
    parser.add_argument("--shrink", type=int, help="print a smaller network with the fault of this one, nothing else")
    return parser


if __name__ == "__main__":
    sys.exit(main())
