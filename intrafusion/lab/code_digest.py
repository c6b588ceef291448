"""Which code a result depends on, so that a stale one is never taken for a new one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

PRUNING_CODE = (
    "ot", "running", "groups", "correct", "history", "methods", "prune", "models.py", "lab/pruning.py",
    "lab/measure.py", "lab/models.py",
)  # fmt: skip
TRAINING_CODE = (
    "training/loop.py", "training/seeds.py", "training/settings.py", "training/state.py", "training/processes.py",
    "training/noise_scale.py", "training/finetuning.py", "lab/training.py", "lab/data/augmentation.py",
)  # fmt: skip


def code_digest(names: Sequence[str] = PRUNING_CODE) -> str:
    """Changes with every edit of the code a result depends on, so that a stale result is never taken for a new one."""
    package = Path(__file__).resolve().parent.parent
    total = hashlib.sha256(metadata.version("torch-pruning").encode())
    for name in names:
        path = package / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            total.update(file.read_bytes())
    return total.hexdigest()[:16]
