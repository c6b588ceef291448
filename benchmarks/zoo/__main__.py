"""Prune the zoo: every network of torchvision and some of timm and transformers, with random weights, in each preset.

    python -m benchmarks.zoo                                       # every row; hours on one core
    python -m benchmarks.zoo --model 'resnet*' --preset calibrated
    python -m benchmarks.zoo --tables docs/zoo.md --page zoo.html  # measure what is missing, then write both
    python -m benchmarks.zoo --measure none --tables docs/zoo.md   # only write

Half of the channels of every group go, in L1 order, all but those of the layers that make the output. A row is one
network and one preset, in a process of its own that may take --limit seconds of processor time and --memory GB. A
finished row is kept in --results and not measured again, unless --measure says all of them, or those that failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.zoo import table
from benchmarks.zoo.rows import PRESETS, Row, rows

_PATIENCE = 10
"""So many times its processor time a row may take on the clock."""


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the rows that are asked for, and write the tables of all that are there."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.zoo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", action="append", default=[], metavar="PATTERN", help="networks by name (may be repeated)")
    add("--preset", action="append", choices=PRESETS, help="default: all")
    add("--largest", type=float, default=200, help="millions of parameters (default %(default)s)")
    add("--limit", type=float, default=90, help="processor seconds of a row (default %(default)s)")
    add("--memory", type=float, default=8, help="GB of a row (default %(default)s)")
    add("--most", type=int, default=10**6, help="rows to measure in this run (default: all)")
    add("--results", type=Path, default=Path("runs/zoo.jsonl"), help="default %(default)s")
    add("--measure", choices=("missing", "failed", "all", "none"), default="missing", help="default %(default)s")
    add("--tables", type=Path, help="write Markdown")
    add("--page", type=Path, help="write a page")
    arguments = parser.parse_args(argv)
    done = read(arguments.results)
    asked = rows(arguments.model, arguments.preset or PRESETS, arguments.largest)
    missing = [row for row in asked if wanted(arguments.measure, done.get(row.name))]
    for row in missing[: arguments.most]:
        done[row.name] = _already_known(row, done) or _measured(row, arguments.limit, arguments.memory)
        _append(arguments.results, done[row.name])
        print(table.line(done[row.name]), flush=True)
    for path, text in ((arguments.tables, table.markdown), (arguments.page, table.page)):
        if path:
            path.write_text(text(done), encoding="utf-8")
    if not (arguments.tables or arguments.page):
        print(table.summary(done))


def read(results: Path) -> dict[str, dict[str, Any]]:
    """The last record of every row in a file of results; a line that was cut off counts as none."""
    found = {}
    for line in results.read_text().splitlines() if results.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[record["row"]] = record
    return found


def _already_known(row: Row, done: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The record of a row whose network was too much, in another preset, for what comes before any preset matters."""
    for record in done.values():
        if record["model"] == row.entry.name and record.get("stopped") and record.get("stage") in ("build", "output"):
            return record | {"row": row.name, "preset": row.preset}
    return None


def _append(results: Path, record: dict[str, Any]) -> None:
    """Add a record to a file of results, whose last line may have been cut off."""
    results.parent.mkdir(parents=True, exist_ok=True)
    whole = not results.exists() or results.read_text().endswith("\n") or not results.stat().st_size
    with results.open("a") as file:
        file.write(("" if whole else "\n") + json.dumps(record) + "\n")


def wanted(measure: str, record: dict[str, Any] | None) -> bool:
    """Is a row to be measured (again)?"""
    if measure in ("all", "none"):
        return measure == "all"
    return record is None or (measure == "failed" and not table.is_sound(record))


def _measured(row: Row, limit: float, memory: float) -> dict[str, Any]:
    """The record of a row, measured in a fork of this process, which has loaded torch but nothing that prunes."""
    start = time.time()
    known: dict[str, Any] = {"row": row.name, "model": row.entry.name, "preset": row.preset, "errors": {}}
    if row.entry.missing:
        return known | {"skipped": row.entry.missing}
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(row, limit, memory, sender))
    process.start()
    sender.close()
    deadline, stopped = start + _PATIENCE * limit, ""
    while True:
        if not receiver.poll(max(0.0, deadline - time.time())):
            stopped = f"stopped after {_PATIENCE * limit:.0f} s"
            process.kill()
            break
        try:
            known = receiver.recv()
        except EOFError:
            break
    process.join()
    known["took"] = round(time.time() - start, 1)
    if process.exitcode == -signal.SIGXCPU:
        stopped = f"stopped after {limit:.0f} s of processor time"
    elif process.exitcode and not stopped:
        stopped = f"the process ended with exit code {process.exitcode}"
    if stopped:
        known = known | {"stopped": f"{stopped}, in stage {known.get('stage', 'start')!r}"}
    return known | {"commit": _commit()}


def _child(row: Row, limit: float, memory: float, sender: Any) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))
    resource.setrlimit(resource.RLIMIT_AS, (int(memory * 1e9),) * 2)
    import torch

    from benchmarks.zoo.measure import Measurement

    torch.set_num_threads(1)
    sender.send(Measurement(row, sender.send).measure())
    sender.close()


def _commit() -> str:
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return asked.stdout.strip()


if __name__ == "__main__":
    main()
