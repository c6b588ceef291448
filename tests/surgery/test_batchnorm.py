"""Batch-norm folded and made real again."""

from __future__ import annotations

import pytest
import torch
import torch_pruning as tp
from torch import nn

from intrafusion import Fusion, IntraFusionPruner
from intrafusion.surgery.batchnorm import folded, row_average
from intrafusion.surgery.groups import batchnorm_of
from tests.nets import randomise_


def pair(layer: nn.Module, bn: nn.Module) -> nn.Sequential:
    return randomise_(nn.Sequential(layer, bn))


LAYERS = {
    "conv1d": (lambda: nn.Conv1d(3, 6, 3), nn.BatchNorm1d, (3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d, (3, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(3, 6, 2), nn.BatchNorm3d, (3, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 6, 2, stride=2), nn.BatchNorm2d, (3, 4, 4)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d, (4, 5, 5)),
    "linear": (lambda: nn.Linear(3, 6), nn.BatchNorm1d, (3,)),
}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
@pytest.mark.parametrize("name", LAYERS)
def test_the_folded_layer_is_the_layer_and_its_batchnorm(name, eps, affine):
    make, norm, shape = LAYERS[name]
    net, x = pair(make(), norm(6, eps=eps, affine=affine)), torch.randn(5, *shape)
    before, weight, bias = net(x), net[0].weight, net[0].bias
    with folded([(net[0], net[1], int(name == "transposed"))]):
        gap = (net[0](x) - before).abs().max() / before.abs().max()
        assert gap.item() < 1e-5
        assert not net[1].affine
    assert net[0].weight is weight
    assert net[0].bias is bias
    assert net[1].affine is affine
    assert torch.equal(net(x), before)


def test_folding_is_undone_when_the_metric_fails():
    net = pair(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(ZeroDivisionError), folded([(net[0], net[1], 0)]):
        raise ZeroDivisionError
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


class Measured(nn.Module):
    """White inputs and batch-norms whose statistics are those of the data: what the closed forms assume."""

    def __init__(self, affine=True):
        super().__init__()
        self.a, self.bn = nn.Linear(24, 16), nn.BatchNorm1d(16, affine=affine, momentum=None)
        self.b = nn.Linear(16, 4)

    def forward(self, x):
        return self.b(torch.relu(self.bn(self.a(x))))


@pytest.mark.parametrize("merge", ["paper", "barycentre"])
def test_training_mode_starts_from_the_same_function(merge):
    """The rebuilt running statistics are those that a batch has: eval and train outputs agree."""
    model, x = randomise_(Measured()), torch.randn(20000, 24)
    model.bn.reset_running_stats()
    with torch.no_grad():
        model.train()(x)
    metric = tp.importance.GroupMagnitudeImportance(p=1)
    IntraFusionPruner(model, x[:2], metric, ignored_layers=[model.b], fusion=Fusion(merge=merge)).step()
    with torch.no_grad():
        calm = model.eval()(x)
        busy = model.train()(x)
    gap = (calm - busy).square().mean().sqrt() / calm.std()
    assert gap.item() < 0.05


def test_rebuilt_batchnorms_are_real():
    model = randomise_(Measured())
    IntraFusionPruner(
        model, torch.randn(2, 24), tp.importance.GroupMagnitudeImportance(p=1), ignored_layers=[model.b]
    ).step()
    assert isinstance(model.bn, nn.BatchNorm1d)
    assert model.bn.running_mean.shape == model.bn.running_var.shape == model.bn.weight.shape == (8,)
    assert (model.bn.running_var > 0).all()
    assert model.bn.weight.abs().min().item() > 0
    assert model.bn.running_var.max().item() < 10


def test_a_non_affine_batchnorm_keeps_the_eval_output_of_the_fused_network():
    model = randomise_(Measured(affine=False))
    x = torch.randn(9, 24)
    scale = 1 / (model.bn.running_var + model.bn.eps).sqrt()
    by_hand = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4))
    by_hand[0].weight.data = scale[:, None] * model.a.weight.data
    by_hand[0].bias.data = scale * (model.a.bias.data - model.bn.running_mean)
    by_hand[2].load_state_dict(model.b.state_dict())
    assert torch.allclose(by_hand(x), model(x), atol=1e-5)
    for net, ignored in ((model, model.b), (by_hand, by_hand[2])):
        metric = tp.importance.GroupMagnitudeImportance(p=1)
        IntraFusionPruner(net, x, metric, ignored_layers=[ignored], fusion="paper").step()
    assert torch.allclose(by_hand(x), model(x), atol=1e-5)


def test_gains_are_averaged_with_weights_that_sum_to_one():
    mix = torch.tensor([[0.5, 1.5, 0.0], [1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]).double()
    average = row_average(mix)
    assert torch.allclose(average[0], torch.tensor([0.25, 0.75, 0.0]).double())
    assert torch.allclose(average[1], torch.tensor([0.5, 0.5, 0.0]).double())
    assert torch.isfinite(average).all()


def test_only_a_batchnorm_that_alone_reads_a_layer_is_folded():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.bn, self.b = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

        def forward(self, x):
            y = self.a(x)
            return self.b(self.bn(y) + y)

    for net, expected in ((Measured(), True), (Shared(), False)):
        net.eval()
        x = torch.randn(2, net.a.in_features)
        graph = tp.DependencyGraph().build_dependency(net, (x,))
        assert (batchnorm_of(graph, net.a) is net.bn) is expected
