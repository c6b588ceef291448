"""How long a training took that was interrupted and went on in other processes."""

from __future__ import annotations

import json
import time
from pathlib import Path

from intrafusion.lab.files import write_atomic


def times_beside(checkpoint: Path) -> Path:
    """The file that times are kept in; it goes with the checkpoint."""
    return checkpoint.with_suffix(".time.json")


class Stopwatch:
    """Counts from now on, and what earlier processes spent on the same training, as long as its result is in use.

    That is the time until they last wrote ``checkpoint``: what they did after it was lost and is done again. The times
    are kept in a file beside it.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.path = times_beside(checkpoint)
        self.spent = self._earlier(checkpoint)
        self.since = time.time()
        write_atomic(self.path, json.dumps({"spent": self.spent, "since": self.since}))

    def seconds(self) -> float:
        """Wall-clock seconds so far."""
        return self.spent + time.time() - self.since

    def _earlier(self, checkpoint: Path) -> float:
        try:
            written = checkpoint.stat().st_mtime
            known = json.loads(self.path.read_text())
            return float(known["spent"]) + max(0.0, written - float(known["since"]))
        except (OSError, ValueError, KeyError, TypeError):  # a lost time is no reason to lose the training
            return 0.0
