"""How much each place of a layer's output counts: by what an error there does to what the network gives."""

from __future__ import annotations

import pytest
import torch
import torch_pruning as tp
from torch import nn

from intrafusion import IntraFusionPruner
from intrafusion.correct.sensitivity import sensitivities
from intrafusion.correct.survey import visits
from tests.nets import PICO


def run(network, batch):
    return network(batch) if isinstance(batch, torch.Tensor) else network(*batch)


def counts(model, batches, forward=run):
    """Of all layers of a network that are called once."""
    layers = {name: "" for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
    shapes = {}
    calls = visits(model, run, batches[0], layers, lambda visit: shapes.update({visit.name: visit.output.shape}))
    return sensitivities(model, forward, batches, layers, {n: shape for n, shape in shapes.items() if calls[n] == 1})


class Weighed(nn.Module):
    """sum over places t of how[t] * (W2 W1 x_t)"""

    def __init__(self, how: torch.Tensor) -> None:
        super().__init__()
        self.one, self.two, self.how = nn.Linear(4, 6), nn.Linear(6, 3), how

    def forward(self, x):
        return (self.two(2 * self.one(x)) * self.how[:, None]).sum(dim=1)


HOW = torch.tensor([8.0, 1.0, 0.0, 2.0, -1.0])


@pytest.mark.parametrize("frozen", [False, True])
def test_places_count_by_the_size_of_the_gradient(frozen):
    model = Weighed(HOW).requires_grad_(not frozen)
    found = counts(model, [torch.randn(3, 5, 4), torch.randn(2, 5, 4)])
    assert found.keys() == {"one", "two"}
    for sizes in found.values():
        assert [tuple(size.shape) for size in sizes] == [(3, 5), (2, 5)]
        assert torch.cat(sizes).mean() == pytest.approx(1.0)
        for one in torch.cat(sizes):
            assert torch.allclose(one / one[1], HOW.abs(), atol=1e-5)
    assert [p.requires_grad for p in model.parameters()] == [not frozen] * 4
    assert all(p.grad is None for p in model.parameters())


def test_where_one_place_has_everything_a_quarter_counts_still():
    """As where only the last token is read, or a norm divides the nothing of a padding token by nearly nothing."""
    how = torch.zeros(50)
    how[7] = 1e6
    (sizes,) = counts(Weighed(how), [torch.randn(4, 50, 4)])["two"]
    assert sizes.min() > 0.5
    assert (sizes[:, 7] > 5 * sizes[:, 8]).all()
    assert sizes.sum() ** 2 / sizes.square().sum() == pytest.approx(sizes.numel() / 4, rel=1e-3)


def test_a_batch_may_be_taken_in_parts(monkeypatch):
    model, x = Weighed(HOW), torch.randn(7, 5, 4)
    seen = []
    monkeypatch.setattr("intrafusion.correct.sensitivity._VALUES", 2 * 5 * (6 + 3))
    (sizes,) = counts(model, [x], lambda network, batch: seen.append(len(batch)) or network(batch))["two"]
    assert seen == [2, 2, 2, 1]
    assert torch.allclose(sizes / sizes[:, 1:2], HOW.abs().expand(7, 5), atol=1e-5)


class Turned(Weighed):
    """Places come first inside."""

    def forward(self, x):
        return (self.two(2 * self.one(x.transpose(0, 1))) * self.how[:, None, None]).sum(dim=0)


def test_layers_whose_inputs_do_not_come_first_are_left_out_where_batches_are_parted(monkeypatch):
    model, x = Turned(HOW), torch.randn(7, 5, 4)
    assert [tuple(size.shape) for size in counts(model, [x])["two"]] == [(5, 7)]
    monkeypatch.setattr("intrafusion.correct.sensitivity._VALUES", 2 * 5 * (6 + 3))
    assert counts(model, [x]) == {}
    monkeypatch.setattr("intrafusion.correct.sensitivity._VALUES", 5 * 5 * (6 + 3))  # as many inputs as places
    assert counts(model, [x]) == {}


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
        raise ValueError("there is no gradient of this")


class WithoutGradient(Weighed):
    def forward(self, x):
        return Broken.apply(super().forward(x))


class Huge(Weighed):
    """The norm of its gradient is no number in float32."""

    def forward(self, x):
        return super().forward(x) * 3e38


@pytest.mark.parametrize("kind", [Twice, Overwritten, Cut, WithoutGradient])
def test_what_is_called_twice_or_overwritten_or_has_no_gradient_is_left_out(kind):
    model = kind(HOW)
    assert counts(model, [torch.randn(3, 5, 4)]) == {}
    assert all(p.requires_grad for p in model.parameters())


def test_counts_are_always_finite():
    for sizes in counts(Huge(HOW), [torch.randn(3, 5, 4)]).values():
        assert torch.cat(sizes).isfinite().all()


@pytest.mark.parametrize("case", [case for case in PICO if case.name != "mlp"], ids=lambda case: case.name)
def test_images_cost_nothing(case):
    model, seen = case.model().eval(), []
    x = torch.cat([case.example()] * 4)
    forward = lambda network, batch: seen.append(len(batch)) or network(batch)  # noqa: E731
    assert counts(model, [x, x], forward) == {}
    assert not seen


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.second, self.head = nn.Linear(8, 16), Block(), Block(), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.second(self.first(self.embed(x))))


class WholeBatches(Net):
    """Runs on four inputs at a time, and on nothing else."""

    def forward(self, x):
        return super().forward(x.reshape(4, -1, 8))


class Counter(Net):
    """Counts its calls in a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class FirstPlace(Net):
    def forward(self, x):
        return super().forward(x)[:, 0]


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
@pytest.mark.parametrize("kind", [WholeBatches, Counter, FirstPlace])
@pytest.mark.parametrize("inference", [False, True])
def test_a_network_without_such_gradients_is_pruned_all_the_same(kind, inference):
    torch.manual_seed(0)
    model = kind()
    with torch.inference_mode(inference):
        batches = [torch.randn(4, 6, 8) for _ in range(3)]
    pruner = IntraFusionPruner(
        model,
        torch.randn(4, 6, 8),
        tp.importance.GroupMagnitudeImportance(p=1),
        pruning_ratio=0.4,
        ignored_layers=[model.head],
        fusion="calibrated",
        calibration=batches,
    )
    pruner.step()
    assert model.first.up.weight.shape[0] < 32
    assert all(p.isfinite().all() for p in model.parameters())
