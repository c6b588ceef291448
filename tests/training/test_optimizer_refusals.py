"""What of an optimizer cannot be carried over is named, and nothing changes."""

from __future__ import annotations

import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional as F

from intrafusion import transfer_optimizer_state
from tests.nets import PICO, Case
from tests.prune.test_invariance import build
from tests.training.optimizers import OPTIMIZERS, held, train_


def same_after(optimizer, act) -> bool:
    before = [(id(p), id(optimizer.state[p])) for p in held(optimizer)]
    act()
    return [(id(p), id(optimizer.state[p])) for p in held(optimizer)] == before


def test_foreign_parameters_are_named_and_nothing_changes():
    case = PICO[0]
    model, pruner = build(case, pruning_ratio=0.5)
    foreign = nn.Linear(3, 2)
    optimizer = OPTIMIZERS["adam"]([{"params": model.parameters()}, {"params": foreign.parameters()}])
    train_(model, optimizer, case)
    pruner.step()

    def act():
        with pytest.raises(ValueError, match=r"parameter 0 of the optimizer's group 1 \(shape \(2, 3\)\) is not of"):
            transfer_optimizer_state(optimizer, pruner)

    assert same_after(optimizer, act)
    transfer_optimizer_state(optimizer, pruner, keep=foreign.parameters())
    assert optimizer.param_groups[1]["params"][0] is foreign.weight


def test_states_of_an_unknown_kind_are_named_and_can_be_explained():
    case = PICO[0]
    model, pruner = build(case, pruning_ratio=0.5)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    train_(model, optimizer, case)
    for parameter in held(optimizer):
        optimizer.state[parameter]["slow"] = torch.ones_like(parameter)
    pruner.step()

    def act():
        with pytest.raises(ValueError, match=r"state 'slow' \(8, 3, 3, 3\) of 'conv1.weight'"):
            transfer_optimizer_state(optimizer, pruner)

    assert same_after(optimizer, act)
    with pytest.raises(ValueError, match="choose one of"):
        transfer_optimizer_state(optimizer, pruner, kinds={"slow": "momentum"})
    transfer_optimizer_state(optimizer, pruner, kinds={"slow": "drop"})
    assert "slow" not in optimizer.state[model.conv1.weight]


def test_what_is_no_optimizer_or_keeps_a_flat_history_is_refused():
    model, pruner = build(PICO[0])
    with pytest.raises(ValueError, match="is a list"):
        transfer_optimizer_state([], pruner)
    with pytest.raises(ValueError, match="LBFGS"):
        transfer_optimizer_state(torch.optim.LBFGS(model.parameters()), pruner)


def test_a_layer_whose_cut_cannot_be_followed_is_named():
    class Odd(nn.Linear):
        pass

    class OddPruner(tp.pruner.function.LinearPruner):
        def prune_out_channels(self, layer, idxs):
            if float(layer.weight.sum()) == float(torch.arange(8.0)[:, None].expand(8, 8).sum()):
                raise RuntimeError("not with these numbers")
            return super().prune_out_channels(layer, idxs)

        prune_in_channels = tp.pruner.function.LinearPruner.prune_in_channels

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.odd, self.fc = nn.Linear(6, 8), Odd(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.fc(F.relu(self.odd(F.relu(self.a(x)))))

    case = Case("odd", Net, (6,))
    model, pruner = build(case, fusion="discard", customized_pruners={Odd: OddPruner()}, root_module_types=[Odd])
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    train_(model, optimizer, case)
    pruner.step()
    assert model.odd.out_features == 4
    with pytest.raises(ValueError, match=r"state of 'odd.weight' cannot be carried over: .*Odd"):
        transfer_optimizer_state(optimizer, pruner)
