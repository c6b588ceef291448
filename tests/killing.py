"""Killing a process that a test has started, at the right moment."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable


def kill_as_soon_as(ready: Callable[[], bool], process: subprocess.Popen, seconds: float = 600) -> None:
    """SIGKILL as soon as ``ready()``; the limit is for what hangs, not for a machine that is busy."""
    deadline = time.monotonic() + seconds
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
