"""What pruning costs: seconds beside torch-pruning, forward passes of the dense network, and memory.

    python -m benchmarks.cost                                     # every row; an hour on 2 cores
    python -m benchmarks.cost --row vgg16_bn/paper --row resnet50/paper
    INTRAFUSION_DATA=<folder> python -m benchmarks.cost           # trained CIFAR networks instead of random weights

Half of the channels go, in L1 order, all but the classifier's (and in the CIFAR ResNet those within blocks only). Every
row runs in a process of its own, whose command is printed: its peak memory is the row's. Method and torch-pruning take
turns in that process, and the dense network runs there over the same inputs, so that ratios hold on a busy machine too.
"passes" = (seconds - torch-pruning's) / seconds of one dense pass over the inputs that the method reads. Both are given
on the clock and in processor seconds. A finished row is kept in --results and not measured again, unless --again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cost import measure, table
from benchmarks.cost.rows import ROWS


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the rows that are asked for and print the table of all that are there."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--row", choices=ROWS, action="append", metavar="NAME", help=f"one of {', '.join(ROWS)} (may be repeated)")
    add("--results", type=Path, default=Path("runs/cost.jsonl"), help="default %(default)s")
    add("--again", action="store_true", help="measure finished rows again")
    add("--limit", type=float, default=3600, help="seconds after which a row is stopped (default %(default)s)")
    add("--device", default="cpu", help="cpu or cuda")
    add("--threads", type=int, help="of torch (default: its own)")
    add("--here", action="store_true", help="measure one row in this process and print JSON lines")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    names = arguments.row or list(ROWS)
    if arguments.here:
        measure.main(ROWS[names[0]], arguments.device)
        return
    done = read(arguments.results)
    for name in names:
        if name not in done or arguments.again:
            done[name] = _in_own_process(name, arguments)
            arguments.results.parent.mkdir(parents=True, exist_ok=True)
            with arguments.results.open("a") as file:
                file.write(json.dumps(done[name]) + "\n")
    print(table.report(done))


def read(results: Path) -> dict[str, dict[str, Any]]:
    """The last record of every row in a file of results."""
    lines = results.read_text().splitlines() if results.exists() else []
    return {record["row"]: record for record in map(json.loads, lines)}


def _in_own_process(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    options = ["--here", "--row", name, "--device", arguments.device]
    if arguments.threads:
        options += ["--threads", str(arguments.threads)]
    command = ["python", "-m", "benchmarks.cost", *options]
    print(shlex.join(command), flush=True)
    start, stopped, errors = time.perf_counter(), False, ""
    process = subprocess.Popen(
        [sys.executable, *command[1:]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        output, errors = process.communicate(timeout=arguments.limit)
    except subprocess.TimeoutExpired:
        process.kill()
        stopped = True
        output, _ = process.communicate()
    lines = [line for line in output.splitlines() if line.startswith("{")]
    record = json.loads(lines[-1]) if lines else {"row": name, "over": True}
    if record.get("over"):
        took = time.perf_counter() - start
        record["over"] = max(1, round(took)) if stopped else False
        record["error"] = "" if stopped else (errors.strip().splitlines() or ["it ended early"])[-1]
    return record | {"command": shlex.join(command)}


if __name__ == "__main__":
    main()
