"""Metrics for any torch-pruning pruner that look at what is read, and ask what a channel adds, not how large it is.

Like `torch_pruning.importance`, an instance is called with a full group and returns one score per channel. The network
is the one that the group's dependency graph was built on, and is left as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.dependency.group import Group

from intrafusion.groups.features import columns_of
from intrafusion.groups.kinds.base import Slot
from intrafusion.groups.layout import gather
from intrafusion.groups.readings import Reading, Readings
from intrafusion.groups.statistics import activation_of, expected_covariances
from intrafusion.groups.table import GroupTable, tabulate
from intrafusion.ot.choice import RIDGE, RIDGE_LEAST, SEARCHES, reconstruction_scores
from intrafusion.running import does_not_run, evaluating, input_batches, run_model, to_device

_NAME = "the importance's"


class ReconstructionImportance:
    """Keeps the channels from which the layers that read a group are rebuilt best, chosen one after the other.

    batches: unlabelled inputs (tensors, tuples or dictionaries, as the network takes them). Without them, the
    covariance of the channels is computed from the weights and batch-norm statistics alone; a layer without batch-norm
    is taken to have standard normal inputs (see `groups.statistics`). forward_fn: forward_fn(model, batch), if
    model(*batch) is not how the network is called. The first call measures all layers of the network in one pass over
    the batches; another pass is made when the network has changed.

    search: `forward` starts from no channel and picks the one from which the rest is rebuilt best, `backward` starts
    from all and drops the one that costs least when the readers are refitted to the others (OSSCAR); its scores are
    those of the picks in reverse. ridge: of `backward`, what is added to the variance of each channel, as a share of
    it; more where inputs are few. (Exchanging channels afterwards, OSSCAR's local search, is for one width; scores are
    for all.)

    A score is the share of its group's error that the channel's pick removes (see `ot.choice`): scores of one group sum
    to 1 and fall in the order of the picks, so that any ratio keeps the first picks. Global pruning compares shares: it
    takes channels where their readers' outputs lose the smallest fraction of their variance.

    Every reader of a group rebuilds its own view of the channels (its own activation, or place on a residual stream)
    and counts with the size of its outputs, behind its batch-norm. A channel that a reader sees in several copies
    (behind a flatten or a concat) counts once, with all its copies. A group that nobody reads is rebuilt itself, from
    the weights. In attention, queries, keys and values are averaged without inputs; inputs show what is really read.

    Raises ValueError for empty batches, activations that are not finite or weights that are not, naming the layer; also
    for a group that is not full, and for another search or ridge.
    """

    sees_activations = True
    """Batch-norms are accounted for: the folded network would score the same, but cannot be run."""
    takes_blocks = True
    """Heads that go whole are scored whole."""

    def __init__(
        self,
        batches: Iterable | None = None,
        forward_fn: Callable | None = None,
        *,
        search: str = "forward",
        ridge: float = RIDGE,
    ) -> None:
        if search not in SEARCHES:
            raise ValueError(f"search is {search!r}: it must be one of {', '.join(SEARCHES)}")
        if isinstance(ridge, bool) or not isinstance(ridge, (int, float)) or not RIDGE_LEAST <= ridge < float("inf"):
            raise ValueError(f"ridge is {ridge!r}: it must be a number from {RIDGE_LEAST} on")
        self._inputs = None if batches is None else _Inputs(batches, forward_fn, products=True)
        self._search, self._ridge = search, float(ridge)

    @torch.no_grad()
    def __call__(self, group: Group, blocks: int | None = None) -> Tensor:
        """[n] float64 scores of the root channels of a full group. blocks: they go in so many blocks of equal size."""
        graph, table = _table(group)
        readers = [slot for slot in table.slots if slot.reads]
        device = _device(graph)
        metrics = [_metric(graph, reader).to(device) for reader in readers] or [torch.eye(table.n, device=device)]
        if self._inputs is None or not readers:
            covariances = [one.to(device) for one in expected_covariances(graph, table, readers)]
        else:
            readings = self._inputs.readings(graph, readers)
            of = {id(reading): reading.covariance().to(device) for reading in dict.fromkeys(readings)}
            covariances = [of[id(reading)] for reading in readings]
        try:
            return reconstruction_scores(covariances, metrics, self._search, self._ridge, blocks)
        except ValueError as error:
            raise ValueError(f"while scoring group {table.name!r}: {error}") from error


class _ActivationWeighted:
    """A score per channel and reader from the weights that read it and the size of what is read, summed over readers.

    standardised: subtract a group's mean and divide by its standard deviation, so that groups can be compared.
    """

    sees_activations = True
    needs_products = False
    """Does the score need products of channels, `Reading.products`?"""

    def __init__(self, batches: Iterable, forward_fn: Callable | None = None, *, standardised: bool = False) -> None:
        self._inputs = _Inputs(batches, forward_fn, products=self.needs_products)
        self._standardised = standardised

    @torch.no_grad()
    def __call__(self, group: Group) -> Tensor | None:
        """[n] float64 scores of the root channels of a full group; None if no layer reads them."""
        graph, table = _table(group)
        readers = [slot for slot in table.slots if slot.reads]
        if not readers:
            return None
        device = _device(graph)
        total: Tensor = torch.zeros((), dtype=torch.float64, device=device)
        for slot, reading in zip(readers, self._inputs.readings(graph, readers), strict=True):
            columns = columns_of(graph, slot)
            assert columns is not None  # a reader has columns
            copies = columns.unflatten(1, (slot.local.shape[1], -1))
            total = total + self.score(copies.to(device), reading).to(device).sum(dim=1)
        if not torch.isfinite(total).all():
            raise ValueError(f"while scoring group {table.name!r}: the weights that read it are not finite")
        if self._standardised:
            total = (total - total.mean()) / total.std(correction=0).clamp(min=1e-300)
        return total

    def score(self, columns: Tensor, reading: Reading) -> Tensor:
        """[n, m] of every copy; columns: [n, m, outputs and taps] that read it."""
        raise NotImplementedError


class FLAPImportance(_ActivationWeighted):
    """Fluctuation (An et al., "FLAP", AAAI 2024): Var(x_j) |V_:j|², what is lost if x_j becomes its mean.

    x_j are the values that a reader of the group reads of channel j on unlabelled batches, V_:j the weights, behind its
    batch-norm, that it multiplies them by (all taps of a convolution); several readers, and copies of a channel, add
    up. It is the error of a plain cut whose readers get the mean back as a bias.

    batches, forward_fn: as for `ReconstructionImportance`; batches are required. standardised: scores of each group
    with mean 0 and standard deviation 1, as FLAP compares them between layers: for global pruning. (Scores are then no
    masses: not with `source_mass="importance"`.)

    Raises ValueError for empty batches, for a group that is not full, and for activations or weights that are not
    finite, naming the layer or group.
    """

    def score(self, columns: Tensor, reading: Reading) -> Tensor:
        return reading.variances.to(columns.device) * columns.square().sum(dim=2)


class WandaImportance(_ActivationWeighted):
    """Weights times activations (Wanda, Sun et al., ICLR 2024, for whole channels: Wanda-sp, FASP): Σ_i |V_ij| |x_j|.

    |x_j| is the root mean square of what a reader reads of channel j, V and everything else is as for `FLAPImportance`.
    """

    def score(self, columns: Tensor, reading: Reading) -> Tensor:
        return reading.mean_squares.to(columns.device).sqrt() * columns.abs().sum(dim=2)


class CHIPImportance:
    """Channel independence (Sui et al., "CHIP", NeurIPS 2021, equations 3 and 4): how much rank a feature map adds.

    For the feature maps A [c, h·w] that one input gives behind a layer, its batch-norm and its activation, before any
    pooling, channel i has

        CI(i) = |A|_* - |A with row i zeroed|_*,        the change of the nuclear norm, averaged over the inputs.

    Tokens take the place of h·w; a linear layer on vectors has neither, and the inputs of one batch take their place. A
    group with several producers gets the mean of their scores, as do the copies of a channel in one of them.

    batches, forward_fn: as for `ReconstructionImportance`; batches are required. Scores are not normalised between
    groups, as in the paper, which prunes each layer by itself.

    Raises ValueError for empty batches, for a group that is not full, and for activations that are not finite, naming
    the layer.
    """

    sees_activations = True

    def __init__(self, batches: Iterable, forward_fn: Callable | None = None) -> None:
        self._inputs = _Inputs(batches, forward_fn)

    @torch.no_grad()
    def __call__(self, group: Group) -> Tensor | None:
        """[n] float64 scores of the root channels of a full group; None if no layer of the group produces them."""
        graph, table = _table(group)
        slots = [slot for slot in table.slots if slot.has_filters]
        if not slots:
            return None
        run = self._inputs.runner(graph)
        totals = {slot.name: _Mean() for slot in slots}

        def measure(_module: nn.Module, _args: Any, output: Tensor, slot: Slot) -> None:
            f = _following_activation(graph, slot)
            maps = _maps(output if f is None else f(output), slot.kind.channel_axis)
            if not torch.isfinite(maps).all():
                raise ValueError(f"layer {slot.name!r} gives activations that are not finite")
            totals[slot.name].add(channel_independence(maps))

        with ExitStack() as stack:
            stack.enter_context(evaluating(graph.model))
            for slot in slots:
                layer = slot.owner if slot.partner is None else slot.partner
                stack.callback(layer.register_forward_hook(partial(measure, slot=slot)).remove)
            for batch in self._inputs.on(graph):
                run(batch)
        return torch.stack([_per_root(totals[slot.name].value(slot.name), slot) for slot in slots]).mean(dim=0)


def channel_independence(maps: Tensor, *, most_values: int = 2**24) -> Tensor:
    """CI of every channel of every input: maps [b, c, p] -> [b, c] float64.

    Nuclear norms are sums of square roots of eigenvalues of the smaller Gram matrix, [c, c] or [p, p], where a zeroed
    row is a zeroed row and column, or a rank-one change. About `most_values` numbers are held at once.
    """
    maps = maps.double()
    batch, channels, positions = maps.shape
    by_rows = channels <= positions
    gram = maps @ maps.mT if by_rows else maps.mT @ maps
    whole = _nuclear(gram)[:, None]
    side = gram.shape[1]
    parts = []
    for chosen in torch.arange(channels, device=maps.device).split(max(1, most_values // (batch * side * side))):
        without = gram[:, None].expand(batch, len(chosen), side, side).clone()
        if by_rows:
            numbers = torch.arange(len(chosen), device=maps.device)
            without[:, numbers, chosen] = 0
            without[:, numbers, :, chosen] = 0
        else:
            rows = maps[:, chosen]
            without -= rows[..., :, None] * rows[..., None, :]
        parts.append(whole - _nuclear(without))
    return torch.cat(parts, dim=1).clamp(min=0)


def _nuclear(gram: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum(dim=-1)


class _Mean:
    """The mean over inputs, batch by batch."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count = 0

    def add(self, values: Tensor) -> None:
        self.total = values.sum(dim=0) + (0 if self.total is None else self.total)
        self.count += len(values)

    def value(self, name: str) -> Tensor:
        if self.total is None:
            raise ValueError(f"the inputs do not reach layer {name!r}")
        return self.total / self.count


def _maps(output: Tensor, axis: int) -> Tensor:
    """[inputs, channels, positions]; vectors are the positions of a single input."""
    if output.dim() == 2:
        return output.T[None]
    return output.movedim(axis, 1).flatten(2)


def _following_activation(graph: tp.DependencyGraph, slot: Slot) -> Callable[[Tensor], Tensor] | None:
    """The activation that alone reads a layer and its batch-norm, if one does."""
    node = graph.module2node[slot.owner if slot.partner is None else slot.partner]
    return activation_of(node.outputs[0]) if len(node.outputs) == 1 else None


def _per_root(values: Tensor, slot: Slot) -> Tensor:
    """[size] local scores -> [n] root scores: the mean over the copies of a channel."""
    local = slot.local.to(values.device)
    copies = gather(values[:, None], local)
    return copies.sum(dim=1) / (local >= 0).sum(dim=1).clamp(min=1)


def _table(group: Group) -> tuple[tp.DependencyGraph, GroupTable]:
    """The group's graph and table. Raises ValueError if the group has no network, or is only a part."""
    graph: Any = getattr(group, "_DG", None)
    if getattr(graph, "model", None) is None:
        raise ValueError("the group has no dependency graph with a network: get it from DependencyGraph or a pruner")
    root: Any = group[0].dep
    table = tabulate(graph, root.target.module, root.handler)
    if len(group[0].idxs) != table.n:
        raise ValueError(
            f"group {table.name!r} has {len(group[0].idxs)} of its {table.n} channels: importances need a full group"
        )
    return graph, table


def _device(graph: tp.DependencyGraph) -> torch.device:
    return next(graph.model.parameters()).device


class _Inputs:
    """The batches of an importance, and what a network was found to read on them."""

    def __init__(self, batches: Iterable, forward_fn: Callable | None = None, products: bool = False) -> None:
        self._batches, self._forward_fn = input_batches(batches, _NAME), forward_fn
        self._readings = Readings(products)

    def on(self, graph: tp.DependencyGraph) -> Iterator[Any]:
        """The batches, one after the other on the network's device."""
        device = _device(graph)
        return (to_device(batch, device) for batch in self._batches)

    def runner(self, graph: tp.DependencyGraph) -> Callable[[Any], Any]:
        return _Runner(graph.model, self._forward_fn)

    def readings(self, graph: tp.DependencyGraph, readers: Sequence[Slot]) -> list[Reading]:
        return self._readings.of(graph.model, self.runner(graph), lambda: self.on(graph), readers)


class _Runner:
    """Calls a network on one batch after the other. Raises ValueError naming one that does not run."""

    def __init__(self, model: nn.Module, forward_fn: Callable | None) -> None:
        self._run, self._number = partial(run_model, model, forward_fn=forward_fn), -1

    def __call__(self, batch: Any) -> Any:
        self._number += 1
        try:
            return self._run(batch)
        except ValueError:  # of what is measured
            raise
        except Exception as error:
            raise does_not_run(error, batch, self._number, name=_NAME) from error


def _metric(graph: tp.DependencyGraph, reader: Slot) -> Tensor:
    """[n, n] VᵀV summed over the outputs and taps of a reader; channels of different chunks meet in no output."""
    columns = columns_of(graph, reader)
    assert columns is not None  # a reader has columns
    metric = columns @ columns.T
    if reader.chunks > 1:
        chunk = torch.div(reader.local[:, 0], reader.size // reader.chunks, rounding_mode="floor")
        metric = metric * (chunk[:, None] == chunk).to(metric)
    return metric
