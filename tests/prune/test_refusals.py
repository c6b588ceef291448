"""What torch-pruning cannot cut is refused by name, with the way out, and nothing has changed; the way out works."""

from __future__ import annotations

import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional as F

from intrafusion import FusionError, IntraFusionPruner
from tests.prune.test_bad_input import assert_unchanged, state

PRESETS = ("discard", "paper", "data-free", "calibrated")


def l1():
    return tp.importance.GroupMagnitudeImportance(p=1)


class Net(nn.Module):
    def __init__(self, forward, **layers):
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.run(self, x)


def conv(i, o, **more):
    return nn.Conv2d(i, o, 3, padding=1, **more)


def image(n=2):
    return torch.randn(n, 3, 8, 8)


def sequence(n=2):
    return torch.randn(n, 7, 6)


def shuffled(y, groups=4):
    n, c, h, w = y.shape
    return y.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def permuted(y, groups=4):
    return y.unflatten(1, (groups, -1)).permute(0, 2, 1, 3, 4).flatten(1, 2)


def filled(first, second):
    y = torch.zeros(len(first), 16, *first.shape[2:])
    y[:, ::2] = first
    y[:, 1::2] = second
    return y


def scaled(y):
    y = y.clone()
    y[:, :4].mul_(3.0)
    return y


def weighted(n, x):
    a, b = n.a(x).relu(), n.b(x).relu()
    return n.c(n.d(n.w[0] * a + n.w[1] * b).relu())


def attending(n, x):
    a = n.a(x).relu()
    w = n.w.softmax(0)
    return n.c(n.d(sum(w[i] * a.roll(i, 2) for i in range(3))).relu())


def recurrent(n, x):
    return n.c(n.b(n.rnn(n.a(x).relu())[0]).relu())


def cell(n, x):
    y, h = n.a(x).relu(), torch.zeros(len(x), 12)
    for step in y.unbind(1):
        h = n.rnn(step, h)
    return n.c(n.b(h).relu())


def block(n, x):
    y = list(n.a(x).chunk(2, 1))
    y.append(n.m(y[-1]).relu())
    return n.c(n.b(torch.cat([y[0], y[1], y[2]], 1)).relu())


def turned(n, x):
    y = n.a(x).relu()
    return n.c(n.b(torch.cat([y[:, 2:], y[:, :2]], 1) + y).relu())


def slid(n, x):
    y = n.a(x).relu()
    return n.c(n.b(F.pad(y, (0, 0, 0, 0, 0, 2))[:, 2:] + y).relu())


def attended(n, x):
    """Each head at a temperature of its own."""
    q, k, v = n.qkv(n.a(x)).reshape(len(x), x.shape[1], 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
    y = ((q @ k.transpose(-2, -1)) * n.t).softmax(-1) @ v
    return n.c(n.b(n.p(y.permute(0, 2, 1, 3).reshape(len(x), x.shape[1], 16))).relu())


def covariant(n, x):
    """The same, but channels attend to channels, as in XCiT."""
    q, k, v = n.qkv(n.a(x)).reshape(len(x), x.shape[1], 3, 4, 4).permute(2, 0, 3, 4, 1).unbind(0)
    y = ((q @ k.transpose(-2, -1)) * n.t).softmax(-1) @ v
    return n.c(n.b(n.p(y.permute(0, 3, 1, 2).reshape(len(x), x.shape[1], 16))).relu())


CASES = {  # network, inputs, what is named, what to ignore for it to run
    "pixel shuffle": (
        lambda: Net(
            lambda n, x: n.c(F.pixel_shuffle(n.b(n.a(x).relu()), 2)),
            a=conv(3, 16), b=conv(16, 32), c=conv(8, 3),
        ),
        image, "'c' (Conv2d) has 8 channels", ["b"],
    ),
    "pixel shuffle of a module": (
        lambda: Net(
            lambda n, x: n.c(n.s(n.b(n.a(x).relu())).relu()),
            a=conv(3, 16), b=conv(16, 36), s=nn.PixelShuffle(3), c=conv(4, 3),
        ),
        image, "'c' (Conv2d) has 4 channels", ["b"],
    ),
    "glu": (
        lambda: Net(
            lambda n, x: n.c(F.glu(n.b(n.a(x).relu()), 2)),
            a=nn.Linear(6, 16), b=nn.Linear(16, 32), c=nn.Linear(16, 3),
        ),
        sequence, "'c' (Linear) has 16 channels", ["b"],
    ),
    "channel shuffle": (
        lambda: Net(lambda n, x: n.c(n.b(shuffled(n.a(x))).relu()), a=conv(3, 16), b=conv(16, 12), c=conv(12, 3)),
        image, "the channels of 'a' are shuffled", ["a"],
    ),
    "channel shuffle by permute": (
        lambda: Net(lambda n, x: n.c(n.b(permuted(n.a(x))).relu()), a=conv(3, 16), b=conv(16, 12), c=conv(12, 3)),
        image, "the channels of 'a' are shuffled", ["a"],
    ),
    "channel shuffle of torch": (
        lambda: Net(
            lambda n, x: n.c(n.b(torch.channel_shuffle(n.a(x), 2)).relu()),
            a=conv(3, 16), b=conv(16, 12), c=conv(12, 3),
        ),
        image, "the channels of 'a' are shuffled", ["a"],
    ),
    "halves written in place": (
        lambda: Net(
            lambda n, x: n.c(n.d(filled(n.a(x), n.b(x))).relu()),
            a=conv(3, 8), b=conv(3, 8), d=conv(16, 12), c=conv(12, 3),
        ),
        image, "are partly written in place", ["a", "b"],
    ),
    "some scaled in place": (
        lambda: Net(lambda n, x: n.c(n.b(scaled(n.a(x)).relu()).relu()), a=conv(3, 16), b=conv(16, 12), c=conv(12, 3)),
        image, "the channels of 'a' are partly written in place", ["a"],
    ),
    "two weights of branches": (
        lambda: Net(
            weighted, a=conv(3, 16), b=conv(3, 16), d=conv(16, 12), c=conv(12, 3), w=nn.Parameter(torch.ones(2)),
        ),
        image, "the parameter 'w' has 2 values", ["w"],
    ),
    "weights behind a softmax": (
        lambda: Net(attending, a=conv(3, 16), d=conv(16, 12), c=conv(12, 3), w=nn.Parameter(torch.randn(3))),
        image, "the parameter 'w' has 3 values", ["w"],
    ),
    "gru": (
        lambda: Net(
            recurrent,
            a=nn.Linear(6, 16), rnn=nn.GRU(16, 12, batch_first=True), b=nn.Linear(12, 16), c=nn.Linear(16, 3),
        ),
        sequence, "'rnn' (GRU)", ["a", "rnn"],
    ),
    "lstm": (
        lambda: Net(
            recurrent,
            a=nn.Linear(6, 16), rnn=nn.LSTM(16, 12, batch_first=True), b=nn.Linear(12, 16), c=nn.Linear(16, 3),
        ),
        sequence, "'rnn' (LSTM) is a recurrent layer", ["a", "rnn"],
    ),
    "gru cell": (
        lambda: Net(cell, a=nn.Linear(6, 16), rnn=nn.GRUCell(16, 12), b=nn.Linear(12, 16), c=nn.Linear(16, 3)),
        sequence, "'rnn' (GRUCell)", ["a", "rnn"],
    ),
    "chunks that are concatenated": (
        lambda: Net(block, a=conv(3, 32), m=conv(16, 16), b=conv(48, 12), c=conv(12, 3)),
        image, "it does not see shuffles", ["m", "a"],
    ),
    "channels turned round and added": (
        lambda: Net(turned, a=conv(3, 16), b=conv(16, 12), c=conv(12, 3)),
        image, "the channels of 'a' without end", ["a"],
    ),
    "channels padded, sliced and added": (
        lambda: Net(slid, a=conv(3, 16), b=conv(16, 12), c=conv(12, 3)),
        image, "the channels of 'a' without end", ["a"],
    ),
    "transposed in groups": (
        lambda: Net(
            lambda n, x: n.c(n.b(n.t(n.a(x).relu()).relu()).relu()),
            a=conv(3, 16), t=nn.ConvTranspose2d(16, 12, 2, 2, groups=2), b=conv(12, 16), c=conv(16, 3),
        ),
        image, "'t' (ConvTranspose2d) is a transposed convolution in groups", ["a", "t"],
    ),
    "several channels to each": (
        lambda: Net(
            lambda n, x: n.c(n.b(n.t(n.a(x).relu()).relu()).relu()),
            a=conv(3, 16), t=conv(16, 8, groups=8), b=conv(8, 16), c=conv(16, 3),
        ),
        image, "'t' (Conv2d) makes each channel of several others", ["a", "t"],
    ),
    "instance-norm with statistics": (
        lambda: Net(
            lambda n, x: n.c(n.b(n.s(n.a(x)).relu()).relu()),
            a=conv(3, 16), s=nn.InstanceNorm2d(16, track_running_stats=True), b=conv(16, 12), c=conv(12, 3),
        ),
        image, "'s' (InstanceNorm2d) has running statistics", ["a"],
    ),
}  # fmt: skip


def step(model, inputs, fusion, ignored, **more):
    more |= {"calibration": [inputs(24)]} if fusion == "calibrated" else {}
    pruner = IntraFusionPruner(model, inputs(), l1(), ignored_layers=ignored, fusion=fusion, **more)
    pruner.progress = False
    pruner.step()
    return pruner


@pytest.mark.filterwarnings("ignore:Unwrapped parameters detected", "ignore::intrafusion.prune.twin.WorseThanCut")
@pytest.mark.filterwarnings("ignore:RNN module weights are not part")
@pytest.mark.parametrize("fusion", PRESETS)
@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_by_name_and_the_way_out_works(name, fusion):
    torch.manual_seed(0)
    build, inputs, said, ignored = CASES[name]
    model = build().eval()
    if fusion == "discard" and said.startswith("the channels") | ("written in place" in said):
        pytest.skip("plain torch-pruning asks for no check")
    before = state(model)
    with pytest.raises((FusionError, ValueError)) as caught:
        step(model, inputs, fusion, [model.c])
    assert said in str(caught.value)
    assert "ignored_layers=[model." in str(caught.value)
    assert_unchanged(model, before)
    pruner = step(model, inputs, fusion, [model.c, *(getattr(model, layer) for layer in ignored)])
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in build().parameters())
    assert model(inputs()).isfinite().all()
    assert any(group.channels_after < group.channels_before for group in pruner.report.groups)


@pytest.mark.filterwarnings("ignore:Unwrapped parameters detected", "ignore::intrafusion.prune.twin.WorseThanCut")
@pytest.mark.parametrize("fusion", PRESETS)
@pytest.mark.parametrize("attention", [attended, covariant])
def test_heads_with_a_parameter_of_their_number_are_refused_and_the_way_out_works(attention, fusion):
    torch.manual_seed(0)
    model = Net(
        attention, a=nn.Linear(6, 16), qkv=nn.Linear(16, 48), p=nn.Linear(16, 16), b=nn.Linear(16, 20),
        c=nn.Linear(20, 3), t=nn.Parameter(torch.ones(4, 1, 1)),
    ).eval()  # fmt: skip
    before = state(model)
    with pytest.raises(FusionError) as caught:
        step(model, sequence, fusion, [model.c], num_heads={model.qkv: 4})
    assert "ignored_layers=[model.qkv]" in str(caught.value)
    assert_unchanged(model, before)
    step(model, sequence, fusion, [model.c, model.qkv], num_heads={model.qkv: 4})
    assert model.b.out_features == 10
    assert model(sequence()).isfinite().all()


@pytest.mark.filterwarnings("ignore::intrafusion.prune.twin.WorseThanCut")
@pytest.mark.parametrize("fusion", PRESETS)
@pytest.mark.parametrize("times", [2, 3])
def test_what_cannot_be_cut_because_each_channel_is_a_chunk_is_left_alone(times, fusion):
    torch.manual_seed(0)
    model = Net(
        lambda n, x: n.c(n.b(n.d(n.a(x).relu()).relu()).relu()),
        a=conv(3, 12), d=conv(12, 12 * times, groups=12), b=conv(12 * times, 16), c=conv(16, 3),
    ).eval()  # fmt: skip
    pruner = step(model, image, fusion, [model.c])
    assert (model.a.out_channels, model.b.out_channels) == (12, 8)
    assert model(image()).isfinite().all()
    said = {group.name: group.reason for group in pruner.report.groups if group.merged == "untouched"}
    assert "each channel is a chunk of its own" in said["a"]


def test_layers_without_weights_yet_are_named():
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with pytest.raises(ValueError, match=r"'0' \(LazyConv2d\) has no weights yet: run the network once"):
        IntraFusionPruner(model, image(), l1())
    assert isinstance(model[0], nn.LazyConv2d)


def test_a_group_whose_ratio_is_zero_may_hold_anything():
    build, inputs, _, _ = CASES["lstm"]
    model = build().eval()
    pruner = IntraFusionPruner(
        model, inputs(), l1(), pruning_ratio=0.0, pruning_ratio_dict={model.b: 0.5}, ignored_layers=[model.c],
        fusion="calibrated", calibration=[inputs(24)],
    )  # fmt: skip
    pruner.step()
    assert (model.a.out_features, model.b.out_features) == (16, 8)
    assert model(inputs()).shape == (2, 7, 3)
