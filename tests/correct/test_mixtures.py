"""Where channels of a group are multiplied with each other, rows stay in place, and the readers are refitted."""

from __future__ import annotations

import copy

import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional as F

from intrafusion import IntraFusionPruner
from intrafusion.correct.mixtures import Mixtures
from intrafusion.correct.tape import Layers, Tape


class Gated(nn.Module):
    """Two layers whose outputs are multiplied; `how` is the gate's function."""

    def __init__(self, how):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 5)
        self.how = how

    def forward(self, x):
        return self.down(self.how(self.gate(x)) * self.up(x))


class GatedConv(nn.Module):
    """A gate on images, as a difference of squares: (a + b) (a - b)."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 12, 3), nn.Conv2d(3, 12, 3), nn.Linear(12, 4)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return self.fc(torch.mul(a + b, a - b).mean(dim=(2, 3)))


class Written(nn.Module):
    """An activation that is written out."""

    def __init__(self, function):
        super().__init__()
        self.a, self.fc, self.function = nn.Linear(6, 24), nn.Linear(24, 4), function

    def forward(self, x):
        return self.fc(self.function(self.a(x)))


NETS = {
    "silu gate": lambda: (Gated(F.silu), (6,)),
    "no function at all": lambda: (Gated(lambda x: x), (6,)),
    "convolutions": lambda: (GatedConv(), (3, 6, 6)),
    "swish in arithmetic": lambda: (Written(lambda x: x * torch.sigmoid(x)), (6,)),
    "squared relu": lambda: (Written(lambda x: torch.relu(x) ** 2), (6,)),
    "square": lambda: (Written(torch.square), (6,)),
}


def pruned(model, batches, fusion):
    metric = tp.importance.GroupMagnitudeImportance(p=1)
    pruner = IntraFusionPruner(
        model, batches[0][:1], metric, pruning_ratio=0.5, ignored_layers=[list(model.modules())[-1]],
        fusion=fusion, calibration=batches if fusion == "calibrated" else None,
    )  # fmt: skip
    pruner.step()
    return pruner


@pytest.mark.parametrize("net", NETS)
def test_rows_stay_and_readers_are_refitted(net):
    torch.manual_seed(0)
    model, shape = NETS[net]()
    dense, cut = copy.deepcopy(model), copy.deepcopy(model)
    batches, judge = [torch.randn(500, *shape) for _ in range(2)], torch.randn(500, *shape)
    (group,) = pruned(model, batches, "calibrated").last_step.cuts
    pruned(cut, batches, "discard")
    kept = torch.eye(group.pair.rows.shape[1])[[i for i in range(group.pair.rows.shape[1]) if i not in group.removed]]
    assert torch.equal(group.pair.rows.float(), kept)
    with torch.no_grad():
        error, plain = ((net(judge) - dense(judge)).square().sum() for net in (model, cut))
    assert error < 0.8 * plain


def test_a_product_of_two_groups_is_no_product_of_one():
    """Attention: a group of values is read linearly, whatever the scores depend on."""
    q, k, v, o = (nn.Linear(4, 4) for _ in range(4))
    network = nn.ModuleDict({"q": q, "k": k, "v": v, "o": o})
    seen: list[tuple[bool, ...]] = []

    def called(visit):
        if visit.name == "o":
            seen.append(tuple(tape.mixtures.keeps(visit.inputs, group) for group in (["v"], ["q"], ["q", "k", "v"])))

    tape = Tape(Layers(network, dict.fromkeys(network, "")), called=called, follow=True)
    x = torch.randn(2, 3, 4)
    with torch.no_grad(), tape:
        o(F.scaled_dot_product_attention(q(x), k(x), v(x)))
        o((q(x) @ k(x).mT).softmax(dim=-1) @ v(x))
    assert seen == [(True, True, False), (True, False, False)]


@pytest.mark.parametrize(
    ("function", "kept"),
    [
        (lambda x, y: torch.cat((x, y)), True), (lambda x, y: x - 0.5 * y, True), (lambda x, y: x * y, False),
        (lambda x, y: torch.einsum("ab,ab->ab", x, y), False), (lambda x, y: x.exp() + y, False),
        (lambda x, y: torch.relu(x).reshape(-1)[:2] / 3, True), (lambda x, y: torch.add(x, y, alpha=2.0), True),
    ],
)  # fmt: skip
def test_what_keeps_a_mixture(function, kept):
    x, y = torch.ones(2, 2), torch.ones(2, 2)
    mixtures = Mixtures()
    mixtures.made(x, "a")
    mixtures.made(y, "b")

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            mixtures.called(func, (args, kwargs), out)
            return out

    with Watch():
        out = function(x, y)
    assert mixtures.keeps(out, ["a", "b"]) is kept
