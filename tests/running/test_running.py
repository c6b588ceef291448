"""Running a network: copies of it, its random numbers, what it is fed with."""

from __future__ import annotations

import copy
import random
import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from intrafusion.correct.passes import Pass
from intrafusion.correct.tape import Layers
from intrafusion.running import (
    Levelled,
    RandomState,
    copy_of,
    described,
    input_batches,
    run_model,
    tensors_in,
    to_device,
)


class Noisy(nn.Module):
    """Draws numbers from every generator, and for every channel its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        y = self.a(x)
        y = F.dropout(y, 0.5, training=True) + torch.randn_like(y) + torch.zeros_like(y).uniform_() + random.random()
        return self.b(y + float(np.random.rand()))


def state():
    return torch.get_rng_state().sum().item(), random.getstate(), np.random.get_state()[1].sum()


def test_a_pass_is_the_same_every_time_and_disturbs_nobody():
    model, x, before = Noisy(), torch.randn(5, 4), state()
    (first,), (again,), (other,) = run_model(model, (x,)), run_model(model, (x,)), run_model(model, (x + 1,))
    assert torch.equal(first, again)
    assert not torch.allclose(model.b(model.a(x)), first)
    assert not torch.allclose(other - model.b(model.a(x + 1)), first - model.b(model.a(x)))  # other inputs, other noise
    assert before == state()


def test_passes_side_by_side_draw_what_they_draw_alone():
    model, x, before = Noisy().eval(), torch.randn(5, 4), state()
    with torch.no_grad():
        (alone,) = run_model(model, (x,))
    layers = Layers(model, {"a": "", "b": ""})
    passes = [Pass(lambda: run_model(model, (x,)), layers) for _ in range(3)]
    for _ in range(3):
        for one in passes:
            one.advance()
            torch.rand(3)  # somebody else draws too
    assert all(torch.equal(one.output[0], alone) for one in passes)
    closed = Pass(lambda: run_model(model, (x,)), layers)
    now = state()
    closed.advance()
    closed.close()
    assert state() == now != before


def test_a_state_is_restored_whole():
    now = RandomState.now()
    first = torch.rand(2), random.random(), np.random.rand()
    now.restore()
    second = torch.rand(2), random.random(), np.random.rand()
    assert torch.equal(first[0], second[0])
    assert first[1:] == second[1:]


def test_levelled_noise_treats_all_channels_alike():
    x = torch.randn(5, 4)
    with Levelled():
        assert torch.equal(torch.randn(2, 3), torch.ones(2, 3))
        assert torch.equal(torch.rand_like(x), torch.full_like(x, 0.5))
        assert torch.equal(F.dropout(x, 0.9, training=True), x)
        assert torch.equal(torch.normal(x, torch.ones(4)), x + 1)
        assert torch.equal(x.clone().uniform_(2, 4), torch.full_like(x, 3.0))
        assert torch.equal(torch.bernoulli(torch.full((4,), 0.25)), torch.full((4,), 0.25))
        q = torch.randn(1, 1, 3, 4)
        attended = F.scaled_dot_product_attention(q, q, q, dropout_p=0.9)
        assert torch.equal(attended, F.scaled_dot_product_attention(q, q, q, None, 0.9))
    torch.testing.assert_close(attended, F.scaled_dot_product_attention(q, q, q))


class Biased(nn.Module):
    """Keeps a table that it computed from a parameter, as timm's attention does in eval mode, for each device."""

    def __init__(self):
        super().__init__()
        self.layer, self.biases, self.tables = nn.Linear(3, 3), nn.Parameter(torch.randn(5)), {}

    def forward(self, x):
        table = self.tables.setdefault(str(x.device), self.biases[torch.tensor([0, 2, 4])])
        return self.layer(x) + table


def test_a_network_is_copied_when_it_keeps_what_it_computed():
    model, x = Biased().eval(), torch.randn(4, 3)
    before = model(x)
    with pytest.raises(RuntimeError):
        copy.deepcopy(model)
    twin = copy_of(model)
    assert torch.equal(twin(x), before)
    assert twin.tables["cpu"] is not model.tables["cpu"]
    assert twin.biases is not model.biases


class Holder(nn.Module):
    """Holds a lock and a tensor that was computed; both make copy.deepcopy fail."""

    def __init__(self):
        super().__init__()
        self.layers, self.lock = nn.ModuleList([nn.Linear(3, 3), nn.BatchNorm1d(3)]), threading.Lock()
        self.tied = self.layers[0]
        self.cache = self.layers[0].weight * 2
        self.register_buffer("offset", torch.ones(3))

    def forward(self, x):
        with self.lock:
            return self.layers[1](self.tied(x)) + self.offset + self.cache.sum()


def test_a_network_that_cannot_be_copied_whole_is_copied_by_its_tensors():
    model, x = Holder().eval(), torch.randn(4, 3)
    twin = copy_of(model)
    assert torch.equal(twin(x), model(x))
    assert twin.lock is model.lock
    assert twin.tied is twin.layers[0]
    memory, other = ({t.data_ptr() for t in network.state_dict().values()} for network in (model, twin))
    assert memory.isdisjoint(other)
    assert [type(p) for p in twin.parameters()] == [nn.Parameter] * 4
    before = model(x)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model(x), before)
    assert not torch.equal(twin(x), before)


@dataclass
class Output:
    sample: torch.Tensor
    more: dict


def test_tensors_are_found_wherever_they_are():
    a, b, c = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    assert [t.numel() for t in tensors_in(Output(a, {"x": [b, None], "y": (c, 3)}))] == [1, 2, 3]
    plain = type("Plain", (), {})()
    plain.scores = b
    assert [t.numel() for t in tensors_in(plain)] == [2]
    assert list(tensors_in("text")) == []
    moved = to_device(([a, b], {"c": c, "n": 3}), torch.device("meta"))
    assert [type(moved[0]), moved[1]["n"]] == [list, 3]
    assert all(t.device.type == "meta" for t in tensors_in(moved))
    assert described(([a], {"c": c.long()})) == "2 tensors: float32 [1], int64 [3]"


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        (torch.zeros(4, 3), TypeError, r"calibration is one tensor of shape \[4, 3\], but an iterable of batches"),
        ({"x": torch.zeros(4)}, TypeError, "calibration is a dict: give an iterable of batches"),
        ([], ValueError, "calibration iterable is empty"),
        ([torch.zeros(2), ["a"]], TypeError, "calibration batch 1 is a list without a tensor"),
        ([([torch.ones(2), torch.full((2,), torch.nan)],)], ValueError, "calibration batch 0 holds NaN"),
    ],
)
def test_what_is_no_iterable_of_batches_is_said_to_be_none(batches, error, message):
    with pytest.raises(error, match=message):
        input_batches(batches)
