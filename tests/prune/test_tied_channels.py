"""Channels that can only go together, as the halves of a gated layer, are chosen together, as many as are asked for."""

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

from intrafusion import IntraFusionPruner
from intrafusion.groups.table import ties
from tests.groups.test_heads import l1


class Gated(nn.Module):
    """One linear layer makes a gate and what it is multiplied with, as in Phi-3, timm's GluMlp and diffusion models."""

    def __init__(self, parts=2):
        super().__init__()
        self.parts = parts
        self.first, self.gated, self.reader = nn.Linear(5, 8), nn.Linear(8, 12 * parts), nn.Linear(12, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        made = None
        for part in self.gated(x).chunk(self.parts, dim=-1):
            made = F.silu(part) if made is None else made * part
        return self.last(x + self.reader(made))


class GatedImage(nn.Module):
    """The same with convolutions, as in NAFNet."""

    def __init__(self, parts=2):
        super().__init__()
        self.first, self.gated, self.reader = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 24, 1), nn.Conv2d(12, 8, 1)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        one, other = self.gated(x).chunk(2, dim=1)
        return self.last((x + self.reader(one * other)).mean(dim=(2, 3)))


CASES = [
    (Gated, {}, (5,)),
    (Gated, {}, (6, 5)),
    (Gated, {"parts": 3}, (6, 5)),
    (GatedImage, {}, (3, 7, 7)),
]


def table_of(pruner: IntraFusionPruner, model: nn.Module):
    handler = tp.prune_linear_out_channels if isinstance(model.gated, nn.Linear) else tp.prune_conv_out_channels
    return pruner.table(pruner.DG.get_pruning_group(model.gated, handler, [0]))


@pytest.mark.parametrize(("make", "options", "shape"), CASES)
@pytest.mark.parametrize(("fusion", "ratio"), [("discard", 0.25), ("discard", 0.75), ("calibrated", 0.5)])
def test_a_gated_layer_loses_what_is_asked_for(make, options, shape, fusion, ratio):
    torch.manual_seed(0)
    model, x = make(**options), torch.randn(64, *shape)
    pruner = IntraFusionPruner(
        model, x[:2], l1(), pruning_ratio=ratio, ignored_layers=[model.last, model.first], fusion=fusion,
        calibration=[x] if fusion == "calibrated" else None,
    )  # fmt: skip
    pruner.step()
    left = 12 - int(12 * ratio)
    made = model.gated.weight.shape[0]
    assert (made, model.reader.weight.shape[1]) == (options.get("parts", 2) * left, left)
    assert model(x).shape == (64, *(shape[:-1] if shape[-1] == 5 else ()), 3)


@pytest.mark.parametrize(("make", "options", "shape"), CASES)
def test_the_weakest_units_go_whatever_their_halves_are_alone(make, options, shape):
    torch.manual_seed(0)
    model, x = make(**options), torch.randn(2, *shape)
    parts = options.get("parts", 2)
    strength = torch.rand(12) + 0.5
    score = torch.stack([strength, *torch.rand(parts - 1, 12)])  # the first half alone says another order

    pruner = IntraFusionPruner(
        model, x, lambda group: score.flatten().clone() if len(group[0].idxs) == 12 * parts else None,
        pruning_ratio=0.5, ignored_layers=[model.last, model.first], fusion="discard",
    )  # fmt: skip
    before = model.reader.weight.detach().clone()
    labels = ties(table_of(pruner, model))
    assert labels is not None
    assert torch.equal(labels.reshape(parts, 12), labels[:12].expand(parts, 12))
    assert len(labels.unique()) == 12
    pruner.step()
    kept = score.mean(dim=0).topk(6).indices.sort().values
    assert torch.equal(model.reader.weight, before[:, kept])


@pytest.mark.parametrize("score", [lambda n: torch.zeros(n), lambda n: torch.ones(n, dtype=torch.float64) * 3])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_units_of_equal_score_go_one_by_one(score, ratio):
    """Torch-Pruning would take a half of each of several, and with it all of them."""
    model = Gated(2)
    pruner = IntraFusionPruner(
        model, torch.randn(2, 5), lambda group: score(len(group[0].idxs)), pruning_ratio=ratio,
        ignored_layers=[model.last, model.first], fusion="discard",
    )  # fmt: skip
    pruner.step()
    assert model.reader.in_features == 12 - int(12 * ratio)


@pytest.mark.parametrize(("make", "options", "shape"), CASES)
@pytest.mark.parametrize("fusion", ["discard", "calibrated"])
def test_a_gated_layer_is_cut_again(make, options, shape, fusion):
    """Torch-Pruning forgets where the halves begin after a cut."""
    torch.manual_seed(0)
    model, x = make(**options), torch.randn(64, *shape)
    pruner = IntraFusionPruner(
        model, x[:2], l1(), pruning_ratio=0.5, iterative_steps=3, ignored_layers=[model.last, model.first],
        fusion=fusion, calibration=[x] if fusion == "calibrated" else None,
    )  # fmt: skip
    for left in (10, 8, 6):
        pruner.step()
        assert model.reader.weight.shape[1] == left
        assert model.gated.weight.shape[0] == options.get("parts", 2) * left
        labels = ties(table_of(pruner, model))
        assert labels is not None
        assert torch.equal(labels.reshape(-1, left), labels[:left].expand(options.get("parts", 2), left))


def test_where_nothing_is_tied_there_are_no_labels():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    pruner = IntraFusionPruner(model, torch.randn(2, 4), l1(), pruning_ratio=0.5, fusion="discard")
    group = pruner.DG.get_pruning_group(model[0], tp.prune_linear_out_channels, [0])
    assert ties(pruner.table(group)) is None
