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
from intrafusion.groups.streams import Stream, keeps_shift, stream_of
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
        shifts = [_kept_shift(norm.owner) for norm, readers in stream.norms if keeps_shift(norm, readers)]
        shifts = [s - s.mean() if stream.centred else s for s in shifts if s is not None]
        seen = [*moments.values(), *(torch.outer(s, s).cpu() for s in shifts)]
        mean = torch.stack(seen).sum(dim=0) / len(moments)
        directions: Tensor = torch.linalg.eigh(mean)[1].flip(1) if vectors is None else vectors
        if stream.centred:  # that of equal channels, which the norms take out, stays what it is: shifts may lie in it
            turned = torch.cat([directions.new_full((len(mean), 1), len(mean) ** -0.5), directions[:, : k - 1]], dim=1)
            inside = _equal_first(k)
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
            stays = keeps_shift(norm, readers)
            for slot in readers:
                weight = slot.owner.weight.detach().double()
                if shift is not None and bool(shift.any()) and not stays:
                    set_tensor_(slot.owner, "bias", slot.owner.bias.detach().double() + weight @ shift)
                if gain is not None:
                    set_tensor_(slot.owner, "weight", weight * gain)
                    if change is not None:  # the new gains only make up for what fewer channels do to the norm
                        change.scaled(slot.owner, "weight", 1, gain, gain.new_ones(len(self.pair.kept)))
            _set_(norm.owner, 1.0, _kept_shift(norm.owner) if stays else None)

    def after_(self, graph: tp.DependencyGraph, table: GroupTable) -> None:
        """Give the norms the gains that fit fewer channels."""
        for norm, readers in _stream(graph, table).norms:
            turned = _vector(norm.owner, "bias") if keeps_shift(norm, readers) else None
            _set_(norm.owner, self._gains[norm.name], turned)


@torch.no_grad()
def may_be_turned(stream: Stream, graph: tp.DependencyGraph, forward: Callable[[nn.Module], list[Tensor]]) -> bool:
    """Does the output of the network on its example stay when the stream is turned and not cut? That is tried.

    Not where the network does not run before another group is cut as well. It is as it was afterwards, bit for bit.
    """
    n = stream.table.n
    draw = torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if stream.centred:
        draw[:, 0] = 1.0  # the direction that the norms take out is the last one
    vectors = torch.linalg.qr(draw)[0].flip(1)
    moment = torch.eye(n, dtype=torch.float64)
    if stream.centred:
        moment = (moment - 1 / n) * n / (n - 1)
    moments = {norm.name: moment for norm, _ in stream.norms}
    rotation = Rotation(stream, moments, torch.arange(n), vectors)
    snapshot = Snapshot(graph, list(graph.model.modules()))
    with evaluating(graph.model), Levelled():
        try:
            before = forward(graph.model)
            rotation.before_(graph, stream.table)
            apply_pair(stream.table, rotation.pair)
            rotation.after_(graph, stream.table)
            after = forward(graph.model)
        except RuntimeError:  # of shapes
            return False
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


def _equal_first(k: int) -> Tensor:
    """[k, k] orthonormal columns, the first one equal everywhere and positive, the others with mean 0."""
    start = torch.eye(k, dtype=torch.float64)
    start[:, 0] = 1.0
    found = torch.linalg.qr(start)[0]
    found[:, 0] = k**-0.5
    return found


def _stream(graph: tp.DependencyGraph, table: GroupTable) -> Stream:
    """Raises ValueError if the group is no stream."""
    stream = stream_of(graph, table)
    if stream is None:
        raise ValueError(f"group {table.name!r} is no stream that is only read through norms")
    return stream


def _kept_shift(norm: Any) -> Tensor | None:
    """What is added to what a norm gives before its gain: [n]."""
    gain, shift = _vector(norm, "weight"), _vector(norm, "bias")
    return shift if gain is None or shift is None else shift / gain


def _vector(norm: Any, name: str) -> Tensor | None:
    value = getattr(norm, name, None)
    return None if value is None else value.detach().double()


def _set_(norm: Any, gain: float, shift: Tensor | None) -> None:
    """The same gain for all channels, and a shift, 0 if there is none."""
    if norm.weight is not None:
        set_tensor_(norm, "weight", torch.full_like(norm.weight, gain))
    if getattr(norm, "bias", None) is not None:
        set_tensor_(norm, "bias", torch.zeros_like(norm.bias) if shift is None else shift)
