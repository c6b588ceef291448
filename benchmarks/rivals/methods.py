"""Every method of the comparison by name, each pruning a copy of the same network to the same widths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from benchmarks.rivals import folding, grail, neuron_merging, repair  # noqa: F401  what they define is registered
from benchmarks.rivals.base import pruned
from benchmarks.rivals.lbyl import tuned_lbyl
from intrafusion import Fusion


@dataclass(frozen=True)
class Entry:
    """One method of the comparison.

    images: True if it sees the unlabelled images. source: the paper, in one line.
    prune(dense, roots, ratio, importance, example_inputs, *, images, seed): a pruned copy of `dense`; only groups
    rooted at the layer names in `roots` are pruned (None: all but that of the layer called last, the classifier).
    """

    name: str
    images: bool
    source: str
    prune: Callable[..., nn.Module]

    @staticmethod
    def of(name: str, source: str, fusion: Fusion | None = None) -> Entry:
        """The method that `fusion` names; the one registered as `name` if there is none."""
        fusion = Fusion(merge=name) if fusion is None else fusion
        return Entry(name, fusion.method().inputs == "calibration", source, partial(prune, fusion))


def prune(
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
    """What ours and every rival do with a network; the images are given only to a method that looks at them."""
    given = images if fusion.method().inputs == "calibration" else None
    return pruned(replace(fusion, seed=seed), dense, roots, ratio, importance, example_inputs, given)


_TP = "Torch-Pruning (Fang et al., CVPR 2023)"
_PAPER = "Intra-Fusion (Theus et al., ICLR 2024, arXiv 2402.07839)"
_FOLDING = "Model Folding (Wang et al., ICLR 2025, arXiv 2502.10216)"
_MERGING = "Neuron Merging (Kim et al., NeurIPS 2020)"
_LBYL = "LBYL (Lee et al., arXiv 2502.08474)"
_GRAIL = "GRAIL (Tang et al., CPAL 2026, arXiv 2602.23795)"
_REPAIR = "REPAIR (Jordan et al., ICLR 2023, arXiv 2211.08403)"

METHODS: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry.of("discard", _TP, Fusion.preset("discard")),
        Entry.of("Folding", _FOLDING),
        Entry.of("Fold-AR", _FOLDING),
        Entry.of("Neuron Merging", _MERGING),
        Entry.of("LBYL", f"{_LBYL}, fixed weights"),
        Entry.of("paper", _PAPER, Fusion.preset("paper")),
        Entry.of("paper, same channels", f"{_PAPER}, torch-pruning's channels", Fusion(merge="paper")),
        Entry.of("data-free", "ours", Fusion.preset("data-free")),
        Entry.of("discard + batch-norm", f"{_TP}, batch-norm statistics re-estimated"),
        Entry.of("discard + REPAIR", _REPAIR),
        Entry.of("paper + REPAIR", f"{_PAPER}, then {_REPAIR}"),
        Entry.of("Fold-R", _FOLDING),
        Entry("LBYL, tuned", True, f"{_LBYL}, weights tuned on the images", tuned_lbyl),
        Entry.of("GRAIL", _GRAIL),
        Entry.of("GRAIL + batch-norm", f"{_GRAIL}, batch-norm statistics re-estimated"),
        Entry.of("calibrated", "ours", Fusion.preset("calibrated")),
    )
}
"""By name, in the order of the table: those that see no image first, ours last in each half."""
