"""Several networks walk through their layers together, on all batches at once: one forward pass for a whole correction.

All networks but the last are references and are never changed; the last one is corrected. The walk stops at one layer
after the other, in the order of the forward pass. While it stands, the layer's inputs and outputs are known for every
network and batch, and the corrected network's layer may be refitted and its group cut; what it then gives is what the
rest of the pass reads. Nothing that lies behind is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.correct.parking import Live, Parking
from intrafusion.correct.passes import Pass
from intrafusion.correct.tape import Layers, Tape, Visit
from intrafusion.groups.kinds.filters import PLAIN, Geometry
from intrafusion.running import evaluating, leaves


@dataclass(frozen=True)
class Sight:
    """One layer in one forward pass.

    inputs: what the layer read. output: what the layer, with the batch-norm that belongs to it, gave. other: what is
    added to the output next, if anything. geometry: how a convolution read its input.
    """

    inputs: Tensor
    output: Tensor
    other: Tensor | None
    geometry: Geometry = PLAIN


class ByBatch(Sequence):
    """Something for every batch, made when it is asked for. Look at one batch at a time: the one before may be in a
    file by then.
    """

    def __init__(self, count: int, of: Callable[[int], Any]) -> None:
        self._count, self._of = count, of

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < self._count:
            raise IndexError(number)
        return self._of(number)


class Walk:
    """networks: in eval mode while it walks; the last one is corrected. run: calls a network on one batch of inputs.
    layers: the layers where the walk stops, in the order of the forward pass, each with its batch-norm's name or ''.
    memory: how many bytes of activations may be held; what is beyond lies in files.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        run: Callable[[nn.Module, Any], Any],
        batches: Sequence,
        layers: dict[str, str],
        calls: Mapping[str, int] | None = None,
        memory: int | None = None,
    ) -> None:
        self._networks, self._run, self._batches = list(networks), run, batches
        self._turn = {name: number for number, name in enumerate(layers)}
        self._calls = dict.fromkeys(layers, 1) | dict(calls or {})
        self._layers = [Layers(network, layers) for network in networks]
        self._parking = Parking(memory)
        self._at = -1
        numbers = range(len(self._networks))
        self._passes = [[self._stopped(n, number) for n in numbers] for number in range(len(self._batches))]

    @property
    def name(self) -> str | None:
        """The layer where the walk stands; None at its end, and before its start."""
        names = list(self._turn)
        return names[self._at] if 0 <= self._at < len(names) else None

    @property
    def is_at_last(self) -> bool:
        """Does it stand at the last layer, or behind it?"""
        return self._at >= len(self._turn) - 1

    def stands_before(self, name: str) -> bool:
        """Has the walk still to come to a layer?"""
        return self._turn[name] > self._at

    def advance(self) -> str | None:
        """Leave the present layer and go on to the next; None at the end."""
        self._at = min(self._at + 1, len(self._turn))
        with evaluating(*self._networks):
            for passes in self._passes:
                for one in passes:
                    try:
                        self._move(one)
                    except Exception:  # it may hold sizes from before a cut: a pass from the start holds none
                        if one is not passes[-1] or not one.resumed:
                            raise
                        self._rejoin(passes)
        self._layers[-1].forget_renewed()
        return self.name

    def sights(self, *, present: bool = False) -> Sequence[tuple[Sight, ...]]:
        """What every network has seen at the present layer, for every batch that reaches it, and every call of it.

        present: the corrected network's output as its layer is now, not as it was when the walk came here.
        """
        if self._is_shared:
            return self._all_calls()
        reached = self._reached()

        def of(number: int) -> tuple[Sight, ...]:
            passes = self._passes[reached[number]]
            self._wake([one.live for one in passes])
            sights = [one.sight() for one in passes]
            if present:
                sights[-1] = replace(sights[-1], output=self._present(passes))
            return tuple(sights)

        return ByBatch(len(reached), of)

    def outputs(self) -> Sequence[Tensor]:
        """What the corrected network's present layer gives as it is now, batch by batch and call by call."""
        if self._is_shared:
            seen = self._all_calls()
            return ByBatch(len(seen), lambda number: seen[number][-1].output)
        reached = self._reached()
        return ByBatch(len(reached), lambda number: self._present(self._passes[reached[number]]))

    def changed(self, *, rejoin: bool = False) -> None:
        """The corrected network has other tensors now.

        rejoin: the pass has read some of them already: it starts again and comes back to the present layer.
        """
        self._layers[-1].refresh()
        if rejoin:
            with evaluating(self._networks[-1]):
                for passes in self._passes:
                    self._rejoin(passes)

    def close(self) -> None:
        """End all passes; what they hold is free."""
        for passes in self._passes:
            for one in passes:
                one.close()
        self._passes = []
        self._parking.close()

    @property
    def _is_shared(self) -> bool:
        return self.name is not None and self._calls[self.name] > 1

    def _all_calls(self) -> Sequence[tuple[Sight, ...]]:
        """Of the present layer, in the networks as they are now."""
        name, found = self.name, []
        for batch in self._batches:
            live = Live()
            each = [
                _calls_of(name or "", partial(self._run, network, batch), layers, live)
                for network, layers in zip(self._networks, self._layers, strict=True)
            ]
            self._wake([live])
            if len({len(sights) for sights in each}) == 1:
                found += [(live, sights) for sights in zip(*each, strict=True)]

        def of(number: int) -> tuple[Sight, ...]:
            live, sights = found[number]
            self._wake([live])
            return sights

        return ByBatch(len(found), of)

    def _reached(self) -> list[int]:
        return [number for number, passes in enumerate(self._passes) if all(one.stands(self._at) for one in passes)]

    def _present(self, passes: Sequence[_Stopped]) -> Tensor:
        self._wake([one.live for one in passes])
        with evaluating(self._networks[-1]):
            return passes[-1].present()

    def _move(self, one: _Stopped) -> None:
        self._wake([one.live])
        one.to(self._at)
        self._wake([one.live])

    def _wake(self, lives: Sequence[Live]) -> None:
        foreign = (value for value in leaves(self._batches) if isinstance(value, Tensor))
        owned = (tensor for network in self._networks for tensor in (*network.parameters(), *network.buffers()))
        self._parking.wake(lives, chain(foreign, owned))

    def _rejoin(self, passes: list[_Stopped]) -> None:
        self._parking.forget(passes[-1].live)
        passes[-1].close()
        passes[-1] = self._stopped(len(self._networks) - 1, self._passes.index(passes))
        self._move(passes[-1])

    def _stopped(self, network: int, batch: int) -> _Stopped:
        forward = partial(self._run, self._networks[network], self._batches[batch])
        return _Stopped(forward, self._layers[network], self._turn, self._calls)


class _Stopped:
    """One pass of the walk, and the visit where it stands."""

    def __init__(self, forward: Callable[[], Any], layers: Layers, turn: dict[str, int], calls: dict[str, int]) -> None:
        self.live = Live()
        self._pass, self._layers, self._turn = Pass(forward, layers, self.live), layers, turn
        self._left = dict(calls)
        self.visit: Visit | None = None
        self.resumed = False
        self._now: Tensor | None = None
        self._used: tuple = ()

    def to(self, at: int) -> None:
        """Go on to the layer whose turn is `at`, or the first one after it."""
        while self.visit is None or self._turn[self.visit.name] < at:
            if self.visit is not None:
                self.resumed = True
                self._settle()
            self.visit = self._next()
            if self.visit is None:
                return

    def _next(self) -> Visit | None:
        """The next visit that is the last of its layer."""
        while (visit := self._pass.advance()) is not None:
            self._left[visit.name] -= 1
            if self._left[visit.name] == 0:
                return visit
        return None

    def stands(self, at: int) -> bool:
        return self.visit is not None and self._turn[self.visit.name] == at

    def sight(self) -> Sight:
        assert self.visit is not None
        return Sight(self.visit.inputs, self.visit.output, self.visit.other, self.visit.geometry)

    @torch.no_grad()
    def present(self) -> Tensor:
        """The output of the present layer with its present tensors."""
        assert self.visit is not None
        used = self._layers.tensors(self.visit.name)
        if _same(used, self.visit.used):
            return self.visit.output
        if self._now is None or not _same(used, self._used):
            self._now, self._used = self.visit.again(*self._layers.of(self.visit.name)), used
            self.live.add(self._now)
        return self._now

    def close(self) -> None:
        self.live.fetch()  # frames that unwind may still look at what they hold
        self._pass.close()
        self.visit = self._now = None

    def _settle(self) -> None:
        """What the layer gives now is what the rest of the pass reads."""
        assert self.visit is not None
        now = self.present()
        if now is not self.visit.output:
            self.visit.output.data = now
        self.visit = self._now = None
        self._used = ()


@torch.no_grad()
def _calls_of(name: str, forward: Callable[[], Any], layers: Layers, live: Live) -> list[Sight]:
    """What one pass sees at all calls of a layer, in copies: the network may overwrite what it has read.

    What is added is left out: it may come from another call, which changes with this one.
    """
    sights: list[Sight] = []

    def read(visit: Visit) -> None:
        if visit.name == name:
            sight = Sight(visit.inputs.clone(), visit.output.clone(), None, visit.geometry)
            live.add((sight.inputs, sight.output))
            sights.append(sight)

    tape = Tape(layers, read=read)
    with evaluating(layers.network):
        with tape:
            forward()
        tape.finish()
    return sights


def _same(first: Sequence, second: Sequence) -> bool:
    return all(a is b for a, b in zip(first, second, strict=True))
