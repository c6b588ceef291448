"""What the readers of every group see in the dense network: one pass over all batches, before anything is cut.

Rows are chosen on samples of it, at positions spread over all batches: `z` are the channels where they were last mixed
before the reader (pre-activations), `h` what the reader reads, `f` the calls from the one to the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from intrafusion.correct.calls import Call
from intrafusion.correct.tape import Layers, Tape, Visit
from intrafusion.groups.layout import gather, to_channels
from intrafusion.groups.table import GroupTable, Slot
from intrafusion.ot.rows import Samples
from intrafusion.running import evaluating

_PLACES, _VALUES = 16000, 2**22
"""At how many places of an activation the rows of n channels are chosen: at most `_PLACES`, fewer where n channels at
that many places would be more than `_VALUES`, but at least 2 n."""
_MOST_READERS = 4

Run = Callable[[nn.Module, Any], Any]


def visits(
    network: nn.Module, run: Run, batch: Any, layers: dict[str, str], seen: Callable[[Visit], Any] = lambda visit: None
) -> dict[str, int]:
    """How often a forward pass calls each layer, in the order in which the last of its outputs is first read.

    seen: told of every call.
    """
    order: dict[str, int] = {}

    def read(visit: Visit) -> None:
        order[visit.name] = order.pop(visit.name, 0) + 1
        seen(visit)

    tape = Tape(Layers(network, layers), read=read)
    with torch.no_grad(), evaluating(network):
        with tape:
            run(network, batch)
        tape.finish()
    return order


def watch(
    network: nn.Module,
    run: Run,
    batches: Sequence,
    layers: dict[str, str],
    called: Callable[[Tape, Visit], None],
    *,
    follow: bool = False,
    progress: bool = False,
) -> None:
    """One pass over all batches; `called` is told of every call of every layer."""
    found = Layers(network, layers)
    hidden = None if progress else True
    with torch.no_grad(), evaluating(network):
        for batch in tqdm(batches, desc="survey", delay=2, leave=False, disable=hidden):
            tape = Tape(found, follow=follow)
            tape.called = partial(called, tape)
            with tape:
                run(network, batch)
            tape.forget()


class Survey:
    """Samples of what the readers of `tables` see in a network.

    layers, calls: in the order of `visits`, and what that says. lean: what the first layer of a group gives will be
    told to `samples`, and is not kept. sources: whether rows are going to be chosen; otherwise only what is read is
    kept, not what it was made of.
    """

    def __init__(
        self,
        network: nn.Module,
        run: Run,
        batches: Sequence,
        layers: dict[str, str],
        calls: dict[str, int],
        tables: Iterable[GroupTable],
        *,
        lean: bool = False,
        sources: bool = True,
        progress: bool = False,
    ) -> None:
        self._network = network
        self._readers: dict[str, list[_Reader]] = {}
        by_layer: dict[str, list[_Reader]] = {}
        order = list(layers)
        for table in tables:
            first = min(
                (slot.name for slot in table.slots if slot.makes_channels and slot.name in layers),
                key=order.index,
                default="",
            )
            told = first if lean else ""
            mixed = [slot.name for slot in table.slots if slot.makes_channels]
            readers = [
                _Reader(
                    slot,
                    table.n,
                    len(batches) * calls[slot.name],
                    told if calls[slot.name] == 1 else "",
                    mixed,
                    sources,
                )
                for slot in _readers_of(table, order)
            ]
            self._readers[table.name] = readers
            for reader in readers:
                by_layer.setdefault(reader.slot.name, []).append(reader)

        def called(tape: Tape, visit: Visit) -> None:
            for reader in by_layer.get(visit.name, ()):
                reader.see(tape, visit.inputs)

        if by_layer:
            watch(network, run, batches, layers, called, follow=True, progress=progress)

    def makers(self, table: GroupTable) -> set[str]:
        """The layers that the readers of a group see directly."""
        return {name for reader in self._readers.get(table.name, ()) for name in reader.makers if name}

    def readings(self, table: GroupTable) -> list[Reading]:
        """What up to four readers of a group see, in forward order."""
        return [reader.reading(self._network) for reader in self._readers.get(table.name, ())]

    def samples(self, table: GroupTable, maker: str = "", outputs: Sequence[Tensor] = ()) -> list[Samples]:
        """The same to choose rows on; readers that are not understood are left out.

        maker, outputs: what that layer gives in the pruned network, batch by batch: readers that see it directly get
        that in the place of what it gives in the dense network.
        """
        found = []
        for reader in self._readers.get(table.name, ()):
            view = reader.reading(self._network, outputs if maker and reader.makers == {maker} else ())
            if view.understood:
                found.append(samples(view.z, view.h, view.calls, view.reads, movable=view.movable))
        return found

    def forget(self, table: GroupTable) -> None:
        """The group's rows are chosen: its samples are not needed any more."""
        self._readers.pop(table.name, None)


def _readers_of(table: GroupTable, order: list[str]) -> list[Slot]:
    consumers = [slot for slot in table.slots if slot.reads and slot.name in order and slot.chunks == 1]
    return sorted(consumers, key=lambda slot: order.index(slot.name))[:_MOST_READERS]


def _reads(layer: nn.Module, slot: Slot) -> Tensor:
    """[n, d] float64: a reader's weights for each channel of a group."""
    weight: Tensor = layer.weight.detach()  # type: ignore[assignment]
    return gather(to_channels(weight, slot.axis).double(), slot.local.to(weight.device))


@dataclass
class _Reader:
    """What one reader of a group of n channels sees, call by call: z [P, n, ...] and h [P, n].

    Of several calls, those count that see the channels as the first one does.
    """

    slot: Slot
    n: int
    expected: int
    told: str
    mixed: Sequence[str]
    sources: bool = True
    calls: Sequence[Call] = ()
    way: tuple | None = None
    makers: set[str] = field(default_factory=set)
    understood: bool = True
    movable: bool = True
    z: list[Tensor] = field(default_factory=list)
    h: list[Tensor] = field(default_factory=list)
    places: list[tuple[_Window, Tensor]] = field(default_factory=list)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def see(self, tape: Tape, inputs: Tensor) -> None:
        before, chain = tape.trace_back(inputs)
        window = _window(before, inputs, chain, self.slot, self.n) if self.understood else None
        if window is None and self.understood and self.slot.local.shape[1] == 1:  # at least what is read is known
            axis = self.slot.kind.channel_axis % inputs.dim()
            inputs = inputs.index_select(axis, self.slot.local[:, 0].clamp(min=0).to(inputs.device))
            before, chain, self.movable = inputs, (), False
            window = _window(before, inputs, chain, self.slot, self.n)
        if window is None:
            self.understood, self.z, self.h, self.places = False, [], [], []
            return
        way = (window.side, window.flattened, before.dim(), tuple(call.func for call in chain))
        if self.way not in (None, way):
            return
        self.way = way
        share = max(1, min(_PLACES, max(2 * self.n, _VALUES // self.n)) // self.expected)
        chosen = torch.randperm(window.count, generator=self.generator)[:share].to(inputs.device)
        self.calls, maker = chain[:-1] if window.flattened else chain, tape.maker(before)
        self.makers.add(maker)
        self.movable &= tape.mixtures.keeps(before, self.mixed)
        self.places.append((window, chosen))
        self.h.append(window.output(inputs, chosen))
        if not self.sources:
            self.z, self.calls, self.movable = self.h, (), False
        elif not self.told or maker != self.told:
            self.z.append(window.inputs(before, chosen))

    def reading(self, network: nn.Module, outputs: Sequence[Tensor] = ()) -> Reading:
        """outputs: of the maker in the pruned network, or nothing."""
        z = self.z
        if self.h and len(outputs) == len(self.places):
            z = [window.inputs(value, chosen) for value, (window, chosen) in zip(outputs, self.places, strict=True)]
        if not (self.understood and self.h) or len(z) < len(self.h):
            nothing = torch.zeros(0)
            return Reading(nothing, nothing, (), nothing, understood=False)
        reads = _reads(network.get_submodule(self.slot.name), self.slot)
        return Reading(torch.cat(z), torch.cat(self.h), self.calls, reads, movable=self.movable)


@dataclass(frozen=True)
class Reading:
    """What one reader of a group sees: z [P, n, ...], h [P, n], the calls from the one to the other, reads [n, d] its
    weights for each channel. understood: whether this is known at all. movable: whether z is mixed as the group's rows
    are.
    """

    z: Tensor
    h: Tensor
    calls: Sequence[Call]
    reads: Tensor
    understood: bool = True
    movable: bool = True


def samples(z: Tensor, h: Tensor, calls: Sequence[Call], reads: Tensor, *, movable: bool = True) -> Samples:
    """What a group's rows are chosen on; every fourth place judges."""
    precise = torch.promote_types(z.dtype, torch.float32)
    reads = reads.to(z.device, precise)
    held_out = torch.arange(len(z), device=z.device) % 4 == 3
    return Samples(z.to(precise), h.to(precise), _chain(calls), reads @ reads.T / len(reads), held_out, movable)


@dataclass(frozen=True)
class _Window:
    """How one value that a reader reads comes from channels at one place, in a window, or in the whole image.

    axis: of the channels in both tensors. shape: of the places. side: of the window; None for the whole image.
    flattened: whether the reader has the places of one image in one axis with the channels.
    """

    axis: int
    shape: tuple[int, ...]
    side: int | None
    flattened: bool = False

    @property
    def count(self) -> int:
        return torch.Size(self.shape).numel()

    def output(self, value: Tensor, places: Tensor) -> Tensor:
        """[P, n] what is read at some places, numbered in row-major order."""
        if self.flattened and value.dim() == 2:
            value = value.unflatten(1, (-1, *self.shape[1:]))
        return value.movedim(self.axis, -1)[torch.unravel_index(places, self.shape)]

    def inputs(self, value: Tensor, places: Tensor) -> Tensor:
        """[P, n], or [P, n, ...] with the window: what that comes from."""
        if self.side is None:
            return value[places]
        if self.side == 1:
            return self.output(value, places)
        images, rows, columns = torch.unravel_index(places, self.shape)
        inside = torch.arange(self.side, device=value.device)
        down = (rows[:, None] * self.side + inside)[:, :, None]
        right = (columns[:, None] * self.side + inside)[:, None, :]
        return value[images[:, None, None], :, down, right].permute(0, 3, 1, 2)


def _window(z: Tensor, h: Tensor, calls: Sequence[Call], slot: Slot, n: int) -> _Window | None:
    """None if what the reader reads is not understood."""
    copies = slot.local.shape[1]
    axis = slot.kind.channel_axis % z.dim() if z.dim() == h.dim() else 1
    plain = slot.size == n * copies and torch.equal(slot.local, torch.arange(n * copies).reshape(n, copies))
    if not (plain or z is h) or z.dim() < 2 or z.shape[axis] != n:
        return None
    flattened = copies > 1 and h.dim() == 2 < z.dim() and bool(calls) and calls[-1].flattens
    sides = [call.block for call in (calls[:-1] if flattened else calls)]
    if flattened and None not in sides:
        side = math.prod(sides)  # type: ignore[arg-type]
        places = tuple(size // side for size in z.shape[2:])
        known = z.dim() == 4 or side == 1
        return _Window(1, (len(h), *places), side, flattened=True) if known and math.prod(places) == copies else None
    if z.shape == h.shape and copies == 1 and all(side == 1 for side in sides):
        return _Window(axis, tuple(z.movedim(axis, -1).shape[:-1]), 1)
    if axis != 1:
        return None
    if z.dim() == 4 and h.dim() == 4 and all(side is not None for side in sides):
        side = math.prod(sides)  # type: ignore[arg-type]
        shape = (h.shape[0], *h.shape[2:])
        return _Window(1, shape, side) if (z.shape[2] // side, z.shape[3] // side) == shape[1:] else None
    return _Window(1, (h.shape[0],), None) if h.dim() == 2 and copies == 1 else None


def _chain(calls: Sequence[Callable]) -> Callable[[Tensor], Tensor]:
    def f(value: Tensor) -> Tensor:
        for call in calls:
            value = call(value)
        return value.flatten(1)

    return f
