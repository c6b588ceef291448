# ruff: noqa: T201
"""`python -m tests.hosted <folder of torch-pruning's tests> [parts of file names]`: both runs, beside each other."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.hosted.runner import run, table

folder, names = Path(sys.argv[1]), sys.argv[2:] or ["test_"]
theirs, ours = run(folder, ours=False, names=names), run(folder, ours=True, names=names)
print(table(theirs, ours))
sys.exit(bool(ours.failed.keys() - theirs.failed.keys()) or ours.total > 3 * theirs.total)
