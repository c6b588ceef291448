"""Looking into a forward pass: the calls between two layers, what is added, in which order."""

from __future__ import annotations

import torch
from torch import nn

from intrafusion.correct.observe import look
from intrafusion.running import call_order
from tests.nets import Residual, randomise_


class Chain(nn.Module):
    """Activations in every spelling: modules, functions, in place; a pool; a flatten; an addition in place."""

    def __init__(self):
        super().__init__()
        self.a, self.bn, self.act = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        self.b, self.c = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 5, 3, padding=1)
        self.fc = nn.Linear(5, 4)

    def forward(self, x):
        y = self.act(self.bn(self.a(x)))
        z = self.b(y)
        z += y
        z = nn.functional.max_pool2d(nn.functional.gelu(z), 2)
        return self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(torch.relu(self.c(z)), 1), 1))


def test_the_calls_before_a_layer_can_be_replayed():
    model, x = randomise_(Chain()), torch.randn(2, 3, 8, 8)
    for name, expected in (
        ("b", ["relu"]),
        ("c", ["gelu", "max_pool2d"]),
        ("fc", ["relu", "adaptive_avg_pool2d", "flatten"]),
    ):
        sight = look(lambda: model(x), model.get_submodule(name), None)
        assert [call.func.__name__.replace("boolean_dispatch", "max_pool2d") for call in sight.chain] == expected
        value = sight.before
        for call in sight.chain:
            value = call(value)
        assert torch.equal(value, sight.inputs), name
    assert [call.block for call in look(lambda: model(x), model.c, None).chain] == [1, 2]


def test_an_in_place_activation_does_not_hide_what_it_overwrote():
    model, x = randomise_(Chain()), torch.randn(2, 3, 8, 8)
    sight = look(lambda: model(x), model.b, None)
    assert torch.allclose(sight.before, model.bn(model.a(x)))
    assert (sight.before < 0).any()


def test_calls_that_return_their_argument_are_not_a_loop():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3)).eval()
    sight = look(lambda: model(torch.randn(5, 4)), model[3], None)
    assert [call.func.__name__ for call in sight.chain] == ["relu"]


def test_what_is_added_to_an_output_is_seen():
    model, x = randomise_(Chain()), torch.randn(2, 3, 8, 8)
    sight = look(lambda: model(x), model.b, None)
    assert torch.allclose(sight.other, sight.inputs)
    assert look(lambda: model(x), model.c, None).other is None
    assert look(lambda: model(x), model.a, model.bn).output.shape == (2, 6, 8, 8)


def test_looking_changes_nothing():
    model, x = randomise_(Chain()), torch.randn(2, 3, 8, 8)
    before = model(x)
    for name in ("a", "b", "c", "fc"):
        look(lambda: model(x), model.get_submodule(name), None)
    assert torch.equal(model(x), before)
    assert not model.b._forward_hooks
    assert not model.b._forward_pre_hooks


def test_layers_are_listed_in_the_order_of_the_forward_pass():
    model = Residual().eval()
    order = call_order(lambda: model(torch.randn(1, 3, 6, 6)), model, (nn.Conv2d, nn.Linear))
    assert order == ["stem", "a", "b", "c", "fc"]
