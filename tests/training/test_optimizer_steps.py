"""Several pruning steps under one optimizer, by hand, and one that fails."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch_pruning as tp

from intrafusion import FusionError, transfer_optimizer_state
from tests.nets import PICO, Case
from tests.prune.test_invariance import build
from tests.training.optimizers import OPTIMIZERS, held, train_


@pytest.mark.parametrize(("case", "steps"), [(PICO[0], 2), (PICO[1], 3)], ids=["plain", "residual"])
def test_steps_between_or_after_transfers_give_the_same_state(case: Case, steps: int):
    states = []
    for each in (True, False):
        model, pruner = build(case, pruning_ratio=0.5, iterative_steps=steps)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        train_(model, optimizer, case)
        for _ in range(steps):
            pruner.step()
            if each:
                transfer_optimizer_state(optimizer, pruner)
        transfer_optimizer_state(optimizer, pruner)
        state = {name: optimizer.state[p]["momentum_buffer"] for name, p in model.named_parameters()}
        assert all(state[name].shape == p.shape for name, p in model.named_parameters())
        assert state[next(iter(state))].norm() > 0
        assert [id(p) for p in held(optimizer)] == [id(p) for p in model.parameters()]
        states.append(state)
    first, second = states
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name])


def test_an_optimizer_made_between_two_steps_and_pruning_by_hand():
    case = PICO[0]
    model, pruner = build(case, pruning_ratio=0.5, iterative_steps=2)
    pruner.step()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    train_(model, optimizer, case)
    for group in pruner.step(interactive=True):
        group.prune()
    pruner.manual_prune_width(model.fc1, tp.prune_linear_out_channels, [0])
    transfer_optimizer_state(optimizer, pruner)
    assert [id(p) for p in held(optimizer)] == [id(p) for p in model.parameters()]
    train_(model, optimizer, case, steps=1)


def test_after_a_failed_step_the_optimizer_goes_on_as_it_was(monkeypatch):
    case = PICO[0]
    model, pruner = build(case, pruning_ratio=0.5)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    train_(model, optimizer, case)
    states = [optimizer.state[p] for p in held(optimizer)]
    with monkeypatch.context() as patch:
        patch.setattr("intrafusion.correct.correction.Correction.finish", lambda self: 1 / 0)
        with pytest.raises(FusionError):
            pruner.step()
    transfer_optimizer_state(optimizer, pruner)
    assert [id(p) for p in held(optimizer)] == [id(p) for p in model.parameters()]
    assert all(optimizer.state[p] is state for p, state in zip(held(optimizer), states, strict=True))
    pruner.step()
    transfer_optimizer_state(optimizer, pruner)
    assert [id(p) for p in held(optimizer)] == [id(p) for p in model.parameters()]
    train_(model, optimizer, case, steps=1)


def test_the_parameters_between_two_steps_are_not_kept_alive():
    case = PICO[0]
    model, pruner = build(case, pruning_ratio=0.5, iterative_steps=3, fusion="barycentre")
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    train_(model, optimizer, case)
    pruner.step()
    between = [weakref.ref(p) for p in model.parameters()]
    pruner.step()
    gc.collect()
    alive = {id(p) for p in model.parameters()}
    assert all(ref() is None or id(ref()) in alive for ref in between)
    pruner.step()
    transfer_optimizer_state(optimizer, pruner)
    assert [id(p) for p in held(optimizer)] == [id(p) for p in model.parameters()]
    assert all(optimizer.state[p]["momentum_buffer"].norm() > 0 for p in held(optimizer))
