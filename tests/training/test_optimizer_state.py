"""An optimizer goes on after a pruning step: its state travels by the maps of the weights."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

from intrafusion import Fusion, IntraFusionPruner, transfer_optimizer_state
from tests.nets import PICO, Case, randomise_
from tests.prune.test_invariance import DUPLICABLE, build, duplicate_channels_, keep_even_channels
from tests.training.optimizers import OPTIMIZERS, held, tensors, train_

DUPLICATES = Fusion(merge="barycentre", features=("filters", "biases"))


def cut_by_torch_pruning(case: Case, values: dict[str, Tensor], history: list) -> dict[str, Tensor]:
    """What torch-pruning leaves of `values` (by parameter name) if they are the weights."""
    model = case.model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
        graph = tp.DependencyGraph().build_dependency(model, (case.example(),))
    graph.load_pruning_history(history)
    return dict(model.named_parameters())


@pytest.mark.parametrize("make", ["sgd", "adam", "rmsprop"])
@pytest.mark.parametrize("case", PICO, ids=lambda case: case.name)
def test_what_is_only_cut_keeps_the_state_of_what_stays_bit_for_bit(case, make):
    model, pruner = build(case, pruning_ratio=0.5, fusion="discard")
    optimizer = OPTIMIZERS[make](model.parameters())
    train_(model, optimizer, case)
    before = {name: tensors(optimizer, p) for name, p in model.named_parameters()}
    pruner.step()
    transfer_optimizer_state(optimizer, pruner)
    assert [id(p) for p in held(optimizer)] == [id(p) for p in model.parameters()]
    for key in before["fc.bias" if "fc.bias" in before else next(iter(before))]:
        want = cut_by_torch_pruning(
            case, {name: state[key] for name, state in before.items()}, pruner.pruning_history()
        )
        for name, parameter in model.named_parameters():
            assert torch.equal(optimizer.state[parameter][key], want[name]), (name, key)
    assert all(float(optimizer.state[p]["step"]) == 3 for p in held(optimizer) if "step" in optimizer.state[p])


@pytest.mark.parametrize("case", DUPLICABLE, ids=lambda case: case.name)
def test_of_merged_duplicates_momentum_is_the_gradient_of_the_merged_network(case):
    """One step of learning rate 0 puts the gradient into the momentum; autograd says what it has to become."""
    model, pruner = build(case, pruning_ratio=0.5, fusion=DUPLICATES)
    duplicate_channels_(pruner)
    pruner.importance = keep_even_channels
    sgd = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    adam = torch.optim.Adam(model.parameters(), lr=0.0)
    model(case.example()).square().sum().backward()
    sgd.step()
    adam.step()
    pruner.step()
    assert pruner.report.fused
    for optimizer in (sgd, adam):
        transfer_optimizer_state(optimizer, pruner)
    model.zero_grad()
    model(case.example()).square().sum().backward()
    for name, parameter in model.named_parameters():
        grad, tolerance = parameter.grad, 2e-3 * float(parameter.grad.abs().max() + 1e-2)
        assert float((sgd.state[parameter]["momentum_buffer"] - grad).abs().max()) < tolerance, name
        assert float((adam.state[parameter]["exp_avg"] / 0.1 - grad).abs().max()) < tolerance, name
        # the second moment is an upper bound
        root = (adam.state[parameter]["exp_avg_sq"] / 0.001).sqrt()
        assert float((grad.abs() - root).max()) < tolerance, name


class Symmetric(nn.Module):
    """Every channel of the first layer is there twice, with equal rows and equal readers."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)
        with torch.no_grad():
            for tensor in (self.conv.weight, self.conv.bias, self.bn.weight, self.bn.bias, self.bn.running_mean):
                tensor.copy_(torch.randn(tensor.shape[0] // 2, *tensor.shape[1:]).repeat_interleave(2, dim=0))
            self.bn.running_var.copy_((torch.rand(4) + 0.5).repeat_interleave(2))
            self.fc.weight.copy_(torch.randn(4, 4).repeat_interleave(2, dim=1))

    def forward(self, x):
        return self.fc(F.relu(self.bn(self.conv(x))).mean((2, 3)))


def test_second_moments_of_symmetric_duplicates_are_exact():
    case = Case("symmetric", Symmetric, (3, 6, 6))
    torch.manual_seed(0)
    model = Symmetric().eval()
    pruner = IntraFusionPruner(model, case.example(), keep_even_channels, fusion=DUPLICATES, ignored_layers=[model.fc])
    adam = torch.optim.Adam(model.parameters(), lr=0.0, amsgrad=True)
    model(case.example()).square().sum().backward()
    adam.step()
    pruner.step()
    transfer_optimizer_state(adam, pruner)
    model.zero_grad()
    model(case.example()).square().sum().backward()
    for name, parameter in model.named_parameters():
        for key in ("exp_avg_sq", "max_exp_avg_sq"):
            torch.testing.assert_close(
                adam.state[parameter][key], 0.001 * parameter.grad.square(), rtol=1e-3, atol=1e-6
            )
        assert parameter.shape[0] == 4 or name == "fc.weight"


def test_a_warm_adam_takes_the_step_of_the_network_before():
    """Symmetric duplicates: fuse, then step, is step, then fuse."""
    case = Case("symmetric", Symmetric, (3, 6, 6))
    outputs = []
    for fuse_first in (True, False):
        torch.manual_seed(0)
        model = Symmetric().eval()
        pruner = IntraFusionPruner(
            model, case.example(), keep_even_channels, fusion=DUPLICATES, ignored_layers=[model.fc]
        )
        readers = {"params": [model.fc.weight], "lr": 0.0}  # a reader's gradient is as large, the merged one twice that
        rest = [p for p in model.parameters() if p is not model.fc.weight]
        adam = torch.optim.Adam([{"params": rest}, readers], lr=1e-3, eps=1e-12)
        train_(model, adam, case, steps=3)
        if fuse_first:
            pruner.step()
            transfer_optimizer_state(adam, pruner)
        train_(model, adam, case, steps=1)
        if not fuse_first:
            pruner.step()
        outputs.append(model(case.example()))
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)


def test_gradients_follow_a_refit_too():
    """The refit splits folded layers anew, and may flip signs; autograd sees the result."""
    case = PICO[0]
    batch = torch.randn(256, *case.shape)
    model, pruner = build(
        case, pruning_ratio=0.5, fusion=replace(DUPLICATES, correct="calibrated"), calibration=[batch]
    )
    duplicate_channels_(pruner)
    for bn in (model.bn1, model.bn2, model.bn3):
        bn.momentum = 1.0  # the statistics are those of the batch
    model.train()(batch)
    model.eval()
    pruner.importance = keep_even_channels
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    target = torch.randn(256, 4)
    F.mse_loss(model(batch), target).backward()
    optimizer.step()
    assert (model.bn3.weight < 0).any()
    pruner.step()
    transfer_optimizer_state(optimizer, pruner)
    model.zero_grad()
    F.mse_loss(model(batch), target).backward()
    assert (model.bn3.weight > 0).all()
    for parameter in model.parameters():
        carried = optimizer.state[parameter]["momentum_buffer"]
        torch.testing.assert_close(carried, parameter.grad, rtol=0.05, atol=0.02 * float(parameter.grad.abs().max()))


def test_a_step_that_removes_nothing_leaves_the_state_bit_for_bit():
    case = PICO[0]
    model, pruner = build(case, pruning_ratio=0.0)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    train_(model, optimizer, case)
    before, states = copy.deepcopy(optimizer.state_dict()), [optimizer.state[p] for p in held(optimizer)]
    pruner.step()
    transfer_optimizer_state(optimizer, pruner)
    assert all(optimizer.state[p] is state for p, state in zip(held(optimizer), states, strict=True))
    after = optimizer.state_dict()
    assert str(before) == str(after)


class Attention(nn.Module):
    """Multi-head attention, whose packed weights torch-pruning cuts along two axes."""

    def __init__(self):
        super().__init__()
        self.embed, self.attend = nn.Linear(6, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        y = self.embed(x)
        return self.head(self.attend(y, y, y, need_weights=False)[0].mean(1))


@pytest.mark.parametrize("fusion", ["discard", "barycentre"])
def test_layers_that_are_only_cut_are_followed_by_their_own_cut(fusion):
    case = Case("attention", Attention, (5, 6), "head")
    model, pruner = build(case, pruning_ratio=0.5, fusion=fusion, num_heads={})
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    train_(model, optimizer, case)
    before = {name: optimizer.state[p]["momentum_buffer"] for name, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        pruner.step()
    transfer_optimizer_state(optimizer, pruner)
    assert model.attend.in_proj_weight.shape == (12, 4)
    want = cut_by_torch_pruning(case, before, pruner.pruning_history())
    for name, parameter in model.named_parameters():
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], want[name]), name


def test_half_precision_states_keep_their_dtype():
    case = PICO[0]
    model, pruner = build(case, pruning_ratio=0.5, fusion="barycentre")
    model.bfloat16()
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.state[model.conv1.weight]["exp_avg"] = torch.ones(8, 3, 3, 3)  # as master-weight optimizers have them
    pruner.example_inputs = tuple(x.bfloat16() for x in pruner.example_inputs)
    pruner.step()
    transfer_optimizer_state(optimizer, pruner)
    assert optimizer.state[model.conv1.weight]["exp_avg"].dtype == torch.float32
    assert optimizer.state[model.fc1.weight]["exp_avg"].dtype == torch.bfloat16
    assert optimizer.state[model.conv1.weight]["exp_avg"].shape == model.conv1.weight.shape


def test_randomised_networks_have_both_signs():
    assert (randomise_(PICO[0].build()).bn1.weight < 0).any()
