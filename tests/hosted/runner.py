"""Runs a folder of torch-pruning's tests in processes of their own, with its pruners or ours, and takes the time."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import torch
from torchvision import models

_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Run:
    """seconds: of every test, by file and name; failed: first line of what went wrong; pruners: of ours, made.

    total: seconds of processor time of the whole process; some of these files do their work when they are imported.
    """

    seconds: dict[str, float]
    failed: dict[str, str]
    pruners: int
    total: float


def run(folder: Path, ours: bool, names: Sequence[str] = ("test_",)) -> Run:
    """Run the files whose names hold one of `names`, one after the other, on one thread."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.xml")
        _invent_weights(Path(scratch))
        command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull]
        command.append("--continue-on-collection-errors")
        command += [
            f"--rootdir={folder.resolve()}",
            f"--junit-xml={report}",
            *(["-p", "tests.hosted.swap"] * ours),
        ]
        environment = {**os.environ, "PYTHONPATH": str(_ROOT), "TORCH_HOME": scratch}
        environment |= {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
        files = [str(file) for file in sorted(folder.resolve().glob("test_*.py")) if any(n in file.name for n in names)]
        before = _processor_time()
        done = subprocess.run([*command, *files], cwd=scratch, env=environment, capture_output=True, text=True)
        if not report.exists():
            raise RuntimeError(f"pytest did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        made = re.search(r"intrafusion pruners made: (\d+)", done.stdout)
        return _read(report, int(made.group(1)) if made else 0, _processor_time() - before)


def _processor_time() -> float:
    """Seconds that ended child processes have taken; another process on the machine does not change that much."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _invent_weights(home: Path) -> None:
    """Random weights where torchvision keeps those that it has downloaded, for tests that ask for a ResNet-18."""
    folder = home / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    name = models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    torch.save(models.resnet18().state_dict(), folder / name)


def _read(report: Path, pruners: int, total: float) -> Run:
    seconds, failed = {}, {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        seconds[name] = float(case.get("time", 0))
        for problem in [*case.findall("failure"), *case.findall("error")]:
            failed[name] = problem.get("message", "").partition("\n")[0]
    return Run(seconds, failed, pruners, total)


def table(theirs: Run, ours: Run) -> str:
    """Every test with both times, slowest first, and the sums."""
    lines = [f"{'test':70s} {'theirs':>8s} {'ours':>8s}"]
    for name, seconds in sorted(ours.seconds.items(), key=lambda item: -item[1]):
        told = [f"{who}: {run.failed[name]}" for who, run in (("theirs", theirs), ("ours", ours)) if name in run.failed]
        lines.append(f"{name:70s} {theirs.seconds.get(name, 0):8.2f} {seconds:8.2f}  {' | '.join(told)}".rstrip())
    lines.append(
        f"{f'{len(ours.seconds)} tests, {ours.pruners} pruners of ours':70s} {theirs.total:8.2f} {ours.total:8.2f}"
    )
    return "\n".join(lines)
