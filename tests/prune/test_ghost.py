"""Ghost modules: half of a layer's channels are made from its others by a depthwise convolution, and put beside them.

Behind a residual sum the two halves are tied to each other, so that one channel of a group is two of a layer.
"""

from __future__ import annotations

import pytest
import torch
import torch_pruning as tp
from torch import nn

from intrafusion import PRESETS, Fusion, IntraFusionPruner
from intrafusion.groups.apply import apply_pair
from intrafusion.groups.table import tabulate
from intrafusion.ot import Pair
from intrafusion.ot.merge import selection_pair
from tests.nets import randomise_


class Ghost(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.primary = nn.Sequential(nn.Conv2d(inputs, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU())
        cheap = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.cheap = nn.Sequential(cheap, nn.BatchNorm2d(half), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.primary(x)
        return torch.cat([x, self.cheap(x)], 1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.ghosts = nn.Sequential(Ghost(8, 8), Ghost(8, 8))
        strided = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False)
        self.shortcut = nn.Sequential(strided, nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1))
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(self.shortcut(x + self.ghosts(x)).relu().mean((2, 3)))


def pruner_of(fusion: str):
    torch.manual_seed(0)
    model, x = randomise_(Net()).eval(), torch.randn(2, 3, 8, 8)
    options = {"fusion": fusion}
    if fusion == "calibrated":
        options["calibration"] = [torch.randn(16, 3, 8, 8) for _ in range(4)]
    score = tp.importance.GroupMagnitudeImportance(p=1)
    return model, x, IntraFusionPruner(model, x, score, pruning_ratio=0.5, ignored_layers=[model.head], **options)


@pytest.mark.filterwarnings("ignore:.*than its discarded twin")
@pytest.mark.parametrize("fusion", sorted(PRESETS))
def test_every_preset_cuts_a_ghost_network_to_the_widths_of_torch_pruning(fusion):
    plain, x, pruner = pruner_of("discard")
    pruner = tp.pruner.BasePruner(plain, x, pruner.importance, pruning_ratio=0.5, ignored_layers=[plain.head])
    pruner.step()
    model, _, pruner = pruner_of(fusion)
    pruner.step()
    shapes = [tuple(parameter.shape) for parameter in plain.parameters()]
    assert [tuple(parameter.shape) for parameter in model.parameters()] == shapes
    assert model(x).isfinite().all()


def test_as_many_scores_as_channels_where_the_first_layer_with_a_score_reads_them_twice():
    model, _, pruner = pruner_of("paper")  # folds the batch-norms, and a depthwise filter has no score of its own
    cheap = model.ghosts[0].cheap[0]
    group = pruner.DG.get_pruning_group(cheap, tp.prune_depthwise_conv_out_channels, [0, 1, 2, 3])
    score = pruner.estimate_importance(group)
    assert score.shape == (4,)
    assert (score > 0).all()


def test_tied_channels_are_read_anew_where_they_stay():
    model, _, pruner = pruner_of("discard")
    table = tabulate(pruner.DG, model.shortcut[0], tp.prune_depthwise_conv_out_channels)
    kept = torch.tensor([1, 5])
    assert {tuple(slot.local[1].tolist()) for slot in table.slots if slot.size == 8} == {(1, 5)}
    chosen = selection_pair(kept, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    apply_pair(table, Pair(chosen.rows, chosen.columns / 2, kept))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"ghosts.0.primary.0.weight", "shortcut.2.weight"}
    for name in changed:
        at = [1, 5]
        assert torch.equal(model.state_dict()[name][:, at], before[name][:, at] / 2)


@pytest.mark.filterwarnings("ignore:.*than its discarded twin")
def test_their_widths_can_be_measured_on_the_folded_network():
    model, x, pruner = pruner_of("discard")
    fusion = Fusion(merge="barycentre", cost="l2", score_on="folded")
    pruner = IntraFusionPruner(
        model, x, pruner.importance, pruning_ratio=0.5, ignored_layers=[model.head], fusion=fusion,
        allocation="measured",
    )  # fmt: skip
    pruner.progress = False
    pruner.step()
    assert pruner.report.allocation is not None
    assert model(x).isfinite().all()
