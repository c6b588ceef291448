"""How much each place of a layer's output counts: by what an error there does to what the network gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from intrafusion.correct.sensitivity import sensitivities
from tests.nets import PICO


def run(network, batch):
    return network(batch)


class Weighed(nn.Module):
    """sum over places t of how[t] * (W2 W1 x_t)"""

    def __init__(self, how: torch.Tensor) -> None:
        super().__init__()
        self.one, self.two, self.how = nn.Linear(4, 6), nn.Linear(6, 3), how

    def forward(self, x):
        return (self.two(2 * self.one(x)) * self.how[:, None]).sum(dim=1)


HOW = torch.tensor([8.0, 1.0, 0.0, 2.0, -1.0])
LAYERS = {"one": "", "two": ""}


@pytest.mark.parametrize("frozen", [False, True])
def test_places_count_by_the_size_of_the_gradient(frozen):
    model = Weighed(HOW).requires_grad_(not frozen)
    found = sensitivities(model, run, [torch.randn(3, 5, 4), torch.randn(2, 5, 4)], LAYERS)
    assert found.keys() == LAYERS.keys()
    for sizes in found.values():
        assert [tuple(size.shape) for size in sizes] == [(3, 5), (2, 5)]
        assert torch.cat(sizes).mean() == pytest.approx(1.0)
        for one in torch.cat(sizes):
            assert torch.allclose(one / one[1], HOW.abs(), atol=1e-5)
    assert [p.requires_grad for p in model.parameters()] == [not frozen] * 4
    assert all(p.grad is None for p in model.parameters())


def test_a_batch_may_be_taken_in_parts(monkeypatch):
    model, x = Weighed(HOW), torch.randn(7, 5, 4)
    seen = []
    monkeypatch.setattr("intrafusion.correct.sensitivity._VALUES", 2 * 5 * (6 + 3))
    sensitivities(model, lambda network, batch: seen.append(len(batch)) or network(batch), [x], LAYERS)
    assert seen == [1, 2, 2, 2, 1]


class Twice(Weighed):
    def forward(self, x):
        return super().forward(self.two(self.one(x))[..., [0, 1, 2, 0]])


class Overwritten(Weighed):
    """The graph of a view that is overwritten has no place any more where its value was."""

    def forward(self, x):
        return (self.two(self.one(x).mul_(2)).mul_(self.how[:, None])).sum(dim=1)


class Cut(Weighed):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("there is no gradient of this")


class WithoutGradient(Weighed):
    def forward(self, x):
        return Broken.apply(super().forward(x))


@pytest.mark.parametrize("kind", [Twice, Overwritten, Cut, WithoutGradient])
def test_what_is_called_twice_or_overwritten_or_has_no_gradient_is_left_out(kind):
    model = kind(HOW)
    assert sensitivities(model, run, [torch.randn(3, 5, 4)], LAYERS) == {}
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("case", [case for case in PICO if case.name != "mlp"], ids=lambda case: case.name)
def test_images_cost_one_input(case):
    model, seen = case.model().eval(), []
    x = torch.cat([case.example()] * 4)
    names = {name: "" for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
    forward = lambda network, batch: seen.append(len(batch)) or network(batch)  # noqa: E731
    assert sensitivities(model, forward, [x, x], names) == {}
    assert seen == [1]
