"""Watching a forward pass: the calls between two layers, what is added, in which order, and stopping in the middle."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from intrafusion.correct.passes import Pass
from intrafusion.correct.survey import visits
from intrafusion.correct.tape import Layers, Tape
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
        z = F.max_pool2d(F.gelu(z), 2)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(torch.relu(self.c(z)), 1), 1))


LAYERS = {"a": "bn", "b": "", "c": "", "fc": ""}


def watched(model, x):
    """Everything that a tape sees: (name, inputs, (before, chain), maker) of every visit, and the finished visits."""
    seen, ended = {}, []

    def called(visit):
        before, chain = tape.trace_back(visit.inputs)
        seen[visit.name] = (visit.inputs.clone(), before.clone(), chain, tape.maker(before))

    def read(visit):
        other = None if visit.other is None else visit.other.clone()
        ended.append((visit.name, visit.output.clone(), other))

    tape = Tape(Layers(model, LAYERS), called=called, read=read, follow=True)
    with torch.no_grad(), tape:
        model(x)
    tape.finish()
    return seen, ended


def test_the_calls_before_a_layer_can_be_replayed():
    seen, _ = watched(randomise_(Chain()).eval(), torch.randn(2, 3, 8, 8))
    for name, expected in (
        ("b", ["relu"]),
        ("c", ["gelu", "max_pool2d"]),
        ("fc", ["relu", "avg_pool2d", "flatten"]),
    ):
        inputs, value, chain, _ = seen[name]
        assert [call.func.__name__.replace("boolean_dispatch", "max_pool2d") for call in chain] == expected
        for call in chain:
            value = call(value)
        assert torch.allclose(value, inputs), name
    assert [call.block for call in seen["c"][2]] == [1, 2]


def test_an_in_place_activation_does_not_hide_what_it_overwrote():
    model, x = randomise_(Chain()).eval(), torch.randn(2, 3, 8, 8)
    _, before, _, maker = watched(model, x)[0]["b"]
    assert torch.allclose(before, model.bn(model.a(x)))
    assert (before < 0).any()
    assert maker == "a"  # with its batch-norm
    assert watched(model, x)[0]["c"][3] == ""  # an addition lies between


def test_what_is_added_to_an_output_is_seen():
    model, x = randomise_(Chain()).eval(), torch.randn(2, 3, 8, 8)
    seen, ended = watched(model, x)
    assert [name for name, _, _ in ended] == ["a", "b", "c", "fc"]
    others = {name: other for name, _, other in ended}
    assert torch.equal(others["b"], seen["b"][0])
    assert others["a"] is others["c"] is None
    assert torch.allclose(ended[0][1], model.bn(model.a(x)))


def test_watching_changes_nothing():
    model, x = randomise_(Chain()).eval(), torch.randn(2, 3, 8, 8)
    before = model(x)
    watched(model, x)
    assert torch.equal(model(x), before)


def test_calls_that_return_their_argument_are_not_a_loop():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3)).eval()
    chains = {}
    tape = Tape(
        Layers(model, {"0": "", "3": ""}),
        called=lambda visit: chains.setdefault(visit.name, tape.trace_back(visit.inputs)[1]),
        follow=True,
    )
    with torch.no_grad(), tape:
        model(torch.randn(5, 4))
    assert [call.func.__name__ for call in chains["3"]] == ["relu"]


def test_nothing_is_kept_that_the_network_itself_has_let_go():
    """Only what a living tensor was made from by activations and poolings."""
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(20))).eval()
    layers = Layers(model, {f"{i}.0": "" for i in range(20)})
    alive = []
    tape = Tape(layers, called=lambda visit: alive.append(len(tape._origins)), follow=True)
    with torch.no_grad(), tape:
        model(torch.randn(1, 4, 8, 8))
    assert max(alive) <= 2


def test_layers_are_listed_in_the_order_of_the_forward_pass():
    model = Residual().eval()
    names = {name: "" for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    assert list(visits(model, lambda m, x: m(x), torch.randn(1, 3, 6, 6), names)) == ["stem", "a", "b", "c", "fc"]


def test_a_layer_is_seen_at_its_call_not_at_its_module():
    """Padding in a forward of its own, an argument by keyword, a layer that is never called as a module."""

    class Same(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, bias=self.bias)

    model = nn.Sequential(Same(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    seen = {}
    tape = Tape(Layers(model, {"0": "", "2": ""}), called=lambda visit: seen.setdefault(visit.name, visit.inputs))
    with torch.no_grad(), tape:
        model(torch.randn(1, 3, 6, 6))
    assert seen["0"].shape == (1, 3, 8, 8)


def test_a_pass_stops_before_an_output_is_read_and_goes_on_with_what_is_put_there():
    model, x = randomise_(Chain()).eval(), torch.randn(2, 3, 8, 8)
    one = Pass(lambda: model(x), Layers(model, LAYERS))
    names = []
    while (visit := one.advance()) is not None:
        names.append(visit.name)
        if visit.name == "c":
            visit.output.data = torch.zeros_like(visit.output)
    assert names == ["a", "b", "c", "fc"]
    assert torch.allclose(one.output, model.fc.bias.expand(2, 4))


def test_a_visit_can_be_made_again_with_other_tensors():
    model, x = randomise_(Chain()).eval(), torch.randn(2, 3, 8, 8)
    one = Pass(lambda: model(x), Layers(model, LAYERS))
    visit = one.advance()
    assert torch.equal(visit.again(model.a, model.bn), visit.output)
    model.a.weight.data *= 2
    with torch.no_grad():
        assert torch.allclose(visit.again(model.a, model.bn), model.bn(model.a(x)), atol=1e-6)
    one.close()


def test_closed_passes_leave_no_thread_and_errors_come_out():
    model, x = randomise_(Chain()).eval(), torch.randn(2, 3, 8, 8)
    before = threading.active_count()
    passes = [Pass(lambda: model(x), Layers(model, LAYERS)) for _ in range(5)]
    for number, one in enumerate(passes):
        for _ in range(number):
            one.advance()
    for one in passes:
        one.close()
    broken = Pass(lambda: model(x[:, :2]), Layers(model, LAYERS))
    with pytest.raises(RuntimeError, match="channels"):
        broken.advance()
    assert threading.active_count() == before


def test_contexts_of_the_network_reach_the_calls():
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.a(x)
            with torch.enable_grad():
                gradient = (2 * x.detach().requires_grad_(True)).sum()
                assert gradient.requires_grad
            return self.b(y.float())

    model, x = Cast().eval(), torch.randn(2, 4)
    one = Pass(lambda: model(x), Layers(model, {"a": "", "b": ""}))
    assert one.advance().output.dtype == torch.bfloat16
    assert one.advance().output.dtype == torch.float32
    assert one.advance() is None
    assert torch.equal(one.output, model(x))
    assert not one.output.requires_grad
