"""Every method of the comparison by name: how units are chosen, and what is made of the rest.

Rivals are methods like ours, registered through the same socket; what was taken from which paper is said at each.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from intrafusion import (
    FLAPImportance,
    Fusion,
    IntraFusionPruner,
    Method,
    Pair,
    Plan,
    ReconstructionImportance,
    WandaImportance,
    method,
)
from intrafusion.correct.circuits import Reduction
from intrafusion.correct.correction import LayerView
from intrafusion.correct.streams import Rotation, stream_moments
from intrafusion.groups.heads import Heads
from intrafusion.groups.readings import Reading
from intrafusion.groups.streams import stream_of
from intrafusion.groups.table import GroupTable
from intrafusion.methods.view import View
from intrafusion.ot import selection_pair
from intrafusion.prune.inputs import synthetic_batches
from intrafusion.prune.report import Report

RIDGE = 1e-2
"""OSSCAR's and CORP's, in units of the mean diagonal."""


class _Moments:
    """Count, sum [d] and products [d, d] of what a layer reads in the dense network, one pass."""

    def __init__(self) -> None:
        self.n: float = 0
        self.sum: Any = 0.0
        self.products: Any = 0.0

    def see(self, inputs: Tensor) -> None:
        x = inputs.flatten(0, -2)
        self.n += len(x)
        self.sum = self.sum + x.double().sum(dim=0)
        self.products = self.products + (x.T @ x).double()

    @property
    def mean(self) -> Tensor:
        return self.sum / self.n


class _FromDense(Method):
    """Rows are left; what reads them is corrected by moments of the dense network."""

    inputs = "calibration"
    plan = False
    heads = True
    """Are layers that read heads corrected too?"""

    def begin(self, view: View, tables: Sequence[GroupTable]) -> None:
        names = [slot.name for table in tables for slot in table.slots if slot.reads]
        names += [name for name, layer in view.model.named_modules() if _reads_heads(name, layer)]
        names = [name for name in names if self.heads or not _reads_heads(name, view.model.get_submodule(name))]
        self.moments = {name: _Moments() for name in names}
        view.watch({name: moments.see for name, moments in self.moments.items()})
        self.weights = {
            name: view.model.get_submodule(name).weight.detach().clone()  # type: ignore[union-attr]
            for name in names
        }

    def pair(self, table: GroupTable, plan: Plan, view: View) -> Pair:
        return selection_pair(plan.kept, table.n)

    def end_(self, view: View) -> None:
        for name, moments in self.moments.items():
            layer: Any = view.model.get_submodule(name)
            dense = self.weights[name]
            if layer.weight.shape[1] < dense.shape[1] and layer.weight.shape[0] == dense.shape[0]:
                self.correct_(layer, dense, _kept(dense, layer.weight), moments)

    def correct_(self, layer: Any, dense: Tensor, kept: Tensor, moments: _Moments) -> None:
        """Make a layer up for the inputs it lost; dense: [o, d] its weight before, kept: [k] which of them are left."""
        raise NotImplementedError


def _reads_heads(name: str, layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and name.rpartition(".")[2] in ("o_proj", "out_proj", "proj")


@method("FLAP")
class Flap(_FromDense):
    """An et al., AAAI 2024: the output's bias takes up the mean of what was removed."""

    def correct_(self, layer: Any, dense: Tensor, kept: Tensor, moments: _Moments) -> None:
        removed = torch.ones(dense.shape[1], dtype=torch.bool)
        removed[kept] = False
        shift = (dense[:, removed].double() @ moments.mean[removed]).to(dense)
        layer.bias = nn.Parameter(shift if layer.bias is None else layer.bias + shift)


@method("CORP")
class Corp(_FromDense):
    """CORP (arXiv 2602.05243) and, without the mean, GRAIL: removed units are read from kept ones, affinely."""

    def correct_(self, layer: Any, dense: Tensor, kept: Tensor, moments: _Moments) -> None:
        mean = moments.mean
        covariance = moments.products / moments.n - torch.outer(mean, mean)
        system = covariance[kept][:, kept].clone()
        system.diagonal().add_(RIDGE * system.diagonal().mean())
        read = torch.linalg.solve(system, covariance[kept]).T  # [d, k]
        shift = dense.double() @ (mean - read @ mean[kept])
        layer.weight = nn.Parameter((dense.double() @ read).to(dense))
        layer.bias = nn.Parameter((shift if layer.bias is None else layer.bias.double() + shift).to(dense))


class RidgeLeverage(FLAPImportance):
    """MoDeGPT's choice of units (Lin et al., ICLR 2025, type I): the largest [C (C + lambda I)^-1]_ii."""

    needs_products = True

    def score(self, columns: Tensor, reading: Reading) -> Tensor:
        assert reading.products is not None
        moments = (reading.products / reading.count).to(columns.device)
        ridged = moments.clone()
        ridged.diagonal().add_(RIDGE * moments.diagonal().mean())
        return torch.linalg.solve(ridged, moments).diagonal()[:, None]


class _Columns(Reduction):
    """MoDeGPT, type II: columns of queries and keys are kept as they are, the largest product of their sizes first."""

    def logits(self, keys: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        chosen = (keys.diagonal() * queries.diagonal()).topk(k).indices.sort().values
        kept = torch.eye(len(keys)).to(keys)[chosen]
        return kept, kept


@method("MoDeGPT")
class ModeGpt(_FromDense):
    """Lin et al., ICLR 2025: units by their ridge leverage, read back by Nyström's formula (type I); inside heads,
    columns of queries and keys (type II) and a low rank of values and output (type III). Widths as they are asked for.
    """

    samples = circuits = True
    heads = False

    def correct_(self, layer: Any, dense: Tensor, kept: Tensor, moments: _Moments) -> None:
        products = moments.products / moments.n
        system = products[kept][:, kept].clone()
        system.diagonal().add_(RIDGE * system.diagonal().mean())
        layer.weight = nn.Parameter((dense.double() @ torch.linalg.solve(system, products[kept]).T).to(dense))

    def reduction(self, block: Heads, moments: Mapping[str, Tensor], kept: Tensor) -> Reduction:
        return _Columns(block, moments, kept)


def _kept(dense: Tensor, now: Tensor) -> Tensor:
    """Which columns of the dense weight those of the cut one are."""
    columns = {tuple(column.tolist()): number for number, column in enumerate(dense[:16].T)}
    return torch.tensor([columns[tuple(column.tolist())] for column in now.detach()[:16].T])


@method("OSSCAR")
class Osscar(Method):
    """Meng et al., ICML 2024: least squares from what the pruned network gives to the dense output, in sequence.

    Only layers that read a pruned group are solved for, with a fixed ridge and no prior; the stream is not made up for.
    """

    inputs = "calibration"
    plan = False

    def begin(self, view: View, tables: Sequence[GroupTable]) -> None:
        self.readers = {slot.name for table in tables for slot in table.slots if slot.reads}
        self.readers |= {name for name, layer in view.model.named_modules() if _reads_heads(name, layer)}

    def pair(self, table: GroupTable, plan: Plan, view: View) -> Pair:
        return selection_pair(plan.kept, table.n)

    def repair_(self, layer: LayerView, view: View) -> None:
        linear: Any = layer.layer
        dense = layer.dense.weight.shape
        if layer.name not in self.readers or linear.weight.shape == dense or len(linear.weight) != dense[0]:
            return
        gram: Any = 0.0
        cross: Any = 0.0
        for dense, now in layer.sights:
            x, y = (value.flatten(0, -2) for value in (now.inputs, dense.output))
            if linear.bias is not None:
                y = y - linear.bias
            gram, cross = gram + (x.T @ x).double(), cross + (x.T @ y).double()
        gram.diagonal().add_(RIDGE * gram.diagonal().mean())
        linear.weight = nn.Parameter(torch.linalg.solve(gram, cross).T.to(linear.weight))


@method("SliceGPT")
class Turned(Method):
    """Ashkboos et al., ICLR 2024, with one rotation for the whole stream, as an architecture without maps on its skips
    can have it: principal directions of what the norms give, nothing refitted. Other groups are plainly cut.
    """

    inputs = "calibration"
    plan = False
    circuits = True

    def begin(self, view: View, tables: Sequence[GroupTable]) -> None:
        self.moments: dict[str, dict[str, Tensor]] = {}
        for table in tables:
            stream = stream_of(view.graph, table)
            if stream is not None:
                self.moments[table.name] = stream_moments(stream, view.model, view.run, view.batches)

    def pair(self, table: GroupTable, plan: Plan, view: View) -> Pair:
        stream = stream_of(view.graph, table)
        self.rotation: Rotation | None = None
        if stream is None or table.name not in self.moments:
            return selection_pair(plan.kept, table.n)
        self.rotation = Rotation(stream, self.moments[table.name], plan.kept.cpu())
        return self.rotation.pair

    def rewrite(self, table: GroupTable, pair: Pair, view: View) -> Rotation | None:
        return self.rotation


def pruned(dense: nn.Module, name: str, widths: dict[str, float], batches: list) -> tuple[Any, Report]:
    """A pruned copy, and what was done; widths: the kinds that are cut, with their ratios.

    The first input is every method's example; the other batches are seen by those that learn from data.
    """
    entry, model = METHODS[name], copy.deepcopy(dense)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = IntraFusionPruner(
            model,
            batches[0][:1],
            entry.choose(dense, batches),
            widths=widths,
            fusion=entry.fusion,
            calibration=batches if entry.fusion.method().inputs == "calibration" else None,
            allocation=entry.allocation,
        )
        pruner.progress = False
        pruner.step()
    return model.eval(), pruner.report


@dataclass(frozen=True)
class Entry:
    """One row: choose(network, batches) makes the importance; data: whether text is seen; allocation: the pruner's."""

    choose: Callable[[nn.Module, list], Callable]
    fusion: Fusion
    data: bool = True
    allocation: str = "equal"


def _seeing(metric: Callable[[list], Callable]) -> Callable[[nn.Module, list], Callable]:
    return lambda _network, batches: metric(batches)


def _l1(_network: nn.Module, _batches: list) -> Callable:
    return tp.importance.GroupMagnitudeImportance(p=1)


def _on_own_inputs(network: nn.Module, batches: list) -> Callable:
    """Inputs that are made for the network, text that it writes; of the batches, only the shape is looked at."""
    return ReconstructionImportance(synthetic_batches(network, batches[0][:1], seed=1), search="backward")


_flap, _wanda = _seeing(FLAPImportance), _seeing(WandaImportance)
_backward = _seeing(partial(ReconstructionImportance, search="backward"))
METHODS: dict[str, Entry] = {
    "discard": Entry(_l1, Fusion.preset("discard"), data=False),
    "barycentre": Entry(_l1, Fusion.preset("barycentre"), data=False),
    "data-free": Entry(_l1, Fusion.preset("data-free"), data=False),
    "data-free, own inputs": Entry(_on_own_inputs, Fusion.preset("data-free"), data=False),
    "FLAP": Entry(_flap, Fusion(merge="FLAP")),
    "Wanda": Entry(_wanda, Fusion.preset("discard")),
    "CORP": Entry(_wanda, Fusion(merge="CORP")),
    "MoDeGPT": Entry(_seeing(RidgeLeverage), Fusion(merge="MoDeGPT")),
    "SliceGPT": Entry(_l1, Fusion(merge="SliceGPT")),
    "OSSCAR": Entry(_backward, Fusion(merge="OSSCAR")),
    "calibrated, L1": Entry(_l1, Fusion.preset("calibrated")),
    "calibrated, FLAP": Entry(_flap, Fusion.preset("calibrated")),
    "calibrated": Entry(_backward, Fusion.preset("calibrated")),
    "OSSCAR, unequal": Entry(_backward, Fusion(merge="OSSCAR"), allocation="measured-parameters"),
    "calibrated, unequal": Entry(_backward, Fusion.preset("calibrated"), allocation="measured-parameters"),
}
"""By name, in the order of the table: those that see no text first, ours last; then with unequal widths."""
