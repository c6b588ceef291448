"""Training goes on when heads and streams have been cut: averages and optimizers follow."""

import copy

import pytest
import torch
import torch_pruning as tp
from torch import nn

from intrafusion import IntraFusionPruner, transfer_optimizer_state
from intrafusion.training.averaged_weights import prune_twin_
from tests.correct.test_streams import MyRMSNorm, ids, residual
from tests.groups.test_heads import Packed, _with_circuits_of_rank, network


def tokens():
    return torch.randn(96, 6, 5, generator=torch.Generator().manual_seed(2))


def packed():
    torch.manual_seed(0)
    return Packed().eval()


def pruned(model, x, widths, fusion):
    l1 = tp.importance.GroupMagnitudeImportance(p=1)
    ignored = [model.scores] if hasattr(model, "scores") else []
    given = [x] if fusion == "calibrated" else None
    pruner = IntraFusionPruner(
        model, x[:1], l1, widths=widths, ignored_layers=ignored, fusion=fusion, calibration=given
    )
    pruner.keep_inputs = True
    return pruner


CASES = {
    "heads": (lambda: network(shared=2, rotary=True), tokens, {"heads": 0.5}),
    "inside": (lambda: network(shared=2), tokens, {"head_dim": 0.5}),
    "both": (packed, tokens, {"head_dim": 0.5, "heads": 0.3}),
    "rms stream": (lambda: residual(nn.RMSNorm), ids, {"stream": 0.25, "feed_forward": 0.5}),
    "own norm": (lambda: residual(MyRMSNorm, tied=True), ids, {"stream": 0.25}),
    "layer-norm stream": (lambda: residual(nn.LayerNorm), ids, {"stream": 0.25}),
}


@pytest.mark.parametrize("fusion", ["calibrated", "barycentre"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:.*could only be cut", "ignore:.*ties its weight")
def test_an_average_that_is_equal_to_the_network_stays_equal(case, fusion):
    make, inputs, widths = CASES[case]
    model = make()
    twin = copy.deepcopy(model)
    pruner = pruned(model, inputs(), widths, fusion)
    pruner.step()
    prune_twin_(pruner, twin)
    after = twin.state_dict()
    assert after.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(after[name], value, rtol=1e-5, atol=1e-6)


def low_rank_heads(shared=1):
    return _with_circuits_of_rank(network(shared=shared), 2)


def few_directions(norm):
    model = residual(norm)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(1)))[0][:5]
    with torch.no_grad():
        model.tokens.weight.copy_(model.tokens.weight @ basis.T @ basis)
        for down in model.down:
            down.weight.copy_(basis.T @ basis @ down.weight)
            down.bias.copy_(basis.T @ basis @ down.bias)
    return model


@pytest.mark.parametrize(
    ("make", "inputs", "widths"),
    [
        (low_rank_heads, tokens, {"head_dim": 0.5}),
        (lambda: low_rank_heads(2), tokens, {"head_dim": 0.5}),
        (lambda: few_directions(nn.RMSNorm), ids, {"stream": 0.5}),
    ],
    ids=["heads", "shared keys", "stream"],
)
def test_momenta_are_the_gradients_of_the_network_that_computes_the_same(make, inputs, widths):
    model = make()
    sgd = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    adam = torch.optim.Adam(model.parameters(), lr=0.0)
    model(inputs()).square().sum().backward()
    sgd.step()
    adam.step()
    pruner = pruned(model, inputs(), widths, "calibrated")
    pruner.step()
    transfer_optimizer_state(sgd, pruner)
    transfer_optimizer_state(adam, pruner)
    model.zero_grad()
    model(inputs()).square().sum().backward()
    norms = {id(p) for m in model.modules() if isinstance(m, nn.RMSNorm) for p in m.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in norms:  # a gain of a turned stream is not what one of the gains was
            momentum = sgd.state[parameter]["momentum_buffer"]
            assert (momentum - parameter.grad).norm() < 2e-2 * parameter.grad.norm() + 1e-3, name
        root = (adam.state[parameter]["exp_avg_sq"] / 0.001).sqrt()
        assert torch.isfinite(root).all(), name


def test_a_weight_that_was_tied_is_known_to_the_optimizer():
    model = residual(nn.RMSNorm, tied=True)
    adam = torch.optim.Adam(model.parameters())
    model(ids()).square().sum().backward()
    adam.step()
    pruner = pruned(model, ids(), {"stream": 0.25}, "calibrated")
    pruner.step()
    transfer_optimizer_state(adam, pruner)
    held = {id(p) for group in adam.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert (
        adam.state[model.scores.weight]["exp_avg"].shape == adam.state[model.tokens.weight]["exp_avg"].shape == (20, 9)
    )
