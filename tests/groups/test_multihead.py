"""nn.MultiheadAttention whose heads are to be cut: parted, the same function, and left whole where it must be."""

import copy

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from intrafusion import FusionError
from intrafusion.groups.heads import find_heads
from intrafusion.groups.multihead import PartedAttention, part_attention_, why_whole
from intrafusion.groups.packed import multiheads
from tests.groups.attending import (
    DIM,
    EXAMPLE,
    HEADS,
    NETWORKS,
    WIDTH,
    Attending,
    Shown,
    attentions,
    is_whole,
    network,
    networks,
    parameters_of,
    pruner_of,
    random_,
)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_it_computes_what_it_computed_whatever_it_is_called_with(batch_first, bias, cross, batched):
    whole = random_(nn.MultiheadAttention(WIDTH, HEADS, dropout=0.3, bias=bias, batch_first=batch_first))
    parted = copy.deepcopy(whole)
    part_attention_(parted)
    n, queries, keys = 3 if batched else 1, 5, 7 if cross else 5

    def drawn(length: int) -> Tensor:
        x = torch.randn(n, length, WIDTH)
        return x[0] if not batched else x if batch_first else x.transpose(0, 1)

    x = drawn(queries)
    inputs = (x, drawn(keys), drawn(keys)) if cross else (x, x, x)
    few, many = torch.rand(queries, keys) < 0.3, torch.rand(n * HEADS, queries, keys) < 0.3
    padding = torch.rand(n, keys) < 0.3
    few[:, 0] = many[..., 0] = padding[:, 0] = False  # a query that sees nothing has no output
    causal = torch.ones(queries, keys, dtype=torch.bool).triu(1)
    masks = [{}, *({"attn_mask": mask} for mask in (few, many, torch.randn(few.shape), torch.randn(many.shape)))]
    masks += [{"attn_mask": causal, "is_causal": True}]
    for padded in (None, padding, torch.randn(padding.shape)):
        padded = padded[0] if padded is not None and not batched else padded
        for mask in masks:
            if padded is not None and mask and padded.dtype != mask["attn_mask"].dtype:
                continue
            for needed, mean, training in ((0, 1, 0), (0, 1, 1), (1, 1, 0), (1, 1, 1), (1, 0, 0)):
                told = {"key_padding_mask": padded, "need_weights": bool(needed), "average_attn_weights": bool(mean)}
                outputs = []
                for layer in (whole.train(bool(training)), parted.train(bool(training))):
                    torch.manual_seed(0)  # the same dropout
                    outputs.append(layer(*inputs, **told, **mask))
                (expected, weights), (found, own) = outputs
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
                torch.testing.assert_close(own, weights, rtol=1e-6, atol=1e-6)


@networks
def test_heads_are_found_and_the_network_and_its_state_stay_what_they_are(name):
    model, x = network(name)
    assert all(module.training for module in pruner_of(model.train(), x, widths={"heads": 0.5}).model.modules())
    model, x = network(name)
    before, state = model(*x), {name: value.clone() for name, value in model.state_dict().items()}
    assert find_heads(model, lambda m: [m(*x)]) == []
    pruner = pruner_of(model, x, widths={"heads": 0.5})
    assert all(isinstance(layer, PartedAttention) for layer in attentions(model))
    assert [(b.heads, b.key_heads, b.dim, b.heads_move, b.dims_move) for b in pruner.heads] == [
        (HEADS, HEADS, DIM, True, True) for _ in attentions(model)
    ]
    torch.testing.assert_close(model(*x), before, rtol=1e-6, atol=1e-6)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    other = NETWORKS[name][0]().eval()
    other.load_state_dict({name: value + 0.1 for name, value in model.state_dict().items()})
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model(*x), other(*x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Unwrapped parameters", "ignore:torch-pruning found no group")
def test_it_stays_whole_where_its_heads_are_not_asked_for():
    for options in (
        {"pruning_ratio": 0.5},
        {"widths": {"feed_forward": 0.5}},
        {"widths": {"feed_forward": 0.5, "heads": 0.0}},
        {"pruning_ratio": 0.5, "head_pruning_ratio": 0.5},
    ):
        model, x = network()
        before = parameters_of(model)
        pruner_of(model, x, **options)
        assert is_whole(model, before)


def test_an_ignored_one_stays_whole():
    model, x = network()
    first, second = attentions(model)
    before = {name: id(parameter) for name, parameter in first.named_parameters()}
    pruner_of(model, x, widths={"heads": 0.5}, ignored=[first]).step()
    assert type(first) is nn.MultiheadAttention
    assert parameters_of(first) == before
    assert second.num_heads == 2


def test_one_whose_parameter_is_ignored_stays_whole():
    model, x = network()
    first, second = attentions(model)
    pruner_of(model, x, widths={"heads": 0.5}, ignored=[first.in_proj_weight]).step()
    assert type(first) is nn.MultiheadAttention
    assert second.num_heads == 2


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"add_bias_kv": True}, "a key and value of its own"),
        ({"add_zero_attn": True}, "a key and value of zeros"),
    ],
    ids=str,
)
def test_what_cannot_be_parted_is_named(options, why):
    model = random_(Attending(**options))
    before = parameters_of(model)
    told = pytest.warns(UserWarning, match=f"the heads of 'attention' stay: this nn.MultiheadAttention has {why}")
    refused = pytest.raises(ValueError, match=r"widths names 'heads'|torch-pruning cannot follow")
    with told, refused:
        pruner_of(model, EXAMPLE, widths={"heads": 0.5})
    assert is_whole(model, before)


class OwnLinear(nn.Linear):
    pass


def test_why_one_stays_whole():
    class Own(nn.MultiheadAttention):
        pass

    assert why_whole(nn.MultiheadAttention(8, 2)) == ""
    assert "class of its own, Own" in why_whole(Own(8, 2))
    assert "kdim, vdim" in why_whole(nn.MultiheadAttention(8, 2, kdim=4))
    layer = nn.MultiheadAttention(8, 2)
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(layer, "in_proj_weight")
    assert why_whole(layer) != ""
    assert why_whole(nn.utils.parametrizations.orthogonal(nn.MultiheadAttention(8, 2), "in_proj_weight")) != ""
    layer = nn.MultiheadAttention(8, 2)
    nn.utils.parametrizations.weight_norm(layer.out_proj, "weight")
    assert "weights that are computed" in why_whole(layer)
    layer = nn.MultiheadAttention(8, 2)
    layer.out_proj = OwnLinear(8, 8)
    assert "an output layer of a class of its own, OwnLinear" in why_whole(layer)
    layer = nn.MultiheadAttention(8, 2)
    layer.forward = layer.forward  # as wrappers do, Accelerate's for example
    assert "another forward" in why_whole(layer)
    tied = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)])
    tied[0].out_proj.weight = tied[1].out_proj.weight
    assert multiheads(tied) == []


def test_heads_with_masks_of_their_own_stay_and_those_with_copies_of_one_go():
    model = random_(Attending(masks="own"))
    before = parameters_of(model)
    with pytest.raises(ValueError, match="the heads of 'attention' are told apart"):
        pruner_of(model, EXAMPLE, widths={"heads": 0.5})
    assert is_whole(model, before)
    pruner_of(model, EXAMPLE, widths={"head_dim": 0.5}).step()
    assert (model.attention.num_heads, model.attention.head_dim) == (4, 2)
    model = random_(Attending(masks="copies"))
    pruner_of(model, EXAMPLE, widths={"heads": 0.5}).step()
    assert model.attention.num_heads == model.count == 2  # as many copies as heads, or it would not run


@pytest.mark.parametrize("pools", [True, False])
def test_weights_that_are_read_or_returned_tie_the_heads_to_nothing(pools):
    model, x = random_(Shown(pools)), torch.randn(64, 6, 5)
    pruner = pruner_of(model, (x,), widths={"heads": 0.5})
    pruner.step()
    layer = model.attention
    assert (layer.num_heads, layer.head_dim, layer.embed_dim, layer.out_proj.out_features) == (2, DIM, WIDTH, WIDTH)
    assert not layer._forward_hooks
    if not pools:
        _, weights = model(x)
        weights.sum().backward()  # they have gradients as before
        assert weights.shape == (64, 6, 6)
        assert layer.q_proj.weight.grad is not None
    model = random_(Shown(average=False))
    with pytest.raises(ValueError, match="the heads of 'attention' are told apart"):
        pruner_of(model, (x,), widths={"heads": 0.5})
    pruner_of(model, (x,), widths={"head_dim": 0.5}).step()
    assert (model.attention.num_heads, model.attention.head_dim) == (HEADS, 2)


class Literal(Attending):
    """So many masks as there were heads at first."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = self.inputs(x), self.others(y)
        mask = torch.zeros(len(x) * 4, x.shape[1], y.shape[1])
        return self.scores((x + self.attention(self.norm(x), y, y, attn_mask=mask)[0]).mean(dim=1))


def test_heads_that_are_left_do_not_pass_for_more_narrower_ones():
    model = random_(Literal())
    pruner = pruner_of(model, EXAMPLE, widths={"heads": 0.5})
    with pytest.warns(UserWarning, match="the network does not run with its new widths"):
        pruner.step()
    assert model.attention.head_dim == 4
    model = random_(Literal())
    with pytest.raises(FusionError, match="the network does not run with its new widths"):
        pruner_of(model, EXAMPLE, fusion="calibrated", widths={"heads": 0.5}).step()
    assert model.attention.num_heads == 4


class Free(Attending):
    """A class of its own: attention of one class is tried together."""


class Twice(nn.Module):
    """Two that attend, one with a mask for every head."""

    def __init__(self):
        super().__init__()
        self.free, self.masked, self.scores = Free(), Attending(masks="own"), nn.Linear(3, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.scores(self.free(x, y) + self.masked(x, y))


def test_heads_of_one_go_although_those_of_another_must_stay():
    model = random_(Twice())
    pruner = pruner_of(model, EXAMPLE, widths={"heads": 0.5}, ignored=[model.masked.attention])
    pruner.step()
    assert model.free.attention.num_heads == 2
    assert type(model.masked.attention) is nn.MultiheadAttention
    model = random_(Twice())
    pruner = pruner_of(model, EXAMPLE, widths={"head_dim": 0.5})
    assert [(block.name, block.heads_move, block.dims_move) for block in pruner.heads] == [
        ("free.attention", True, True),
        ("masked.attention", False, True),
    ]


def test_a_pruner_that_is_not_made_leaves_the_layers(monkeypatch):
    model, x = network()
    before = parameters_of(model)
    with pytest.raises(ValueError, match="'channels', but this network has"):
        pruner_of(model, x, widths={"heads": 0.5, "channels": 0.5})
    assert is_whole(model, before)
    monkeypatch.setattr(tp.DependencyGraph, "build_dependency", lambda *_, **__: 1 / 0)
    with pytest.raises((ZeroDivisionError, ValueError)):
        pruner_of(model, x, widths={"heads": 0.5})
    assert is_whole(model, before)
    assert all(type(layer.out_proj) is not nn.Linear for layer in attentions(model))


def test_a_history_is_cut_again_in_a_copy_that_was_never_parted():
    model, x = network()
    fresh = copy.deepcopy(model)
    pruner = pruner_of(model, x, widths={"heads": 0.5})
    assert pruner.tracing.trace(fresh, x).model is fresh
    assert all(isinstance(layer, PartedAttention) for layer in attentions(fresh))


def test_numbers_of_heads_that_do_not_fit_are_an_error():
    layer, x = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), torch.randn(2, 5, WIDTH)
    part_attention_(layer)
    with pytest.raises(RuntimeError, match="attn_mask has 4 masks, 2 sequences of 4 heads need 8"):
        layer(x, x, x, attn_mask=torch.zeros(4, 5, 5))
    with pytest.raises(RuntimeError, match=r"a mask of torch.uint8"):
        layer(x, x, x, key_padding_mask=torch.zeros(2, 5, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="give the mask too"):
        layer(x, x, x, is_causal=True)
    layer.num_heads = 2
    with pytest.raises(RuntimeError, match="16 channels do not fit num_heads=2, head_dim=4"):
        layer(x, x, x)
    with pytest.raises(RuntimeError, match="47 rows, of 48"):
        layer.load_state_dict({**layer.state_dict(), "in_proj_weight": torch.zeros(47, WIDTH)})


def test_a_bias_that_only_one_part_has_is_saved_and_loaded_with_zeros_for_the_others():
    layer = nn.MultiheadAttention(WIDTH, HEADS, bias=False)
    part_attention_(layer)
    layer.k_proj.bias = nn.Parameter(torch.randn(WIDTH))
    state = layer.state_dict()
    assert torch.equal(state["in_proj_bias"], torch.cat([torch.zeros(WIDTH), layer.k_proj.bias, torch.zeros(WIDTH)]))
    layer.load_state_dict(state)
    assert layer.q_proj.bias is None
