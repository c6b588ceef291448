"""A pass through a memo gives what a pass without one gives, whatever was changed in between, and computes less."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from intrafusion.correct import memo as module
from intrafusion.correct.memo import Memo, Room
from intrafusion.correct.observe import Sight, look


class Net(nn.Module):
    """Convolutions with a batch-norm, an activation in place, a residual stream and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.third = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu, self.last = nn.ReLU(inplace=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.relu(self.bn(self.first(x)))
        stream = stream + self.third(self.relu(self.second(stream)))
        stream += 1
        return self.last(F.dropout(stream.mean((2, 3)), training=self.training))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The expensive calls that a memo did not know."""
    found: list[str] = []
    keep = Memo._keep

    def noted(self: Memo, record: module._Record, out: object) -> None:
        name = getattr(record.func, "__name__", "")
        found.extend([name] if name in module._KEPT else [])
        keep(self, record, out)

    monkeypatch.setattr(Memo, "_keep", noted)
    return found


def seen(net: Net, x: Tensor, layer: str, memo: Memo) -> Sight:
    return look(lambda: net(x), net.get_submodule(layer), net.bn if layer == "first" else None, memo=memo)


def check(net: Net, x: Tensor, memo: Memo, layers: str = "first second third last") -> None:
    for layer in layers.split():
        found, expected = (seen(net, x, layer, each) for each in (memo, Memo(Room(0))))
        assert torch.equal(found.inputs, expected.inputs)
        assert torch.equal(found.output, expected.output)
        assert torch.equal(found.before, expected.before)
        assert [call.func for call in found.chain] == [call.func for call in expected.chain]
        assert (found.other is None) == (expected.other is None)
        assert found.other is None or torch.equal(found.other, expected.other)


def test_every_layer_is_computed_once(net: Net, computed: list[str]) -> None:
    x, memo = torch.randn(2, 3, 6, 6), Memo(Room())
    for layer in ("first", "second", "third", "last", "second", "first"):
        seen(net, x, layer, memo)
    assert computed == ["conv2d", "conv2d", "conv2d", "linear"]


def _cut(net: Net) -> None:
    net.second.weight = nn.Parameter(net.second.weight.detach()[:3].clone())
    net.second.bias = nn.Parameter(net.second.bias.detach()[:3].clone())
    net.third.weight = nn.Parameter(net.third.weight.detach()[:, :3].clone())


def _new_statistics(net: Net) -> None:
    net.bn.running_mean = torch.ones(4)


CHANGES: dict[str, Callable[[Net], object]] = {
    "nothing": lambda net: None,
    "another weight": lambda net: setattr(net.second, "weight", nn.Parameter(torch.randn(4, 4, 3, 3))),
    "a weight overwritten": lambda net: net.second.weight.mul_(2),
    "a weight's data replaced": lambda net: setattr(net.third.weight, "data", torch.randn(4, 4, 3, 3)),
    "statistics replaced": _new_statistics,
    "statistics overwritten": lambda net: net.bn.running_var.add_(1),
    "a bias taken away": lambda net: setattr(net.second, "bias", None),
    "a stride": lambda net: setattr(net.last, "weight", nn.Parameter(net.last.weight.detach().flip(0))),
    "channels cut": _cut,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changed_is_computed_again(change: Callable[[Net], object], net: Net) -> None:
    x, memo = torch.randn(2, 3, 6, 6), Memo(Room())
    check(net, x, memo)
    with torch.no_grad():
        change(net)
    check(net, x, memo, "third second last first")
    check(net, x, memo)


def test_only_what_lies_behind_a_change_is_computed_again(net: Net, computed: list[str]) -> None:
    x, memo = torch.randn(2, 3, 6, 6), Memo(Room())
    seen(net, x, "last", memo)
    with torch.no_grad():
        net.third.bias.add_(1)
    computed.clear()
    seen(net, x, "last", memo)
    assert computed == ["conv2d", "linear"]


def test_inputs_that_change(net: Net) -> None:
    x, memo = torch.randn(2, 3, 6, 6), Memo(Room())
    check(net, x, memo)
    x.mul_(2)
    check(net, x, memo)
    check(net, torch.randn(5, 3, 6, 6), memo)


def test_memory_is_bounded_and_given_back(net: Net, computed: list[str]) -> None:
    x = torch.randn(2, 3, 6, 6)
    one = 2 * 4 * 6 * 6 * 4
    room = Room(2 * one)
    first, second = Memo(room), Memo(room)
    check(net, x, first)
    assert room.left == 0  # two convolutions; the linear layer's few bytes find no room
    check(net, x, second)
    assert room.left == 0
    check(net, x[:1], first)
    assert room.left == one / 2 - 8  # three convolutions of half the size, and two numbers


@pytest.mark.parametrize("change", [
    lambda hidden: hidden.data.mul_(2),
    lambda hidden: hidden.view(-1).data.mul_(2),
    lambda hidden: hidden.view(-1).mul_(2),
    lambda hidden: hidden.detach()[:, :2].mul_(2),
    lambda hidden: hidden.numpy().__imul__(2),
    lambda hidden: torch.mul(hidden, 2, out=hidden),
], ids=["data", "data of a view", "view", "part", "numpy", "out"])  # fmt: skip
def test_outputs_that_are_overwritten_in_other_ways(change: Callable[[Tensor], object]) -> None:
    class Own(Net):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            change(hidden)
            return self.last(self.second(self.relu(hidden)).mean((2, 3)))

    torch.manual_seed(0)
    net, x, memo = Own().eval(), torch.randn(2, 3, 6, 6), Memo(Room())
    for _ in range(3):
        for layer in ("second", "last"):
            expected, found = (
                look(lambda: net(x), net.get_submodule(layer), None),
                look(lambda: net(x), net.get_submodule(layer), None, memo=memo),
            )
            assert torch.equal(found.inputs, expected.inputs)
            assert torch.equal(found.output, expected.output)


def test_sparse_tensors_are_read_anew_in_every_pass() -> None:
    class Own(Net):
        graph = torch.eye(2).to_sparse()

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.relu(self.second(self.bn(self.first(x))))
            return self.last(torch.sparse.mm(self.graph, hidden.mean((2, 3))))

    torch.manual_seed(0)
    net, x, memo = Own().eval(), torch.randn(2, 3, 6, 6), Memo(Room())
    for _ in range(3):
        check(net, x, memo, "first second last")


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return torch.from_numpy(2 * x.numpy())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return 2 * gradient


def test_what_torch_does_not_see_made_is_not_known() -> None:
    class Own(Net):
        factor = 2

        def forward(self, x: Tensor) -> Tensor:
            hidden = _Double.apply(self.relu(self.bn(self.first(x))))
            return self.last(self.second(torch.from_numpy(hidden.numpy() * self.factor)).mean((2, 3)))

    torch.manual_seed(0)
    net, x, memo = Own().eval(), torch.randn(2, 3, 6, 6), Memo(Room())
    for factor in (2, 2, 3):
        net.factor = factor
        check(net, x, memo, "first second last")
