"""Folders that appear only when they are complete, and where the cache lies."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from intrafusion.files import write_atomic

__all__ = ["cache_folder", "new_folder", "write_atomic"]


def cache_folder() -> Path:
    """Where unpacked archives and decoded images are kept: ``$INTRAFUSION_CACHE`` or ``~/.cache/intrafusion``."""
    chosen = os.environ.get("INTRAFUSION_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "intrafusion"


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` when the block ends without an error.

    If another process finished the same folder first, its result is kept and ours is thrown away.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        try:
            os.rename(temporary, path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        if temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)
