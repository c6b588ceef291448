"""Attributes that hold widths: set where only one choice makes the network run, asked for where not."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional as F

from intrafusion import FusionError, IntraFusionPruner
from intrafusion.history.replay import replay_
from intrafusion.prune.twin import WorseThanCut

PLAIN, CORRECTING = ("discard", "paper", "barycentre"), ("data-free", "calibrated")


class Attention(nn.Module):
    """As timm's: one layer makes queries, keys and values, and the sizes are attributes."""

    def __init__(self, dim=24, heads=3):
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = heads, dim // heads, dim
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(b, n, self.attn_dim))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(6, 24), nn.Linear(24, 4)
        self.attention = nn.ModuleList(Attention() for _ in range(2))
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, x):
        x = self.embed(x)
        for attention in self.attention:
            x = x + attention(x)
        return self.head((x + self.down(F.gelu(self.up(x)))).mean(1))

    def heads(self):
        return {attention.qkv: 3 for attention in self.attention}

    def sizes(self):
        return [(a.num_heads, a.head_dim, a.attn_dim) for a in self.attention]


class Split(nn.Module):
    """As Hugging Face's: a view with -1 runs with a stale head size as well, and computes something else."""

    def __init__(self, dim=24, heads=4):
        super().__init__()
        self.num_attention_heads, self.attention_head_size = heads, dim // heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = (
            layer(x).view(b, n, -1, self.attention_head_size).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))


class SplitTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.attention, self.head = nn.Linear(6, 24), Split(), nn.Linear(24, 4)
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.attention(x)
        return self.head((x + self.down(F.gelu(self.up(x)))).mean(1))

    def heads(self):
        return dict.fromkeys((self.attention.query, self.attention.key, self.attention.value), 4)

    def sizes(self):
        return [(self.attention.num_attention_heads, self.attention.attention_head_size)]


class Flattened(nn.Module):
    """Widths in the list of sizes of a new tensor, and in a reshape."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.fc, self.head = nn.Conv2d(8, 10, 3, padding=1), nn.Linear(160, 16), nn.Linear(16, 4)
        self.grid, self.features = [10, 4, 4], 10 * 16

    def forward(self, x):
        y = F.relu(self.conv2(F.relu(self.bn(self.conv(x)))))
        y = F.relu(y + 0.1 * y.new_ones(self.grid))
        return self.head(F.relu(self.fc(y.reshape(-1, self.features))))


def example(model, count=2):
    torch.manual_seed(1)
    return (
        torch.randn(count, 3, 4, 4)
        if isinstance(model, (Flattened, Ambiguous, HardCoded))
        else torch.randn(count, 5, 6)
    )


def pruner_of(model, fusion, ignored=("head",), **more):
    torch.manual_seed(1)
    if fusion == "calibrated":
        more["calibration"] = [example(model, 24)]
    heads = model.heads() if hasattr(model, "heads") else None
    pruner = IntraFusionPruner(
        model, example(model), tp.importance.GroupMagnitudeImportance(p=1), pruning_ratio=0.5, fusion=fusion,
        ignored_layers=[getattr(model, name) for name in ignored], **({"num_heads": heads} if heads else {}), **more,
    )  # fmt: skip
    pruner.progress = False
    return pruner


def step(pruner):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*could only be cut")
        warnings.simplefilter("ignore", WorseThanCut)
        pruner.step()


def made(kind):
    torch.manual_seed(0)
    return kind().eval()


@pytest.mark.parametrize("fusion", PLAIN + CORRECTING)
@pytest.mark.parametrize("kind", [Transformer, SplitTransformer])
def test_head_sizes_are_set_where_torch_pruning_knows_the_heads(kind, fusion):
    model = made(kind)
    pruner = pruner_of(model, fusion)
    step(pruner)
    for sizes in model.sizes():
        assert sizes in [(3, 4, 12), (4, 3)]
    assert model(example(model)).shape == (2, 4)
    assert len(pruner.report.attributes) == {Transformer: 4, SplitTransformer: 1}[kind]
    assert "set attention" in str(pruner.report)


@pytest.mark.parametrize("kind", [Transformer, SplitTransformer])
def test_the_plain_cut_is_torch_prunings_and_its_users_habit_changes_nothing(kind):
    ours, theirs = made(kind), made(kind)
    step(pruner_of(ours, "discard"))
    tp.pruner.BasePruner(
        theirs, (example(theirs),), tp.importance.GroupMagnitudeImportance(p=1), pruning_ratio=0.5,
        ignored_layers=[theirs.head], num_heads=theirs.heads(),
    ).step()  # fmt: skip
    for module in theirs.modules():
        if isinstance(module, Attention):
            module.head_dim, module.attn_dim = module.qkv.out_features // 9, module.qkv.out_features // 3
        if isinstance(module, Split):
            module.attention_head_size = module.query.out_features // 4
    assert ours.sizes() == theirs.sizes()
    assert torch.equal(ours(example(ours)), theirs(example(theirs)))


@pytest.mark.parametrize("fusion", PLAIN + CORRECTING)
def test_sizes_in_reshapes_tuples_and_layers_are_set(fusion):
    model = made(Flattened)
    pruner = pruner_of(model, fusion)
    step(pruner)
    assert model.features == model.conv2.out_channels * 16 == 80
    assert model.grid == [5, 4, 4]
    assert model(example(model)).shape == (2, 4)


@pytest.mark.parametrize("fusion", CORRECTING)
def test_the_network_is_put_right_as_if_its_sizes_were_read_off_its_layers(fusion):
    class Derived(Flattened):
        def forward(self, x):
            self.features, self.grid = self.fc.in_features, [self.conv2.out_channels, 4, 4]
            return super().forward(x)

    results = []
    for kind in (Flattened, Derived):
        model = made(kind)
        step(pruner_of(model, fusion))
        results.append(model(example(model)))
    assert torch.allclose(*results, atol=1e-5)


class Ambiguous(nn.Module):
    """Both factors of a width are attributes: which one has become smaller is nobody's guess."""

    def __init__(self):
        super().__init__()
        self.rows, self.columns = 4, 6
        self.conv = nn.Conv2d(3, 24, 4)
        self.fc, self.head = nn.Linear(24, 30), nn.Linear(30, 4)

    def forward(self, x):
        y = F.relu(self.conv(x)).flatten(1)
        return self.head(F.relu(self.fc(y.view(-1, self.rows, self.columns).flatten(1))))


def test_who_can_choose_is_asked_and_the_network_is_put_back():
    model = made(Ambiguous)
    before, state, out = dict(vars(model)), copy.deepcopy(model.state_dict()), model(example(model))
    pruner = pruner_of(model, "calibrated")
    with pytest.raises(FusionError, match=r"after_cut\(model, group\)") as caught:
        step(pruner)
    assert "self.rows, self.columns" in str(caught.value)
    assert "rows = 4" in str(caught.value)
    assert {k: v for k, v in vars(model).items() if isinstance(v, int)} == {
        k: v for k, v in before.items() if isinstance(v, int)
    }
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(example(model)), out)
    assert not pruner.report.attributes


@pytest.mark.parametrize("fusion", PLAIN)
def test_a_plain_cut_is_left_to_its_user_with_a_warning(fusion):
    model = made(Ambiguous)
    pruner = pruner_of(model, fusion)
    with pytest.warns(UserWarning, match=r"does not run with its new widths.*rows = 4"):
        step(pruner)
    model.columns = model.conv.out_channels // model.rows
    assert model(example(model)).shape == (2, 4)


@pytest.mark.parametrize("fusion", PLAIN + CORRECTING)
def test_a_function_that_sets_them_is_called_after_each_cut(fusion):
    model, seen = made(Ambiguous), []

    def after_cut(network, group):
        seen.append(group[0].dep.target.module)
        network.columns = network.conv.out_channels // network.rows

    pruner = pruner_of(model, fusion, after_cut=after_cut)
    step(pruner)
    assert model.conv in seen
    assert (model.rows, model.columns) == (4, 3)
    assert [str(one) for one in pruner.report.attributes] == ["columns: 6 -> 3"]
    assert model(example(model)).shape == (2, 4)


@pytest.mark.parametrize("fusion", ["discard", "calibrated"])
def test_a_function_that_fails_leaves_the_network_as_it_was(fusion):
    model = made(Ambiguous)

    def after_cut(network, group):
        network.columns = 17
        raise KeyError("no such layer")

    with pytest.raises(FusionError, match="no such layer"):
        step(pruner_of(model, fusion, after_cut=after_cut))
    assert model.columns == 6
    assert model.conv.out_channels == 24


def test_what_is_no_function_is_refused():
    with pytest.raises(TypeError, match="after_cut"):
        pruner_of(made(Ambiguous), "discard", after_cut="rows")


class HardCoded(Ambiguous):
    def forward(self, x):
        y = F.relu(self.conv(x)).flatten(1)
        return self.head(F.relu(self.fc(y.view(-1, 2, 12).flatten(1))))


def test_a_width_in_the_code_is_named_by_its_line():
    with pytest.raises(FusionError, match=r"in HardCoded.forward, test_sizes.py:\d+: return self.head") as caught:
        step(pruner_of(made(HardCoded), "calibrated"))
    assert "does not run" in str(caught.value)
    with pytest.warns(UserWarning, match="in HardCoded.forward"):
        step(pruner_of(made(HardCoded), "discard"))


@pytest.mark.parametrize("fusion", ["barycentre", "calibrated"])
def test_between_groups_the_user_may_set_them_by_hand(fusion):
    model = made(Ambiguous)
    pruner = pruner_of(model, fusion)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WorseThanCut)
        for group in pruner.step(interactive=True):
            group.prune()
            model.columns = model.conv.out_channels // model.rows
    assert (model.rows, model.columns) == (4, 3)
    assert [str(one) for one in pruner.report.attributes] == ["columns: 6 -> 3"]


def test_a_network_that_needs_nothing_keeps_its_attributes():
    class Plain(Ambiguous):
        def forward(self, x):
            y = F.relu(self.conv(x)).flatten(1)
            return self.head(F.relu(self.fc(y)))

    for fusion in ("discard", "calibrated"):
        model = made(Plain)
        step(pruner_of(model, fusion))
        assert (model.rows, model.columns) == (4, 6)


def test_a_second_network_gets_them_when_it_is_pruned_alike():
    model = made(Flattened)
    average = copy.deepcopy(model)
    pruner = pruner_of(model, "barycentre")
    step(pruner)
    replay_(pruner.tracing.trace(average, (example(model),)), pruner.last_step.cuts, None)
    assert (average.features, average.grid) == (model.features, model.grid)
    assert torch.equal(average(example(model)), model(example(model)))
