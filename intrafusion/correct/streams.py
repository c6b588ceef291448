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
from intrafusion.groups.layout import from_channels, to_channels
from intrafusion.groups.snapshot import Snapshot
from intrafusion.groups.streams import Stream
from intrafusion.ot import Pair
from intrafusion.running import Levelled, evaluating, same_outputs


class Rotation:
    """The pair that turns a stream and cuts it, and what else has to be written with it.

    kept: [k] the places that stay. moments: [n, n] second moments of what each norm gives, by its name. vectors:
    [n, n] the directions, as columns, of which the first stay; the principal ones of the moments, each norm counting
    alike, if none are given.
    """

    def __init__(
        self, stream: Stream, moments: Mapping[str, Tensor], kept: Tensor, vectors: Tensor | None = None
    ) -> None:
        n, k = stream.table.n, len(kept)
        mean = torch.stack(list(moments.values())).mean(dim=0)
        directions: Tensor = torch.linalg.eigh(mean)[1].flip(1) if vectors is None else vectors
        if stream.centred:  # one direction of the k is that of equal channels, which the norms take out
            turned, inside = directions[:, : k - 1], _level(k)
        else:
            turned, inside = directions[:, :k], torch.eye(k, dtype=torch.float64)
        rows = inside @ turned.T
        self.pair = Pair(rows, rows.T.contiguous(), kept)
        self._weights: list[tuple[nn.Module, str, Tensor]] = []
        for norm, readers in stream.norms:
            power = (turned.T @ moments[norm.name] @ turned).trace() / n
            scale = float((power * n / k).sqrt())
            gain, shift = (_vector(norm.owner, name, n) for name in ("weight", "bias"))
            for slot in readers:
                columns = to_channels(slot.owner.weight.detach().double().cpu(), slot.axis)  # [n, outputs]
                new = columns.clone()
                new[kept] = rows @ (gain[:, None] * columns)
                self._weights.append((slot.owner, "weight", from_channels(new, slot.owner.weight, slot.axis)))
                if shift is not None and bool(shift.any()):
                    bias = slot.owner.bias.detach().double().cpu() + shift @ columns
                    self._weights.append((slot.owner, "bias", bias))
            if getattr(norm.owner, "weight", None) is not None:
                self._weights.append((norm.owner, "weight", torch.full((n,), scale, dtype=torch.float64)))
            if shift is not None:
                self._weights.append((norm.owner, "bias", torch.zeros(n, dtype=torch.float64)))

    @property
    def layers(self) -> list[nn.Module]:
        return list(dict.fromkeys(owner for owner, _, _ in self._weights))

    def write_(self) -> None:
        """To be called when the pair has been written."""
        for owner, name, value in self._weights:
            set_tensor_(owner, name, value.to(getattr(owner, name).device))


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
            apply_pair(stream.table, rotation.pair)
            rotation.write_()
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


def _vector(norm: Any, name: str, n: int) -> Any:
    value = getattr(norm, name, None)
    if value is None:
        return torch.ones(n, dtype=torch.float64) if name == "weight" else None
    return value.detach().double().cpu()
