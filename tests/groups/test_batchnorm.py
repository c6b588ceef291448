"""Batch-norm folded and made real again."""

from __future__ import annotations

import pytest
import torch
import torch_pruning as tp
from torch import nn

from intrafusion import Fusion, IntraFusionPruner
from intrafusion.groups.batchnorm import Affine, folded, merge, recenter_batchnorms_, row_average
from intrafusion.groups.coefficients import Coefficients
from intrafusion.groups.table import batchnorm_of
from tests.nets import PICO, randomise_


def pair(layer: nn.Module, bn: nn.Module) -> nn.Sequential:
    return randomise_(nn.Sequential(layer, bn))


pytestmark = pytest.mark.filterwarnings("ignore:Unwrapped parameters")

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


def moments(model, x):
    """By batch-norm: its name, itself, and mean and variance per channel of what it reads in eval mode."""
    seen = []

    def see(name, norm):
        def hook(_, inputs):
            rows = inputs[0].transpose(0, 1).flatten(1).double()
            seen.append((name, norm, rows.mean(1), rows.var(1, correction=0)))

        return hook

    norms = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    hooks = [norm.register_forward_pre_hook(see(name, norm)) for name, norm in norms]
    with torch.no_grad():
        model.eval()(x)
    for hook in hooks:
        hook.remove()
    return seen


def settled_(model, x):
    """A network whose batch-norms have the statistics of x, as training leaves them."""
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.momentum = None
            norm.reset_running_stats()
    with torch.no_grad():
        for _ in range(40):  # shared layers average over their calls
            model.train()(x)
    return model.eval()


@pytest.mark.parametrize("preset", ["data-free", "calibrated"])
@pytest.mark.parametrize("name", ["plain", "residual", "depthwise", "conv1d3d"])
def test_a_pruned_network_has_batchnorms_with_the_statistics_of_its_data(name, preset):
    """Half of the running means lie within 0.6 standard deviations, half of the variances within a factor of 2.

    So evaluation and training mode start near each other. The presets that correct nothing (paper, barycentre, discard)
    are not held to it: behind merged or cut inputs their batch-norms keep the statistics of the dense network.
    """
    case = next(case for case in PICO if case.name == name)
    model, x = case.model(), torch.randn(400, *case.shape)
    settled_(model, x)
    calibration = [x] if preset == "calibrated" else None
    metric = tp.importance.GroupMagnitudeImportance(p=1)
    IntraFusionPruner(
        model, x[:2], metric, pruning_ratio=0.5, ignored_layers=case.ignored(model), fusion=preset,
        calibration=calibration,
    ).step()  # fmt: skip
    seen = moments(model, x)
    assert {found for found, *_ in seen} == {n for n, m in model.named_modules() if "BatchNorm" in type(m).__name__}
    for _, norm, mean, var in seen:
        assert norm.training is False
        off = (norm.running_mean - mean).abs() / (var + norm.eps).sqrt()
        factor = ((norm.running_var + norm.eps) / (var + norm.eps)).log().abs()
        assert off.median().item() < 0.6
        assert factor.median().item() < 0.7
    with torch.no_grad():
        calm, busy = model.eval()(x), model.train()(x)
    assert ((calm - busy).square().mean().sqrt() / calm.std()).item() < 0.6


@pytest.mark.parametrize("preset", ["discard", "paper"])
@pytest.mark.parametrize("case", [case for case in PICO if case.name != "mlp"], ids=lambda case: case.name)
def test_recentred_batchnorms_compute_the_same_and_know_their_data(case, preset):
    model, x = case.model(), torch.randn(300, *case.shape)
    metric = tp.importance.GroupMagnitudeImportance(p=1)
    IntraFusionPruner(model, x[:2], metric, pruning_ratio=0.5, ignored_layers=case.ignored(model), fusion=preset).step()
    model.train()
    model.fc2.eval() if case.name == "plain" else model.fc.eval()
    modes = [module.training for module in model.modules()]
    with torch.no_grad():
        before = model.eval()(x)
        for module, mode in zip(model.modules(), modes, strict=True):
            module.training = mode
        changed = recenter_batchnorms_(model, [x[:100], (x[100:], None)])
        assert [module.training for module in model.modules()] == modes
        after = model.eval()(x)
        busy = model.train()(x)
    assert changed == sum(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine for m in model.modules())
    assert (after - before).abs().max().item() < 1e-5 * before.abs().max().clamp(min=1).item()
    for norm in (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine):
        assert norm.weight.requires_grad
    if case.name not in (
        "plain",
        "reused",
        "transposed",
    ):  # a non-affine norm, one norm for two calls, an instance-norm
        assert (busy - before).abs().max().item() < 1e-3 * before.abs().max().item()


def test_recentring_uses_the_moments_of_all_batches_together():
    model = pair(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    x = torch.randn(50, 3, 6, 6) + torch.arange(50.0)[:, None, None, None]
    recenter_batchnorms_(model, x.split([7, 30, 13]))
    ((_, norm, mean, var),) = moments(model, x)
    assert torch.allclose(norm.running_mean.double(), mean, rtol=1e-4)
    assert torch.allclose(norm.running_var.double(), var, rtol=1e-4)


def test_a_failed_recentring_changes_nothing():
    model = pair(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="at least one batch"):
        recenter_batchnorms_(model, [])
    with pytest.raises(ValueError, match="input of batch-norm '1' is not finite"):
        recenter_batchnorms_(model, [torch.full((2, 3, 5, 5), float("nan"))])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model[1]._forward_pre_hooks


def test_a_nearly_dead_member_with_a_huge_coefficient_does_not_shrink_the_filter() -> None:
    """The optimiser's steps are relative to the filter's size, so a tiny filter would be lost in the first of them."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    rows[2] *= 1e-2
    gamma = torch.tensor([0.6, 0.5, 1e-3], dtype=torch.float64)
    var = rows.square().sum(dim=1)
    scale = gamma / (var + 1e-5).sqrt()
    zero = torch.zeros(3, dtype=torch.float64)
    mix = torch.tensor([[0.7, 0.2, 150.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    new = merge(rows, zero, Affine(scale, gamma, zero, zero, var, 1e-5), Coefficients.of(mix), affine=True)
    norms = new.rows.norm(dim=1)
    assert 0.3 < norms[0] / rows[0].norm() < 1.5
    torch.testing.assert_close(new.rows[1:], rows[[2, 1]])
    folded = (new.gamma / (new.var + 1e-5).sqrt())[:, None] * new.rows
    torch.testing.assert_close(folded, mix @ (scale[:, None] * rows))
