"""After a pruning step an optimizer holds the parameters that there are now, in their groups, and trains on."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from intrafusion import transfer_optimizer_state
from tests.nets import PICO, Case
from tests.prune.test_invariance import build
from tests.training.optimizers import BIASLESS, OPTIMIZERS, held, tensors, train_


@pytest.mark.parametrize("fusion", ["data-free", "barycentre", "paper"])
@pytest.mark.parametrize("case", PICO, ids=lambda case: case.name)
def test_training_goes_on_whatever_the_network(case, fusion):
    model, pruner = build(case, pruning_ratio=0.5, fusion=fusion)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    train_(model, optimizer, case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what this fusion can only cut
        pruner.step()
    transfer_optimizer_state(optimizer, pruner)
    assert {id(p) for p in held(optimizer)} == {id(p) for p in model.parameters()}
    for parameter in held(optimizer):
        for value in tensors(optimizer, parameter).values():
            assert value.shape == parameter.shape
            assert torch.isfinite(value).all()
        assert all((v >= 0).all() for k, v in tensors(optimizer, parameter).items() if k.endswith("_sq"))
    train_(model, optimizer, case, steps=1)
    warm = [p for p in held(optimizer) if float(optimizer.state[p]["step"]) == 4]
    assert len(warm) == len(held(optimizer)) or fusion == "data-free"
    assert len(warm) >= len(held(optimizer)) - 2  # the biases that a refit added


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_every_optimizer_goes_on(make):
    case = PICO[0]
    model, pruner = build(case, pruning_ratio=0.5, fusion="barycentre")
    optimizer = OPTIMIZERS[make](model.parameters())
    train_(model, optimizer, case)
    shapes = {id(p): {k: type(v) for k, v in optimizer.state[p].items()} for p in held(optimizer)}
    kinds = list(shapes.values())
    pruner.step()
    transfer_optimizer_state(optimizer, pruner)
    assert [{k: type(v) for k, v in optimizer.state[p].items()} for p in held(optimizer)] == kinds
    assert [id(p) for p in held(optimizer)] == [id(p) for p in model.parameters()]
    weights = [p.detach().clone() for p in model.parameters()]
    train_(model, optimizer, case, steps=1)
    assert all(not torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    fresh = OPTIMIZERS[make](model.parameters())
    fresh.load_state_dict(optimizer.state_dict())


def test_groups_names_frozen_parameters_and_schedulers_stay():
    case = PICO[0]
    model, pruner = build(case, pruning_ratio=0.5)
    model.conv2.weight.requires_grad_(False)
    named = dict(model.named_parameters())
    decay = [(n, p) for n, p in named.items() if p.dim() > 1]
    rest = [(n, p) for n, p in named.items() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": 1e-2}], lr=1e-3
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    train_(model, optimizer, case, steps=1)
    scheduler.step()
    rates = [group["lr"] for group in optimizer.param_groups]
    pruner.step()
    transfer_optimizer_state(optimizer, pruner)
    named = dict(model.named_parameters())
    assert [p for g in optimizer.param_groups for p in g["params"]] == [
        *(p for p in named.values() if p.dim() > 1),
        *(p for p in named.values() if p.dim() == 1),
    ]
    for group in optimizer.param_groups:
        assert [named[name] is p for name, p in zip(group["param_names"], group["params"], strict=True)]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert [group["lr"] for group in optimizer.param_groups] == rates
    assert not model.conv2.weight.requires_grad
    assert model.conv2.weight not in optimizer.state
    train_(model, optimizer, case, steps=1)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] < rates[0]


@pytest.mark.parametrize("steps", [1, 2])
def test_a_bias_that_a_refit_added_joins_the_group_of_the_biases(steps):
    model, pruner = build(BIASLESS, pruning_ratio=0.5, iterative_steps=steps)
    optimizer = torch.optim.SGD(
        [{"params": [p for p in model.parameters() if p.dim() > 1]}, {"params": [model.fc.bias]}], lr=0.1, momentum=0.9
    )
    train_(model, optimizer, BIASLESS)
    for _ in range(steps):
        pruner.step()
    transfer_optimizer_state(optimizer, pruner)
    assert model.b.bias is not None
    assert any(p is model.b.bias for p in optimizer.param_groups[1]["params"])
    assert {id(p) for p in held(optimizer)} == {id(p) for p in model.parameters()}
    before = model.b.bias.detach().clone()
    train_(model, optimizer, BIASLESS, steps=1)
    assert not torch.equal(before, model.b.bias)


def test_a_layer_that_is_not_trained_gets_no_trained_bias():
    model, pruner = build(BIASLESS, pruning_ratio=0.5)
    optimizer = torch.optim.SGD(model.fc.parameters(), lr=0.1, momentum=0.9)
    train_(model, optimizer, BIASLESS)
    pruner.step()
    transfer_optimizer_state(optimizer, pruner)
    assert [id(p) for p in held(optimizer)] == [id(p) for p in model.fc.parameters()]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.fc.weight = self.b.weight

    def forward(self, x):
        return self.fc(F.relu(self.b(F.relu(self.a(x)))))


def test_tied_weights_that_torch_pruning_unties_both_go_on():
    case = Case("tied", Tied, (6,))
    model, pruner = build(case, pruning_ratio=0.5, fusion="discard")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    train_(model, optimizer, case)
    pruner.step()
    transfer_optimizer_state(optimizer, pruner)
    assert {id(p) for p in held(optimizer)} == {id(p) for p in model.parameters()}
    assert len(held(optimizer)) == len(list(model.parameters()))
    assert all(optimizer.state[p]["momentum_buffer"].shape == p.shape for p in held(optimizer))
    train_(model, optimizer, case, steps=1)


def test_wrappers_with_an_optimizer_inside_are_opened():
    case = PICO[0]
    model, pruner = build(case, pruning_ratio=0.5)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    pruner.step()
    transfer_optimizer_state(SimpleNamespace(optimizer=optimizer), pruner)
    assert [id(p) for p in held(optimizer)] == [id(p) for p in model.parameters()]
