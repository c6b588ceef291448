"""What the rivals share: a corrector that only chooses pairs, the pruner that runs it, statistics from images."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch_pruning as tp
from intrafusion.correct.corrector import Corrector
from torch import Tensor, nn
from torch_pruning import ops

from intrafusion import Fusion
from intrafusion.groups.batchnorm import read
from intrafusion.groups.features import channel_features
from intrafusion.groups.table import GroupTable, Slot
from intrafusion.ot import Pair, Plan, selection_pair
from intrafusion.prune.pruner import FusionMixin
from intrafusion.running import call_order, evaluating, to_device

Run = Callable[[nn.Module, Any], Any]
MakeCorrector = Callable[[tp.DependencyGraph, Run, Any, Sequence], Corrector]
"""(graph, run, example, images) -> a corrector."""

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


class Rival:
    """A corrector that chooses a pair per group, in the order of the forward pass, and refits nothing.

    graph: of the network that is pruned. run: calls a network on one batch. example: one batch, to see the order of the
    layers. images: the batches a method may look at, () for a data-free one. seed: for methods that draw something.
    """

    def __init__(self, graph: tp.DependencyGraph, run: Run, example: Any, images: Sequence = (), seed: int = 0) -> None:
        self.graph, self.model, self.run, self.images, self.seed = graph, graph.model, run, images, seed
        with evaluating(self.model):
            self.order = call_order(lambda: run(self.model, example), self.model, _LAYERS)

    def position(self, table: GroupTable) -> int:
        places = [self.order.index(s.name) for s in table.slots if s.produces and s.name in self.order]
        return min(places, default=len(self.order))

    def refit_until(self, table: GroupTable) -> None:
        """Nothing is refitted."""

    def pair(self, table: GroupTable, plan: Plan) -> Pair:
        """Discard, unless a method knows better."""
        return selection_pair(plan.kept, table.n)

    def note(self, table: GroupTable, pair: Pair) -> None:
        """Nothing is remembered."""

    def finish(self) -> None:
        """Nothing is repaired."""


class WeightRival(Rival):
    """A rival that compares the weights of the dense network, whatever was pruned before.

    The groups are described before the first cut, as in the papers: a later group's weights do not change with the
    pairs of the groups before it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._weights: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def position(self, table: GroupTable) -> int:
        if not table.unsupported:
            self._weights[table.name] = tuple(_features(self.graph, table, kind) for kind in _KINDS)  # pyright: ignore
        return super().position(table)

    def filters(self, table: GroupTable) -> Tensor:
        """[n, d] the folded filters that produce each channel."""
        return self._weights[table.name][0]

    def shifts(self, table: GroupTable) -> Tensor:
        """[n, p] the folded bias of each channel in every producer."""
        return self._weights[table.name][1]

    def columns(self, table: GroupTable) -> Tensor:
        """[n, d] the weights that read each channel."""
        return self._weights[table.name][2]


_KINDS = ("rows", "bias", "columns")


def _features(graph: tp.DependencyGraph, table: GroupTable, kind: str) -> Tensor:
    try:
        return channel_features(graph, table, **{"rows": False, "columns": False, "bias": False, kind: True})
    except ValueError:  # nothing of this kind in the group
        return torch.zeros(table.n, 0, dtype=torch.float64)


def same_class(table: GroupTable, kept: Tensor) -> Tensor:
    """[n, k] which channels may be read from which kept ones."""
    return table.classes[:, None] == table.classes[kept.cpu()][None, :]


def batchnorms_of(table: GroupTable) -> list[tuple[Slot, Any]]:
    """Every batch-norm of a group that has a weight, with the slot whose channels are its own."""
    found = [(slot, slot.owner if slot.is_batchnorm else slot.partner) for slot in table.slots]
    unique = {id(bn): (slot, bn) for slot, bn in found if bn is not None and bn.affine and bn.running_mean is not None}
    return list(unique.values())


def mean_spread(table: GroupTable, rows: Tensor) -> list[tuple[Any, Tensor, Tensor]]:
    """(batch-norm, local channels [m, k], wanted |gamma| [m, k]) if merged channels spread as their members on average.

    rows: [k, n] weights that sum to 1 in every row.
    """
    wanted = []
    for slot, bn in batchnorms_of(table):
        gamma = read(bn).gamma.abs().cpu()
        at = slot.local.T
        wanted.append((bn, at, torch.where(at >= 0, gamma[at.clamp(min=0)], 0.0) @ rows.T))
    return wanted


def set_spread_(wanted: list[tuple[Any, Tensor, Tensor]], kept: Tensor) -> None:
    """Write what `mean_spread` gave into the places of the kept channels; the signs stay."""
    for bn, local, spread in wanted:
        at = local[:, kept.cpu()]
        there = at >= 0
        weight = bn.weight.detach().clone()
        places = at[there].to(weight.device)
        signs = torch.where(weight[places] < 0, -1.0, 1.0).to(weight)
        weight[places] = signs * spread[there].to(weight)
        bn.weight = nn.Parameter(weight, requires_grad=bn.weight.requires_grad)


@torch.no_grad()
def reestimate_(model: nn.Module, run: Run, images: Sequence) -> None:
    """Replace the statistics of every batch-norm by those of the images, all batches weighing the same."""
    norms: list[Any] = [m for m in model.modules() if isinstance(m, ops.TORCH_BATCHNORM) and m.running_mean is not None]
    saved = [(bn, bn.momentum) for bn in norms]
    with evaluating(model):
        for bn in norms:
            bn.running_mean, bn.running_var = torch.zeros_like(bn.running_mean), torch.ones_like(bn.running_var)
            bn.num_batches_tracked = torch.zeros_like(bn.num_batches_tracked)
            bn.momentum = None  # a plain average over the batches
            bn.train()
        for batch in images:
            run(model, batch)
    for bn, momentum in saved:
        bn.momentum = momentum


_NO_PLAN = Fusion(merge="barycentre", target_mass="free", cost="cosine")
"""The cheapest plan there is: most rivals look at which channels are kept, and at nothing else of it."""


class RivalPruner(FusionMixin, tp.pruner.BasePruner):
    """Torch-Pruning's pruner with another paper's corrector in place of ours."""

    make_corrector: MakeCorrector

    def _new_corrector(self) -> Corrector:
        device = next(self.model.parameters()).device
        images = [to_device(batch, device) for batch in self._calibration]
        return self.make_corrector(self.DG, self._run, self._example, images)


def prune_with(
    make: MakeCorrector,
    dense: nn.Module,
    roots: Sequence[str] | None,
    ratio: float,
    importance: Callable,
    example_inputs: Any,
    images: Sequence[Tensor] | None,
    fusion: Fusion = _NO_PLAN,
) -> nn.Module:
    """A pruned copy of `dense`, its groups merged and repaired by the corrector that `make` gives.

    fusion: how the plan is made that the corrector is shown.
    """
    model = copy.deepcopy(dense)
    pruner = RivalPruner(
        model,
        example_inputs,
        importance,
        pruning_ratio=ratio,
        ignored_layers=ignored_layers(model, roots, example_inputs),
        fusion=replace(fusion, correct="data-free" if images is None else "calibrated"),
        calibration=images,
    )
    pruner.make_corrector = make
    pruner.step()
    return model


def ignored_layers(model: nn.Module, roots: Sequence[str] | None, example_inputs: Any) -> list[nn.Module]:
    """The layers that root no pruned group: all but `roots`, or only the one that is called last (the classifier)."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _LAYERS)}
    if roots is None:
        inputs = example_inputs if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
        with evaluating(model):
            return [layers[call_order(lambda: model(*inputs), model, _LAYERS)[-1]]]
    if missing := set(roots) - set(layers):
        raise ValueError(f"the network has no convolution or linear layer named {', '.join(sorted(missing))}")
    return [module for name, module in layers.items() if name not in roots]
