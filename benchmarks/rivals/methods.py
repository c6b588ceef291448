"""Every method of the comparison by name, each pruning a copy of the same network to the same widths."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from benchmarks.rivals.base import ignored_layers, prune_with
from benchmarks.rivals.folding import FoldAR, Folding, FoldR
from benchmarks.rivals.grail import Grail, GrailReestimated
from benchmarks.rivals.lbyl import LBYL, tuned_lbyl
from benchmarks.rivals.neuron_merging import NeuronMerging
from benchmarks.rivals.repair import Reestimated, Repaired
from intrafusion import Fusion, IntraFusionPruner


@dataclass(frozen=True)
class Method:
    """One method of the comparison.

    images: True if it sees the unlabelled images. source: the paper, in one line.
    prune(dense, roots, ratio, importance, example_inputs, *, images, seed): a pruned copy of `dense`; only groups
    rooted at the layer names in `roots` are pruned (None: all but that of the layer called last, the classifier).
    """

    name: str
    images: bool
    source: str
    prune: Callable[..., nn.Module]


def ours(
    fusion: Fusion,
    dense: nn.Module,
    roots: Sequence[str] | None,
    ratio: float,
    importance: Callable,
    example_inputs: Any,
    *,
    images: Sequence[Tensor] | None = None,
    seed: int = 0,
) -> nn.Module:
    """A preset of this package."""
    model = copy.deepcopy(dense)
    pruner = IntraFusionPruner(
        model,
        example_inputs,
        importance,
        pruning_ratio=ratio,
        ignored_layers=ignored_layers(model, roots, example_inputs),
        fusion=replace(fusion, seed=seed),
        calibration=images if fusion.correct == "calibrated" else None,
    )
    pruner.step()
    return model


def _theirs(
    make: Callable,
    settings: dict[str, Any],
    sees: bool,
    dense: nn.Module,
    roots: Sequence[str] | None,
    ratio: float,
    importance: Callable,
    example_inputs: Any,
    *,
    images: Sequence[Tensor] | None = None,
    seed: int = 0,
) -> nn.Module:
    """A rival's corrector; it gets the images only if it `sees` them."""
    given = images if sees else None
    return prune_with(partial(make, seed=seed), dense, roots, ratio, importance, example_inputs, given, **settings)


def _rival(name: str, source: str, make: Callable, images: bool = False, **settings: Any) -> Method:
    return Method(name, images, source, partial(_theirs, make, settings, images))


def _preset(name: str, source: str, fusion: Fusion, images: bool = False) -> Method:
    return Method(name, images, source, partial(ours, fusion))


_TP = "Torch-Pruning (Fang et al., CVPR 2023)"
_PAPER = "Intra-Fusion (Theus et al., ICLR 2024, arXiv 2402.07839)"
_FOLDING = "Model Folding (Wang et al., ICLR 2025, arXiv 2502.10216)"
_MERGING = "Neuron Merging (Kim et al., NeurIPS 2020)"
_LBYL = "LBYL (Lee et al., arXiv 2502.08474)"
_GRAIL = "GRAIL (Tang et al., CPAL 2026, arXiv 2602.23795)"
_REPAIR = "REPAIR (Jordan et al., ICLR 2023, arXiv 2211.08403)"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        _preset("discard", _TP, Fusion.preset("discard")),
        _rival("Folding", _FOLDING, Folding),
        _rival("Fold-AR", _FOLDING, FoldAR),
        _rival("Neuron Merging", _MERGING, NeuronMerging),
        _rival("LBYL", f"{_LBYL}, fixed weights", LBYL),
        _preset("paper", _PAPER, Fusion.preset("paper")),
        _preset("paper, same channels", f"{_PAPER}, torch-pruning's channels", Fusion(merge="paper")),
        _preset("data-free", "ours", Fusion.preset("data-free")),
        _rival("discard + batch-norm", f"{_TP}, batch-norm statistics re-estimated", Reestimated, images=True),
        _rival("discard + REPAIR", _REPAIR, Repaired, images=True),
        _rival(
            "paper + REPAIR",
            f"{_PAPER}, then {_REPAIR}",
            partial(Repaired, merged=True),
            images=True,
            fusion=Fusion(merge="barycentre"),
        ),
        _rival("Fold-R", _FOLDING, FoldR, images=True),
        Method("LBYL, tuned", True, f"{_LBYL}, weights tuned on the images", tuned_lbyl),
        _rival("GRAIL", _GRAIL, Grail, images=True),
        _rival("GRAIL + batch-norm", f"{_GRAIL}, batch-norm statistics re-estimated", GrailReestimated, images=True),
        _preset("calibrated", "ours", Fusion.preset("calibrated"), images=True),
    )
}
"""By name, in the order of the table: those that see no image first, ours last in each half."""
