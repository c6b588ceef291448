"""The file that an interrupted training goes on from."""

from __future__ import annotations

import hashlib
import io
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.files import write_atomic

_SLOW, _SHARE = 0.1, 10


class TrainingFile:
    """One training's state on the disk, written in one step and read without running any code in it.

    Where a write takes long, the next ones are left out until ten times as long was spent training.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self._due = 0.0

    def read(self) -> dict[str, Any] | None:
        """The state, or ``None`` if there is no file, it belongs to another training, or (a warning) it is broken."""
        if not self.path.is_file():
            return None
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
            return content["state"] if content["key"] == self.key else None
        except Exception as error:  # a damaged file fails in many ways: zip, pickle, storage sizes, missing keys
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            warnings.warn(f"{self.path} is damaged ({reason}): training starts over", stacklevel=3)
            return None

    def write(self, state: Callable[[], Mapping[str, Any]], *, last: bool = False) -> None:
        """Replace the file with ``state()``; ``last`` writes in any case.

        Raises:
            OSError: the folder cannot be written.
        """
        start = time.monotonic()
        if start < self._due and not last:
            return
        buffer = io.BytesIO()
        torch.save({"key": self.key, "state": dict(state())}, buffer)
        write_atomic(self.path, buffer.getvalue())
        took = time.monotonic() - start
        self._due = start + (_SHARE * took if took > _SLOW else 0.0)


def copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of its own, on the CPU."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}


def digest(model: nn.Module, extra: str) -> str:
    """Sixteen hexadecimal digits of every tensor of a network and of ``extra``."""
    total = hashlib.sha256(extra.encode())
    for name, tensor in model.state_dict().items():
        total.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]
