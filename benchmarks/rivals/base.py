"""What the rivals share: weights described before the first cut, the spread of merged channels, statistics from images.

Every rival is a `Method` of this package, registered by its name: `IntraFusionPruner(..., fusion=Fusion(merge=name))`
prunes with it, as with one of ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning import ops

from intrafusion import Fusion, IntraFusionPruner, Method
from intrafusion.groups.batchnorm import read
from intrafusion.groups.table import GroupTable, Slot
from intrafusion.methods.view import View
from intrafusion.running import call_order, evaluating

Run = Callable[[nn.Module, Any], Any]

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


class WeightRival(Method):
    """A rival that compares the weights of the dense network, whatever was pruned before.

    The groups are described before the first cut, as in the papers: a later group's weights do not change with the
    pairs of the groups before it. Of the plan only the kept channels are looked at.

    Attributes:
        parts: what of the weights is compared, as `View.features` calls it.
    """

    plan = False
    parts: tuple[str, ...] = ("filters", "biases")

    def __init__(self) -> None:
        self._weights: dict[tuple[str, str], Tensor] = {}

    def begin(self, view: View, tables: Sequence[GroupTable]) -> None:
        for table in tables:
            for part in self.parts if not table.unsupported else ():
                self._weights[table.name, part] = _features(view, table, part)

    def weights(self, table: GroupTable, part: str) -> Tensor:
        """[n, d] one part of the weights of a group's channels, batch-norm folded in; d is 0 where there is none.

        `filters` that produce each channel, `readers` of it, the folded `biases` of its producers.
        """
        return self._weights[table.name, part]


def _features(view: View, table: GroupTable, part: str) -> Tensor:
    try:
        return view.features(table, part)
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
def reestimate_(model: nn.Module, run: Run, batches: Sequence) -> None:
    """Replace the statistics of every batch-norm by those of the batches, each of which weighs the same."""
    norms: list[Any] = [m for m in model.modules() if isinstance(m, ops.TORCH_BATCHNORM) and m.running_mean is not None]
    saved = [(bn, bn.momentum) for bn in norms]
    with evaluating(model):
        for bn in norms:
            bn.running_mean, bn.running_var = torch.zeros_like(bn.running_mean), torch.ones_like(bn.running_var)
            bn.num_batches_tracked = torch.zeros_like(bn.num_batches_tracked)
            bn.momentum = None  # a plain average over the batches
            bn.train()
        for batch in batches:
            run(model, batch)
    for bn, momentum in saved:
        bn.momentum = momentum


def pruned(
    fusion: Fusion,
    dense: nn.Module,
    roots: Sequence[str] | None,
    ratio: float,
    importance: Callable,
    example_inputs: Any,
    images: Sequence[Tensor] | None = None,
) -> nn.Module:
    """A pruned copy of `dense`, by the pruner that a user has.

    roots: the layers whose groups are pruned; None for all but the layer called last. images: only for a method that
    looks at images of the user's own.
    """
    model = copy.deepcopy(dense)
    pruner = IntraFusionPruner(
        model,
        example_inputs,
        importance,
        pruning_ratio=ratio,
        ignored_layers=ignored_layers(model, roots, example_inputs),
        fusion=fusion,
        calibration=images,
    )
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
