"""Every example runs as its first lines say, and ends with a smaller network that still recognises digits."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import intrafusion

ROOT = Path(intrafusion.__file__).parent.parent
DENSE, HALF = 28842, 7514


def run(*command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, *command]
    result = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def final_accuracy(output: str) -> float:
    return float(re.findall(rf"{HALF} parameters, accuracy ([\d.]+) %", output)[-1])


def test_plain_pytorch():
    output = run("examples/plain_pytorch.py")
    rows = [line.split() for line in output.splitlines() if re.fullmatch(r" *\d+ +\d+ +[\d.]+ +[\d.]+", line)]
    assert int(rows[0][1]) == DENSE
    assert int(rows[-1][1]) == HALF
    assert float(rows[-1][2]) > 95
    assert float(rows[-1][3]) > 95
    assert output.count("pruned to") == 3


def test_with_lightning():
    pytest.importorskip("lightning", reason="pip install 'intrafusion[lightning]'")
    output = run("examples/with_lightning.py")
    assert f"{DENSE} parameters" in output
    assert output.count("pruned to") == 3
    assert final_accuracy(output) > 85


def test_with_accelerate_in_one_process():
    pytest.importorskip("accelerate", reason="pip install 'intrafusion[accelerate]'")
    output = run("examples/with_accelerate.py")
    assert f"{DENSE} parameters, 1 processes" in output
    assert final_accuracy(output) > 85


@pytest.mark.slow
def test_with_accelerate_in_two_processes():
    pytest.importorskip("accelerate", reason="pip install 'intrafusion[accelerate]'")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    output = run(*launch, "examples/with_accelerate.py")
    assert f"{DENSE} parameters, 2 processes" in output
    assert output.count("pruned to") == 3
    assert "weights equal in all processes: True" in output
    assert final_accuracy(output) > 50
