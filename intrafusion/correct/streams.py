"""A residual stream becomes narrower: turned to its principal directions, of which the first ones stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from intrafusion.correct.refit import set_tensor_
from intrafusion.correct.survey import Run
from intrafusion.groups.apply import apply_pair
from intrafusion.groups.snapshot import Snapshot
from intrafusion.groups.streams import Stream, stream_of
from intrafusion.groups.table import GroupTable
from intrafusion.ot import Pair
from intrafusion.running import Levelled, evaluating, same_outputs


class Rotation:
    """The pair that turns a stream and cuts it, and what else is written with it (a `groups.apply.Rewrite`).

    kept: [k] the places that stay. moments: [n, n] second moments of what each norm gives, by its name. vectors:
    [n, n] the directions, as columns, of which the first stay; the principal ones of the moments, each norm counting
    alike, if none are given.
    """

    def __init__(
        self, stream: Stream, moments: Mapping[str, Tensor], kept: Tensor, vectors: Tensor | None = None
    ) -> None:
        k = len(kept)
        mean = torch.stack(list(moments.values())).mean(dim=0)
        directions: Tensor = torch.linalg.eigh(mean)[1].flip(1) if vectors is None else vectors
        if stream.centred:  # one direction of the k is that of equal channels, which the norms take out
            turned, inside = directions[:, : k - 1], _level(k)
        else:
            turned, inside = directions[:, :k], torch.eye(k, dtype=torch.float64)
        rows = inside @ turned.T
        self.pair = Pair(rows, rows.T.contiguous(), kept)
        power = {name: float((turned.T @ moment @ turned).trace()) / k for name, moment in moments.items()}
        self._gains = {name: value**0.5 for name, value in power.items()}

    def before_(self, graph: tp.DependencyGraph, table: GroupTable, change: Any = None) -> None:
        """Carry the norms' gains and shifts over into what reads them; the function stays the same."""
        for norm, readers in _stream(graph, table).norms:
            gain, shift = (_vector(norm.owner, name) for name in ("weight", "bias"))
            for slot in readers:
                weight = slot.owner.weight.detach().double()
                if shift is not None and bool(shift.any()):
                    set_tensor_(slot.owner, "bias", slot.owner.bias.detach().double() + weight @ shift)
                if gain is not None:
                    set_tensor_(slot.owner, "weight", weight * gain)
                    if change is not None:  # the new gains only make up for what fewer channels do to the norm
                        change.scaled(slot.owner, "weight", 1, gain, gain.new_ones(len(self.pair.kept)))
            _fill_(norm.owner, 1.0)

    def after_(self, graph: tp.DependencyGraph, table: GroupTable) -> None:
        """Give the norms the gains that fit fewer channels."""
        for norm, _ in _stream(graph, table).norms:
            _fill_(norm.owner, self._gains[norm.name])


@torch.no_grad()
def may_be_turned(stream: Stream, graph: tp.DependencyGraph, forward: Callable[[nn.Module], list[Tensor]]) -> bool:
    """Does the output of the network on its example stay when the stream is turned and not cut? That is tried.

    The network is as it was afterwards, bit for bit.
    """
    n = stream.table.n
    draw = torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if stream.centred:
        draw[:, 0] = 1.0  # the direction that the norms take out is the last one
    vectors = torch.linalg.qr(draw)[0].flip(1)
    power = n / (n - 1 if stream.centred else n)
    moments = {norm.name: power * torch.eye(n, dtype=torch.float64) for norm, _ in stream.norms}
    rotation = Rotation(stream, moments, torch.arange(n), vectors)
    snapshot = Snapshot(graph, list(graph.model.modules()))
    with evaluating(graph.model), Levelled():
        before = forward(graph.model)
        try:
            rotation.before_(graph, stream.table)
            apply_pair(stream.table, rotation.pair)
            rotation.after_(graph, stream.table)
            after = forward(graph.model)
        finally:
            snapshot.restore()
    return same_outputs(after, before)


def stream_moments(stream: Stream, dense: nn.Module, run: Run, batches: Sequence) -> dict[str, Tensor]:
    """[n, n] float64 second moments of what every norm makes of the stream, without gain and shift, by its name.

    One pass of the dense network over the batches.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def see(name: str, _norm: Any, args: Any, kwargs: Any) -> None:
        x = (args[0] if args else next(iter(kwargs.values()))).flatten(0, -2).double()
        if stream.centred:
            x = x - x.mean(dim=1, keepdim=True)
        x = (x / x.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-12)).float()
        sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + (x.T @ x).double().cpu()
        counts[name] = counts.get(name, 0) + len(x)

    with ExitStack() as stack, torch.no_grad(), evaluating(dense):
        for norm, _ in stream.norms:
            module = dense.get_submodule(norm.name)
            stack.callback(module.register_forward_pre_hook(partial(see, norm.name), with_kwargs=True).remove)
        for batch in batches:
            run(dense, batch)
    return {name: total / counts[name] for name, total in sums.items()}


def _level(k: int) -> Tensor:
    """[k, k - 1] orthonormal columns, each with mean 0."""
    start = torch.eye(k, dtype=torch.float64)
    start[:, 0] = 1.0
    return torch.linalg.qr(start)[0][:, 1:]


def _stream(graph: tp.DependencyGraph, table: GroupTable) -> Stream:
    """Raises ValueError if the group is no stream."""
    stream = stream_of(graph, table)
    if stream is None:
        raise ValueError(f"group {table.name!r} is no stream that is only read through norms")
    return stream


def _vector(norm: Any, name: str) -> Tensor | None:
    value = getattr(norm, name, None)
    return None if value is None else value.detach().double()


def _fill_(norm: Any, gain: float) -> None:
    for name, number in (("weight", gain), ("bias", 0.0)):
        if (value := getattr(norm, name, None)) is not None:
            set_tensor_(norm, name, torch.full_like(value, number))
