"""Activations beyond a bound lie in files: of the passes that stand somewhere, only as many are in memory as fit.

A pass that stands holds tensors in its frames. To park it, the bytes behind each of them are written to a file and
given back; the tensors stay where they are, empty, until the pass is needed again.
"""

from __future__ import annotations

import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Live:
    """The tensors that one pass has made and still holds."""

    def __init__(self) -> None:
        self._made: dict[int, weakref.ref[Tensor]] = {}
        self._files: list[tuple[torch.UntypedStorage, int, Path]] = []

    def add(self, value: Any) -> None:
        """A call has given this."""
        if isinstance(value, Tensor):
            key = id(value)
            self._made[key] = weakref.ref(value, lambda _, key=key: self._made.pop(key, None))
        elif isinstance(value, (tuple, list)):
            for part in value:
                self.add(part)

    def storages(self, foreign: set[int]) -> list[torch.UntypedStorage]:
        """What they lie in, each once. foreign: addresses of what belongs to the network or the inputs."""
        found: dict[int, torch.UntypedStorage] = {}
        for reference in list(self._made.values()):
            value = reference()
            if value is None or value.layout != torch.strided:
                continue
            storage = value.untyped_storage()
            if storage.nbytes() and storage.resizable() and storage.data_ptr() not in foreign:
                found[storage.data_ptr()] = storage
        return list(found.values())

    def park(self, foreign: set[int], folder: Path) -> None:
        """Write everything to files and give the memory back."""
        for storage in self.storages(foreign):
            path = folder / f"{id(self)}-{len(self._files)}"
            size = storage.nbytes()
            _file(path, size).copy_(_bytes(storage))
            storage.resize_(0)
            self._files.append((storage, size, path))

    def fetch(self) -> None:
        """Bring everything back."""
        for storage, size, path in self._files:
            storage.resize_(size)
            _bytes(storage).copy_(_file(path, size))
            path.unlink()
        self._files = []


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]


def _file(path: Path, size: int) -> Tensor:
    """A file as bytes, made if it is not there."""
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)


class Parking:
    """Keeps what several passes hold below `most` bytes (None: whatever it takes), the least lately used in files.

    The passes of one batch are always in memory together, however much they hold.
    """

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._awake: OrderedDict[Live, int] = OrderedDict()
        self._folder: tempfile.TemporaryDirectory | None = None

    def wake(self, lives: Sequence[Live], foreign: Iterable[Tensor]) -> None:
        """These are needed now, together."""
        if self._most is None:
            return
        addresses = {tensor.untyped_storage().data_ptr() for tensor in foreign if tensor.layout == torch.strided}
        for live in lives:
            live.fetch()
            self._awake[live] = sum(storage.nbytes() for storage in live.storages(addresses))
            self._awake.move_to_end(live)
        while len(self._awake) > len(lives) and sum(self._awake.values()) > self._most:
            oldest, _ = self._awake.popitem(last=False)
            oldest.park(addresses, self._place())

    def forget(self, live: Live) -> None:
        """Its pass is over."""
        self._awake.pop(live, None)

    def close(self) -> None:
        """Remove the files."""
        self._awake.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _place(self) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="intrafusion-")
        return Path(self._folder.name)
