"""The importances of this package: the rules against plain oracles, and every kind of network."""

from __future__ import annotations

import copy

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

from intrafusion import (
    CHIPImportance,
    FLAPImportance,
    IntraFusionPruner,
    ReconstructionImportance,
    WandaImportance,
)
from intrafusion.ot.choice import SEARCHES, reconstruction_scores
from intrafusion.prune.importance import channel_independence
from tests.nets import PICO, Mlp, Plain, randomise_

pytestmark = pytest.mark.filterwarnings("ignore:Unwrapped parameters", "ignore:.*could only be cut")


def group_of(model: nn.Module, layer: nn.Module, x: Tensor, idxs=None) -> tp.dependency.Group:
    graph = tp.DependencyGraph().build_dependency(model, (x,), verbose=False)
    n = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    handler = graph.get_pruner_of_module(layer).prune_out_channels
    return graph.get_pruning_group(layer, handler, list(range(n)) if idxs is None else idxs)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("batches", [False, True], ids=["data-free", "calibrated"])
def test_duplicates_are_never_both_kept_while_an_independent_channel_is_left(batches, search):
    model, x = randomise_(Plain(width=8)), torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        for tensor in (model.conv1.weight, *(model.bn1.state_dict()[k] for k in ("weight", "bias"))):
            tensor[4:] = tensor[:4].clone()
        model.bn1.running_mean[4:], model.bn1.running_var[4:] = model.bn1.running_mean[:4], model.bn1.running_var[:4]
        model.bn1.bias.fill_(0.5)  # every channel is alive
        model.bn1.weight[4:] = model.bn1.weight[:4].clone()
    metric = ReconstructionImportance([x] if batches else None, search=search, ridge=1e-9)
    scores = metric(group_of(model, model.conv1, x[:1]))
    assert {int(i) % 4 for i in scores.topk(4).indices} == {0, 1, 2, 3}
    assert scores.topk(4, largest=False).values.max() < 1e-8


def test_a_constant_channel_is_the_last():
    model, x = randomise_(Plain()), torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        model.bn1.weight[5], model.bn1.bias[5] = 0.0, 3.0
    for batches in (None, [x]):
        for search in SEARCHES:
            metric = ReconstructionImportance(batches, search=search)
            assert metric(group_of(model, model.conv1, x[:1])).argmin() == 5


class OneLayer(nn.Module):
    """What the data-free moments assume, exactly: white inputs, one layer, an activation, one reader."""

    def __init__(self, f):
        super().__init__()
        self.a, self.b, self.f = nn.Linear(6, 8), nn.Linear(8, 5), f

    def forward(self, x):
        return self.b(self.f(self.a(x)))


@pytest.mark.parametrize(
    "f",
    [F.relu, F.gelu, F.silu, F.elu, F.relu6, F.leaky_relu, torch.tanh, F.hardswish, F.selu],
    ids=lambda f: f.__name__,
)
def test_without_inputs_the_activation_of_the_network_is_found(f):
    model, x = OneLayer(f).eval(), torch.randn(100_000, 6)
    group = group_of(model, model.a, x[:1])
    free, measured = ReconstructionImportance()(group), ReconstructionImportance([x])(group)
    torch.testing.assert_close(free, measured, atol=0.02, rtol=0)


def test_a_flatten_and_a_chunked_reader_count_all_their_columns():
    model, x = randomise_(Plain()), torch.randn(256, 3, 8, 8)
    group = group_of(model, model.conv2, x[:1])
    with torch.no_grad():
        read = F.adaptive_avg_pool2d(F.relu(model.bn2(model.conv2(F.relu(model.bn1(model.conv1(x)))))), 2).double()
    cov = sum(torch.cov(place.T, correction=0) for place in read.flatten(2).unbind(2)) / 4
    scale = model.bn3.weight.detach().double() / (model.bn3.running_var.double() + model.bn3.eps).sqrt()
    weight = (scale[:, None] * model.fc1.weight.detach().double()).reshape(10, 6, 4)
    metric = torch.einsum("oip,ojp->ij", weight, weight)
    expected = reconstruction_scores([cov], [metric])
    torch.testing.assert_close(ReconstructionImportance([x[:100], x[100:]])(group), expected, atol=1e-6, rtol=0)


def test_activation_weighted_scores_are_those_of_the_papers():
    """A layer behind a flatten, with a batch-norm behind: every channel is read in four copies of each position."""
    model, x = randomise_(Plain()), torch.randn(64, 3, 8, 8)
    group = group_of(model, model.conv2, x[:1])
    with torch.no_grad():
        read = F.adaptive_avg_pool2d(F.relu(model.bn2(model.conv2(F.relu(model.bn1(model.conv1(x)))))), 2).double()
    scale = model.bn3.weight.detach().double() / (model.bn3.running_var.double() + model.bn3.eps).sqrt()
    weight = (scale[:, None] * model.fc1.weight.detach().double()).unflatten(1, (6, 4))
    values = read.flatten(2)
    fluctuation = (values.var(dim=0, correction=0) * weight.square().sum(dim=0)).sum(dim=1)
    size = (values.square().mean(dim=0).sqrt() * weight.abs().sum(dim=0)).sum(dim=1)
    for kind, expected in ((FLAPImportance, fluctuation), (WandaImportance, size)):
        got = kind([x[:50], x[50:]])(group)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)
        apart = kind([x], standardised=True)(group)
        torch.testing.assert_close(apart, (got - got.mean()) / got.std(correction=0), atol=1e-5, rtol=1e-4)


def test_flap_is_the_error_of_a_cut_whose_reader_gets_the_mean_back():
    model, x = OneLayer(F.relu).eval(), torch.randn(500, 6)
    scores = FLAPImportance([x])(group_of(model, model.a, x[:1]))
    hidden = model.f(model.a(x)).detach().double()
    for j in range(8):
        without = hidden.clone()
        without[:, j] = hidden[:, j].mean()
        lost = (hidden - without) @ model.b.weight.detach().double().T
        assert scores[j].item() == pytest.approx(lost.square().sum(dim=1).mean().item(), rel=1e-5)


def test_standardised_scores_of_equal_channels_are_equal_and_finite():
    model, x = OneLayer(F.relu).eval(), torch.randn(500, 6)
    model.b.weight.data.zero_()
    assert torch.equal(FLAPImportance([x], standardised=True)(group_of(model, model.a, x[:1])), torch.zeros(8).double())


@pytest.mark.parametrize("kind", [FLAPImportance, WandaImportance])
def test_a_group_that_nobody_reads_has_no_activation_weighted_scores(kind):
    model, x = randomise_(Plain()), torch.randn(4, 3, 8, 8)
    assert kind([x])(group_of(model, model.fc2, x[:1])) is None


def test_scores_move_with_the_channels():
    """Of a network whose channels have changed places."""
    model, x = randomise_(Plain()), torch.randn(64, 3, 8, 8)
    metrics = {name: METRICS[name](x) for name in MEASURED}
    before = {name: metric(group_of(model, model.conv1, x[:1])) for name, metric in metrics.items()}
    order = torch.randperm(8)
    for tensor in (model.conv1.weight, *model.bn1.state_dict().values()):
        if tensor.dim():
            tensor.data.copy_(tensor.data[order].clone())
    model.conv2.weight.data.copy_(model.conv2.weight.data[:, order].clone())
    for name, metric in metrics.items():
        after = metric(group_of(model, model.conv1, x[:1]))
        torch.testing.assert_close(after, before[name][order], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("shape", [(3, 5, 12), (2, 12, 5), (2, 6, 6), (1, 7, 1)])
def test_channel_independence_is_that_of_plain_singular_values(shape):
    maps = torch.randn(shape)
    maps[:, 2] = maps[:, 1]
    maps[:, 3] = 0
    got = channel_independence(maps, most_values=200)
    for one, row in zip(maps.double(), got, strict=True):
        whole = torch.linalg.svdvals(one).sum()
        for i in range(shape[1]):
            without = one.clone()
            without[i] = 0
            assert row[i].item() == pytest.approx(float(whole - torch.linalg.svdvals(without).sum()), abs=1e-6)


def test_chip_reads_the_activation_behind_the_batchnorm():
    model, x = randomise_(Plain()), torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        maps = F.relu(model.bn1(model.conv1(x))).flatten(2)
    got = CHIPImportance([x[:2], x[2:]])(group_of(model, model.conv1, x[:1]))
    torch.testing.assert_close(got, channel_independence(maps).mean(dim=0))


def test_chip_takes_the_inputs_of_a_batch_as_positions_of_a_linear_layer_and_tokens_where_there_are_some():
    model, x = randomise_(Plain()), torch.randn(9, 3, 8, 8)
    with torch.no_grad():
        z = F.adaptive_avg_pool2d(F.relu(model.bn2(model.conv2(F.relu(model.bn1(model.conv1(x)))))), 2).flatten(1)
        vectors = F.relu(model.bn3(model.fc1(z)))
    got = CHIPImportance([x])(group_of(model, model.fc1, x[:1]))
    torch.testing.assert_close(got, channel_independence(vectors.T[None])[0])
    mixer, tokens = Mlp().eval(), torch.randn(3, 5, 6)
    with torch.no_grad():
        y = mixer.embed(tokens) + mixer.position
        maps = F.gelu(mixer.up(mixer.norm(y))).mT
    got = CHIPImportance([tokens])(group_of(mixer, mixer.up, tokens[:1]))
    torch.testing.assert_close(got, channel_independence(maps).mean(dim=0))


MEASURING = (ReconstructionImportance, FLAPImportance, WandaImportance, CHIPImportance)
METRICS = {
    "data-free": lambda x: ReconstructionImportance(),
    "calibrated": lambda x: ReconstructionImportance([x, x + 1]),
    "data-free backward": lambda x: ReconstructionImportance(search="backward"),
    "calibrated backward": lambda x: ReconstructionImportance([x, x + 1], search="backward"),
    "flap": lambda x: FLAPImportance([x, x + 1]),
    "flap standardised": lambda x: FLAPImportance([x, x + 1], standardised=True),
    "wanda": lambda x: WandaImportance([x, x + 1]),
    "chip": lambda x: CHIPImportance([x]),
}
MEASURED = [metric for metric in METRICS if metric != "chip" and "data-free" not in metric]
SCOPES = {
    "local": {},
    "global": {"global_pruning": True},
    "isomorphic": {"global_pruning": True, "isomorphic": True},
}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", PICO, ids=lambda case: case.name)
def test_every_network_with_torch_pruning_and_with_ours(case, metric, scope):
    x = case.example()
    for pruner, ours in (
        (tp.pruner.BasePruner, {}),
        (IntraFusionPruner, {"fusion": "paper"}),
        (IntraFusionPruner, {"fusion": "barycentre"}),
    ):
        model = case.model()
        width = sum(p.numel() for p in model.parameters())
        one = pruner(
            model,
            (x,),
            METRICS[metric](x),
            pruning_ratio=0.4,
            ignored_layers=case.ignored(model),
            **SCOPES[scope],
            **ours,
        )
        one.step()
        assert sum(p.numel() for p in model.parameters()) < width
        assert torch.isfinite(model(x)).all()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj, self.fc = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(len(x), -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = torch.softmax(q @ k.mT, dim=-1) @ v
        return self.fc(self.proj(y.transpose(1, 2).flatten(2)).mean(1))


@pytest.mark.parametrize("metric", METRICS)
def test_attention_does_not_crash(metric):
    model, x = Attention().eval(), torch.randn(3, 5, 8)
    pruner = tp.pruner.BasePruner(
        model, (x,), METRICS[metric](x), ignored_layers=[model.fc], num_heads={model.qkv: 2}, pruning_ratio=0.5
    )
    groups = list(pruner.DG.get_all_groups([model.fc], [nn.Linear]))
    assert groups
    for group in groups:
        scores = pruner.importance(pruner._downstream_node_as_root_if_attention(group) or group)
        assert torch.isfinite(scores).all()


@pytest.mark.parametrize("metric", METRICS)
def test_scoring_leaves_the_network_and_its_modes_as_they_were(metric):
    model, x = randomise_(Plain()), torch.randn(4, 3, 8, 8)
    group = group_of(model, model.conv1, x[:1])
    model.train()
    model.fc1.eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    first, second = METRICS[metric](x)(group), METRICS[metric](x)(group)
    assert torch.equal(first, second)
    assert modes == [m.training for m in model.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_bad_activation_concerns_only_the_groups_that_read_it():
    model, x = randomise_(Plain()), torch.randn(16, 3, 8, 8)
    model.fc1.bias.data[0] = float("nan")
    metric = ReconstructionImportance([x])
    assert torch.isfinite(metric(group_of(model, model.conv1, x[:1]))).all()
    with pytest.raises(ValueError, match=r"layer 'fc2' reads activations that are not finite"):
        metric(group_of(model, model.fc1, x[:1]))


def test_a_way_of_calling_the_network_can_be_given():
    model, x = randomise_(Plain()), torch.randn(4, 3, 8, 8)
    group = group_of(model, model.conv1, x[:1])
    wrapped = [{"images": x}]
    forward = lambda model, batch: model(batch["images"])  # noqa: E731
    for kind in MEASURING:
        assert torch.equal(kind(wrapped, forward)(group), kind([x])(group))


def test_bad_settings_are_refused_when_they_are_given():
    with pytest.raises(ValueError, match="search is 'sideways': it must be one of forward, backward"):
        ReconstructionImportance(search="sideways")
    for ridge in (0, -1.0, float("nan"), float("inf"), True, "much"):
        with pytest.raises(ValueError, match=r"ridge is .*: it must be a number from 1e-10 on"):
            ReconstructionImportance(search="backward", ridge=ridge)


def test_bad_input_is_refused_with_a_sentence():
    model, x = randomise_(Plain()), torch.randn(4, 3, 8, 8)
    for kind in MEASURING:
        with pytest.raises(ValueError, match="empty"):
            kind([])
        with pytest.raises(ValueError, match=r"'conv1' has 2 of its 8 channels"):
            kind([x])(group_of(model, model.conv1, x[:1], [0, 3]))
        with pytest.raises(ValueError, match="no dependency graph"):
            kind([x])(tp.dependency.Group())
    group = group_of(model, model.conv1, x[:1])
    model.bn1.bias.data[2] = float("nan")
    with pytest.raises(ValueError, match=r"layer 'conv2' reads activations that are not finite"):
        ReconstructionImportance([x])(group)
    for kind in (FLAPImportance, WandaImportance):
        with pytest.raises(ValueError, match=r"layer 'conv2' reads activations that are not finite"):
            kind([x])(group)
    with pytest.raises(ValueError, match=r"layer 'conv1' gives activations that are not finite"):
        CHIPImportance([x])(group)
    with pytest.raises(ValueError, match=r"while scoring group 'conv1': .*not finite"):
        ReconstructionImportance()(group)
    model = randomise_(Plain())
    group = group_of(model, model.conv1, x[:1])
    model.conv2.weight.data[0, 0, 0, 0] = float("inf")
    for kind in (ReconstructionImportance, FLAPImportance, WandaImportance):
        with pytest.raises(ValueError, match=r"while scoring group 'conv1': .*weights.* not finite"):
            kind([x])(group)


@pytest.mark.parametrize("importance", MEASURING)
def test_batches_that_do_not_run_are_named_with_what_may_be_wrong(importance):
    images, labels = torch.randn(8, 3, 8, 8), torch.arange(8)
    with pytest.raises(TypeError, match=r"the importance's batches are one tensor"):
        importance(images)
    model = PICO[0].model()
    group = tp.DependencyGraph().build_dependency(model, (images,)).get_pruning_group(
        model.conv1, tp.prune_conv_out_channels, list(range(8))
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"the importance's batch 0 \(2 tensors: .*does not run: .*without labels"):
        importance([(images, labels)])(group)
