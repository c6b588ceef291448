"""Forward passes of a network of which little changes from one to the next: what is known is not computed again.

A network is corrected layer by layer, and for every layer it is run up to there. What lies before that layer is as it
was the last time. A memo recognises this call by call, from the tensors that a call reads and that no other call of
the same pass has made (weights, statistics, inputs): as long as all of them are the same, unchanged, the outputs of
convolutions and matrix products are those of the last pass, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_KEPT = frozenset({"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear",
                   "matmul", "__matmul__", "bmm", "baddbmm", "addmm", "scaled_dot_product_attention"})  # fmt: skip
_MOST_BYTES = 2**31
_ESCAPES = frozenset({"numpy", "__array__", "__dlpack__", "data_ptr", "untyped_storage", "storage"})
_DATA = Tensor.data  # the attribute itself


class Room:
    """How many bytes of outputs may still be kept, by all memos that share it."""

    def __init__(self, most: int = _MOST_BYTES) -> None:
        self.left = most


@dataclass(frozen=True)
class _Leaf:
    """A tensor that no call of the pass has made, as it was. It is held, so that its memory is not another's later."""

    tensor: Tensor
    values: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Leaf:
        untracked = tensor.is_inference() or tensor.layout != torch.strided  # has no version, or no one address
        return cls(tensor, tensor.detach(), -1 if untracked else tensor._version)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Leaf)
            and self.tensor is other.tensor
            and self.version == other.version >= 0
            and self.values.data_ptr() == other.values.data_ptr()
            and self.values.shape == other.values.shape
            and self.values.stride() == other.values.stride()
        )

    __hash__ = None  # type: ignore[assignment]


@dataclass
class _Record:
    """One call: the function, what it was given, and what it gave if that is kept and was not overwritten since."""

    func: Callable
    given: list
    output: _Leaf | None = None


class Memo:
    """The calls of one network on one batch, in order, and the outputs of the expensive ones.

    A function that is not called through torch (an autograd function of one's own) gives a tensor that no pass has seen
    before: from there on everything is computed, as without a memo.
    """

    def __init__(self, room: Room) -> None:
        self._room, self._records = room, list[_Record]()
        self._made: dict[int, tuple[Tensor, int]] = {}
        self._next = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """One pass, to its end or to where it is broken off."""
        self._made, self._next = {}, 0
        try:
            yield
        finally:
            self._made = {}

    def call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """What func(*args, **kwargs) gives."""
        if _escapes(func) and id(args[0]) in self._made:
            self._give_up()
        record = _Record(func, [self._seen(value) for value in _flat((args, kwargs))])
        if self._next < len(self._records):
            last = self._records[self._next]
            if last.func == record.func and last.given == record.given:
                record = last
            else:
                self._forget()
        if self._next == len(self._records):
            self._records.append(record)
        if record.output is not None and record.output == _Leaf.of(record.output.tensor):
            out = record.output.tensor
        else:
            out = func(*args, **kwargs)
            self._keep(record, out)
        for value in _flat(out):
            if isinstance(value, Tensor):
                self._made[id(value)] = (value, self._next)
        self._next += 1
        return out

    def spare(self, value: Tensor) -> None:
        """What is going to be overwritten: if it is kept, a copy is kept in its place."""
        made = self._made.get(id(value))
        record = self._records[made[1]] if made is not None else None
        if record is not None and record.output == _Leaf.of(value):
            record.output = _Leaf.of(value.clone(memory_format=torch.preserve_format))

    def _seen(self, value: Any) -> Any:
        """What stands for an argument: equal if and only if it is the same as in another pass."""
        if not isinstance(value, Tensor):
            return value if isinstance(value, (bool, int, float, str, type(None))) else _Same(value)
        made = self._made.get(id(value))
        return _Leaf.of(value) if made is None else ("made by call", made[1])

    def _keep(self, record: _Record, out: Any) -> None:
        self._let_go(record)
        if isinstance(out, Tensor) and getattr(record.func, "__name__", "") in _KEPT and _bytes(out) <= self._room.left:
            self._room.left -= _bytes(out)
            record.output = _Leaf.of(out)

    def _let_go(self, record: _Record) -> None:
        if record.output is not None:
            self._room.left += _bytes(record.output.tensor)
            record.output = None

    def _forget(self) -> None:
        """Drop the outputs of the present call and all that follow."""
        for record in self._records[self._next :]:
            self._let_go(record)
        del self._records[self._next :]

    def _give_up(self) -> None:
        """Keep nothing any more."""
        for record in self._records:
            self._let_go(record)
        self._room = Room(0)


def _escapes(func: Callable) -> bool:
    """Whether values may be changed through what a call gives without torch's noticing."""
    return getattr(func, "__name__", "") in _ESCAPES or getattr(func, "__self__", None) is _DATA


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


@dataclass(frozen=True)
class _Same:
    """Any object, equal to itself alone, or to what says that it is equal (a dtype, a size, a device)."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and (
            self.value is other.value
            or (isinstance(self.value, (torch.dtype, torch.device, slice, range)) and self.value == other.value)
        )

    __hash__ = None  # type: ignore[assignment]


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _flat(part)
    elif isinstance(value, dict):
        for key, part in value.items():
            yield key
            yield from _flat(part)
    else:
        yield value
