"""Queries, keys and values of one layer, in orders that torch-pruning does not follow: found, parted, cut and saved."""

import copy

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

import intrafusion
from intrafusion import IntraFusionPruner
from intrafusion.groups.heads import find_heads
from intrafusion.groups.joined import JoinedByHead, JoinedByPart, JoinedLinear, part_
from intrafusion.groups.packed import candidates, part_packed_
from tests.groups.test_heads import Network, _turned, l1


class Own(nn.Linear):
    """A linear layer of a class of its own, as Falcon has one."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Block(nn.Module):
    """Attention whose queries, keys and values come from one layer."""

    def __init__(self, by_head=True, heads=4, shared=1, dim=4, width=12, rotary=True, slopes=False, layer=nn.Linear):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = heads, heads // shared, dim
        self.by_head, self.rotary = by_head, rotary
        self.slopes = nn.Parameter(torch.randn(heads, 1, 1)) if slopes else None
        self.query_key_value = layer(width, (heads + 2 * heads // shared) * dim)
        self.dense = nn.Linear(heads * dim, width)

    def forward(self, x: Tensor) -> Tensor:
        made, keys, shared = self.query_key_value(x), self.num_kv_heads, self.num_heads // self.num_kv_heads
        if self.by_head:
            made = made.unflatten(-1, (keys, shared + 2, self.head_dim))
            q, k, v = made[..., :-2, :].flatten(2, 3), made[..., -2, :], made[..., -1, :]
        else:
            sizes = [count * self.head_dim for count in (keys * shared, keys, keys)]
            q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in made.split(sizes, dim=-1))
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        if self.rotary:
            q, k = _turned(q), _turned(k)
        k, v = (one.repeat_interleave(shared, dim=1) for one in (k, v))
        logits = q @ k.mT / 2
        if self.slopes is not None:
            logits = logits + self.slopes * torch.arange(logits.shape[-1])
        return self.dense((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


LAYOUTS = [
    {"by_head": True},
    {"by_head": True, "shared": 2},
    {"by_head": True, "shared": 4},
    {"by_head": False, "shared": 2},
    {"by_head": True, "layer": Own},
]


def network(**options) -> Network:
    torch.manual_seed(0)
    return Network(block=Block, **options).eval()


def forward(x: Tensor):
    return lambda model: [model(x)]


def part_all_(model: nn.Module, x: Tensor):
    return part_packed_(model, forward(x), candidates(model))


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_the_order_is_found_and_the_network_and_its_state_stay_what_they_are(options):
    model, x = network(**options), torch.randn(2, 6, 5)
    before, state = model(x), {name: value.clone() for name, value in model.state_dict().items()}
    part_all_(model, x)
    layers = [block.query_key_value for block in model.blocks]
    assert all(isinstance(layer, JoinedLinear) for layer in layers)
    if options.get("shared") != 4:  # with one key both orders are the same
        assert all(type(layer) is (JoinedByHead if options["by_head"] else JoinedByPart) for layer in layers)
    blocks = find_heads(model, forward(x))
    assert [(b.heads, b.key_heads, b.dim) for b in blocks] == [(4, 4 // options.get("shared", 1), 4)] * 2
    assert all(block.heads_move and not block.dims_move for block in blocks)
    assert torch.allclose(model(x), before, atol=1e-6)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    other = network(**options)
    other.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    model.load_state_dict(other.state_dict())
    assert torch.allclose(model(x), other(x), atol=1e-5)


def test_what_torch_pruning_follows_by_itself_and_what_no_order_explains_stay_as_they_are():
    plain, x = network(by_head=False), torch.randn(2, 6, 5)
    part_all_(plain, x)
    assert type(plain.blocks[0].query_key_value) is nn.Linear
    slopes = network(rotary=True, slopes=True)  # neither heads nor the channels inside them can change places
    part_all_(slopes, x)
    assert type(slopes.blocks[0].query_key_value) is nn.Linear


def test_channels_inside_heads_in_an_order_by_head_are_not_taken_for_those_of_an_order_by_part():
    """Where every head is in the same order both look alike; torch-pruning then takes channels of different heads."""
    model, x = network(rotary=False, slopes=True), torch.randn(2, 6, 5)
    part_all_(model, x)
    assert type(model.blocks[0].query_key_value) is JoinedByHead
    assert [(block.heads_move, block.dims_move) for block in find_heads(model, forward(x))] == [(False, True)] * 2


@pytest.mark.filterwarnings("ignore:.*could only be cut")
@pytest.mark.parametrize("fusion", ["discard", "barycentre", "calibrated"])
@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_heads_go_saved_and_loaded(options, fusion, tmp_path):
    model, x = network(**options), torch.randn(64, 6, 5)
    pruner = IntraFusionPruner(
        model, x[:2], l1(), widths={"heads": 0.5}, fusion=fusion, calibration=[x] if fusion == "calibrated" else None
    )
    pruner.step()
    keys = 4 // options.get("shared", 1)
    left = keys if keys < 4 else 2
    for block in model.blocks:
        assert block.query_key_value.out_features == (2 + 2 * left) * 4
        assert (block.num_heads, block.num_kv_heads, block.dense.in_features) == (2, left, 8)
    intrafusion.save(model, tmp_path / "pruned.safetensors")
    again = intrafusion.load(tmp_path / "pruned.safetensors", network(**options))
    assert torch.equal(again(x), model(x))


def _with_twin_heads(model: Network) -> Network:
    """Every second query head (with its key and value, if it has its own) is the one before it."""
    for block in model.blocks:
        shared, dim = block.num_heads // block.num_kv_heads, block.head_dim
        with torch.no_grad():
            for value in (block.query_key_value.weight, block.query_key_value.bias):
                if not block.by_head:
                    queries = value[: block.num_heads * dim].unflatten(0, (-1, 2, dim))
                    queries[:, 1] = queries[:, 0]
                elif shared > 1:
                    queries = value.unflatten(0, (block.num_kv_heads, shared + 2, dim))[:, :shared]
                    queries[:, 1::2] = queries[:, 0::2]
                else:
                    heads = value.unflatten(0, (-1, 2, 3 * dim))
                    heads[:, 1] = heads[:, 0]
    return model


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_twin_heads_leave_without_a_trace(options):
    model, x = _with_twin_heads(network(**options)), torch.randn(64, 6, 5)
    before = model(x)

    def second_ones(group):
        return (torch.arange(len(group[0].idxs)) // 4 % 2 == 0).float() + 1

    pruner = IntraFusionPruner(model, x[:2], second_ones, widths={"heads": 0.5}, fusion="calibrated", calibration=[x])
    pruner.step()
    assert model.blocks[0].dense.in_features == 8
    assert (model(x) - before).norm() < 2e-3 * before.norm()


def test_a_history_is_cut_again_in_a_copy_that_was_never_parted():
    model, x = network(shared=2), torch.randn(2, 6, 5)
    fresh = copy.deepcopy(model)
    pruner = IntraFusionPruner(model, x, l1(), widths={"heads": 0.5, "feed_forward": 0.5}, fusion="discard")
    pruner.step()
    graph = pruner.tracing.trace(fresh, (x,))
    assert isinstance(fresh.blocks[0].query_key_value, JoinedLinear)
    assert graph.model is fresh


def _parameters(model):
    return {name: id(parameter) for name, parameter in model.named_parameters()}


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
def test_what_is_not_parted_keeps_its_parameters_and_their_gradients():
    for model, ignored in ((network(rotary=True, slopes=True), []), (network(), ["blocks"])):
        model(torch.randn(2, 6, 5)).sum().backward()
        before, grads = _parameters(model), {name: p.grad for name, p in model.named_parameters()}
        layers = [model.get_submodule(name) for name in ignored]
        widths = {"feed_forward": 0.5}
        IntraFusionPruner(model, torch.randn(2, 6, 5), l1(), widths=widths, fusion="discard", ignored_layers=layers)
        assert _parameters(model) == before
        assert all(p.grad is grads[name] for name, p in model.named_parameters())


def test_a_pruner_that_is_not_made_leaves_the_layers(monkeypatch):
    model = network()
    before = _parameters(model)
    monkeypatch.setattr(tp.DependencyGraph, "build_dependency", lambda *_, **__: 1 / 0)
    with pytest.raises((ZeroDivisionError, ValueError)):
        IntraFusionPruner(model, torch.randn(2, 6, 5), l1(), widths={"heads": 0.5}, fusion="discard")
    assert _parameters(model) == before
    assert type(model.blocks[0].query_key_value) is nn.Linear


def test_tied_layers_stay_whole():
    one, two = network(), network()
    one.blocks[1].query_key_value = one.blocks[0].query_key_value
    two.blocks[1].query_key_value.weight = two.blocks[0].query_key_value.weight
    for model in (one, two):
        before = _parameters(model)
        assert candidates(model) == []
        part_all_(model, torch.randn(2, 6, 5))
        assert _parameters(model) == before


class Scaled(nn.Linear):
    def forward(self, x: Tensor, scale: float) -> Tensor:
        return super().forward(x) * scale


def test_layers_are_looked_at_without_their_hooks_and_whatever_they_take():
    model, seen = network(layer=Own), []
    model.blocks[0].query_key_value.register_forward_hook(lambda *args: seen.append(args[1][0].shape))
    assert [packed.name for packed in candidates(model)] == [f"blocks.{n}.query_key_value" for n in (0, 1)]
    assert seen == []
    assert candidates(network(layer=Scaled)) == []
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(model.blocks[0].query_key_value)
    assert [packed.name for packed in candidates(model)] == ["blocks.1.query_key_value"]


def test_a_file_is_loaded_into_a_network_without_memory(tmp_path):
    model, x = network(layer=Own), torch.randn(2, 6, 5)
    IntraFusionPruner(model, x, l1(), widths={"heads": 0.5}, fusion="discard").step()
    intrafusion.save(model, tmp_path / "pruned.safetensors")
    with torch.device("meta"):
        empty = network(layer=Own)
    assert torch.equal(intrafusion.load(tmp_path / "pruned.safetensors", empty)(x), model(x))
    wrong = network(width=8, layer=Own)
    before = _parameters(wrong)
    with pytest.raises(intrafusion.CheckpointError, match="does not fit"):
        intrafusion.load(tmp_path / "pruned.safetensors", wrong)
    assert _parameters(wrong) == before


def test_numbers_of_heads_that_do_not_fit_are_an_error():
    layer = nn.Linear(3, 24)
    part_(layer, 8, 2, 4, JoinedByHead)
    layer.num_key_value_heads = 4  # pyright: ignore
    with pytest.raises(RuntimeError, match="num_key_value_heads=4, head_dim=4"):
        layer(torch.randn(2, 3))
    layer.num_key_value_heads = 2  # pyright: ignore
    with pytest.raises(RuntimeError, match="20 rows, of 24"):
        layer.load_state_dict({"weight": torch.zeros(20, 3), "bias": torch.zeros(20)})
