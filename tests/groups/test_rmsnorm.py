"""RMSNorm, which torch-pruning does not know, and a class of the user's: cut, fused, carried, saved and aligned."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

import intrafusion
from intrafusion import IntraFusionPruner
from intrafusion.average.couplings import couplings_of
from intrafusion.groups.apply import apply_pair
from intrafusion.groups.features import channel_features
from intrafusion.groups.gaussian import Gaussian
from intrafusion.groups.kinds.base import kind_of, torch_pruners
from intrafusion.groups.kinds.normalisation import NormPruner, register_norm
from intrafusion.groups.permutation_check import class_permutation, reordered
from intrafusion.groups.places import load_state_, permuted, random_orders, state_of
from intrafusion.groups.statistics import expected_covariances
from intrafusion.groups.table import tabulate
from intrafusion.history.cotangent import mixings
from intrafusion.ot import Pair


class MyRMSNorm(nn.Module):
    """As language models write it, with the width in an attribute that the forward reads."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.eps, self.weight = dim, 1e-6, nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.dim**0.5) / (x.norm(dim=-1, keepdim=True) + self.eps) * self.weight


class SubclassedNorm(nn.RMSNorm):
    """A class that nobody registered."""


register_norm(MyRMSNorm)


class Stream(nn.Module):
    """A pre-norm block without biases."""

    def __init__(self, norm: Any = nn.RMSNorm) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 8, bias=False), norm(8)
        self.up, self.down = nn.Linear(8, 12, bias=False), nn.Linear(12, 8, bias=False)
        self.last, self.head = norm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        y = y + self.down(F.silu(self.up(self.norm(y))))
        return self.head(self.last(y).mean(1))


NORMS = [nn.RMSNorm, MyRMSNorm]


def network(norm: Any) -> Stream:
    torch.manual_seed(0)
    model = Stream(norm).eval()
    for module in (model.norm, model.last):
        module.weight.data = torch.randn(8)
    return model


def example() -> Tensor:
    return torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1))


def stream_of(model: Stream) -> tuple[tp.DependencyGraph, Any]:
    graph = tp.DependencyGraph().build_dependency(model, (example(),), customized_pruners=torch_pruners())
    return graph, tabulate(graph, model.embed, tp.prune_linear_out_channels)


def pruned(model: Stream, fusion: Any = "barycentre", metric: Any = None) -> IntraFusionPruner:
    """Half of the stream goes."""
    metric = metric or tp.importance.GroupMagnitudeImportance(p=1)
    options: dict[str, Any] = {"ignored_layers": [model.head, model.up], "customized_pruners": torch_pruners()}
    pruner = IntraFusionPruner(model, example(), metric, pruning_ratio=0.5, fusion=fusion, **options)
    pruner.step()
    return pruner


def duplicated(norm: Any) -> Stream:
    """Channels 2 i and 2 i + 1 of the stream are the same, in every layer."""
    model = network(norm)
    for layer in (model.embed, model.down):
        layer.weight.data[1::2] = layer.weight.data[::2]
    for module in (model.norm, model.last):
        module.weight.data[1::2] = module.weight.data[::2]
    return model


@pytest.mark.parametrize("norm", NORMS)
def test_a_permutation_leaves_the_function_unchanged(norm: Any) -> None:
    model, x = network(norm), example()
    _, table = stream_of(model)
    before = model(x)
    order = class_permutation(table.classes, torch.Generator().manual_seed(3))
    with reordered((table, order)):
        assert not torch.equal(order, torch.arange(8))
        torch.testing.assert_close(model(x), before)
    apply_pair(table, Pair(torch.eye(8).double()[order], torch.eye(8).double()[order].T.clone(), torch.arange(8)))
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("norm", NORMS)
def test_a_selection_is_the_plain_cut(norm: Any) -> None:
    x, (ours, theirs) = example(), (network(norm), network(norm))
    pruned(ours, "discard")
    graph, _ = stream_of(theirs)
    kept = [i for i in range(8) if (ours.norm.weight == theirs.norm.weight[i]).any()]
    gone = [i for i in range(8) if i not in kept]
    graph.get_pruning_group(theirs.embed, tp.prune_linear_out_channels, gone).prune()
    assert ours.norm.weight.shape == theirs.norm.weight.shape == (4,)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_duplicates_in_equal_numbers_merge_without_a_trace(norm: Any) -> None:
    """The root mean square of the stream is then that of the channels that stay."""
    model, x = duplicated(norm), example()
    before = model(x)
    pruner = pruned(model, metric=lambda group: torch.tensor([1.0, 0.0]).repeat(4))  # one of each pair
    assert model.embed.out_features == 4
    assert [group.merged for group in pruner.report.groups] == ["barycentre"]
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_the_width_is_where_the_layer_holds_it(norm: Any) -> None:
    model = network(norm)
    pruned(model)
    assert (model.norm.dim if norm is MyRMSNorm else model.norm.normalized_shape) in (4, (4,))
    assert model.norm.weight.shape == (4,)
    assert model(example()).shape == (3, 4)


def test_the_gain_has_no_say_in_the_distance_of_channels() -> None:
    """As LayerNorm's: it is no filter, and the readers' columns say what a channel is worth."""
    model = network(nn.RMSNorm)
    graph, table = stream_of(model)
    before = channel_features(graph, table)
    model.norm.weight.data.mul_(3)
    torch.testing.assert_close(channel_features(graph, table), before, rtol=0, atol=0)
    assert before.shape == (8, 6 + 12 + 12 + 4)


@pytest.mark.parametrize("norm", NORMS)
def test_the_gradient_of_a_merged_network_is_the_carried_one(norm: Any) -> None:
    """Exact duplicates: the chain rule through y' = R y, V' = V S is exact."""
    model, x = duplicated(norm), example()
    graph, table = stream_of(model)
    model(x).square().sum().backward()
    gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    kept = torch.arange(0, 8, 2)
    rows = torch.eye(8).double().unflatten(0, (4, 2)).sum(dim=1)
    pair = Pair(rows / 2, rows.T.clone(), kept)
    apply_pair(table, pair)
    graph.get_pruning_group(model.embed, tp.prune_linear_out_channels, [1, 3, 5, 7]).prune()
    model.zero_grad()
    model(x).square().sum().backward()
    carried = {f"{slot.name}.{name}": mixing(gradients[f"{slot.name}.{name}"], 1) for slot, name, mixing in
               mixings(table, pair) if f"{slot.name}.{name}" in gradients}  # fmt: skip
    for name in ("norm.weight", "last.weight", "embed.weight"):
        torch.testing.assert_close(carried[name][kept], model.get_parameter(name).grad.double(), rtol=1e-4, atol=1e-4)
    for name in ("up.weight", "head.weight"):
        wanted = model.get_parameter(name).grad.double()
        torch.testing.assert_close(carried[name][:, kept], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_expected_moments_have_power_one_and_the_correlations_of_the_stream(norm: Any) -> None:
    """Without gains; that the norm multiplies x by something made of x must not be taken for a product of two."""
    model = network(norm)
    model.norm.weight.data.fill_(1.0)
    graph, table = stream_of(model)
    up = next(slot for slot in table.slots if slot.owner is model.up)
    (cov,) = expected_covariances(graph, table, [up])
    assert cov.diagonal().mean().item() == pytest.approx(1.0)
    white = model.embed.weight.detach().double() @ model.embed.weight.detach().double().T
    torch.testing.assert_close(cov, white / white.diagonal().mean())


def test_the_mean_is_not_taken_out() -> None:
    model = network(nn.RMSNorm)
    kind, mean = kind_of(model.norm), torch.arange(8).double()
    slot = next(slot for slot in stream_of(model)[1].slots if slot.owner is model.norm)
    out = kind.moments(slot, Gaussian(mean, torch.eye(8).double()))
    power = (mean.square() + 1).mean()
    torch.testing.assert_close(out.mean, model.norm.weight.detach().double() * mean / power.sqrt())


@pytest.mark.parametrize("norm", NORMS)
def test_a_pruned_network_is_saved_and_loaded(norm: Any, tmp_path) -> None:
    model, fresh, x = network(norm), network(norm), example()
    pruned(model)
    intrafusion.save(model, tmp_path / "pruned.safetensors")
    intrafusion.load(tmp_path / "pruned.safetensors", fresh)
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("norm", NORMS)
def test_a_permuted_copy_is_aligned(norm: Any) -> None:
    model, x = network(norm), example()
    groups = couplings_of(model, x).groups
    assert {group.name: group.reason for group in groups if group.reason}.keys() == {"head"}
    assert {"norm.weight", "last.weight"} <= set(groups[0].tensors)
    other = copy.deepcopy(model)
    load_state_(other, permuted(state_of(model), groups, random_orders(groups, torch.Generator().manual_seed(4))))
    aligned = intrafusion.align(other, model, x).apply(other)
    assert all(torch.equal(a, b) for a, b in zip(state_of(aligned).values(), state_of(model).values(), strict=True))


class Counting(NormPruner):
    """A user's own pruner."""

    calls = 0

    def prune_out_channels(self, layer: Any, idxs: Any) -> nn.Module:
        Counting.calls += 1
        return super().prune_out_channels(layer, idxs)

    prune_in_channels = prune_out_channels


def test_a_pruner_of_the_users_cuts_and_the_kind_fuses() -> None:
    model = network(nn.RMSNorm)
    metric = tp.importance.GroupMagnitudeImportance(p=1)
    options: dict[str, Any] = {"ignored_layers": [model.head, model.up]}
    options["customized_pruners"] = {nn.RMSNorm: Counting()}
    pruner = IntraFusionPruner(model, example(), metric, pruning_ratio=0.5, fusion="barycentre", **options)
    pruner.step()
    assert Counting.calls > 0
    assert [group.merged for group in pruner.report.groups] == ["barycentre"]


def test_a_subclass_that_nobody_registered_is_not_guessed_at() -> None:
    assert kind_of(SubclassedNorm(4)) is None
    assert kind_of(nn.RMSNorm(4)) is not None
    assert SubclassedNorm not in torch_pruners()


def test_what_is_no_class_of_modules_is_refused() -> None:
    with pytest.raises(TypeError, match="class of modules"):
        register_norm(nn.RMSNorm(4))  # pyright: ignore
