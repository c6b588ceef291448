"""The table of couplings: what moves together, in every kind of layer, and what is left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from intrafusion.average.couplings import couplings_of
from intrafusion.groups.places import load_state_, permuted, random_orders, state_of
from intrafusion.models import CifarResNet
from tests.nets import PICO, Case, randomise_


class Attention(nn.Module):
    """A pre-norm transformer block with nn.MultiheadAttention, a class token and positions."""

    def __init__(self, heads=2, bias_kv=True):
        super().__init__()
        self.embed, self.token = nn.Linear(5, 8), nn.Parameter(torch.randn(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 4, 8))
        self.norm1, self.attention = (
            nn.LayerNorm(8),
            nn.MultiheadAttention(8, heads, batch_first=True, add_bias_kv=bias_kv),
        )
        self.norm2, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        y = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], dim=1) + self.position
        z = self.norm1(y)
        y = y + self.attention(z, z, z, need_weights=False)[0]
        return self.head((y + self.down(F.gelu(self.up(self.norm2(y)))))[:, 0])


class Split(nn.Module):
    """Readers of different parts, called in the order that torch-pruning gets wrong."""

    def __init__(self):
        super().__init__()
        self.a, self.left, self.right = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(4, 5, 1)
        self.fc = nn.Linear(5, 4)

    def forward(self, x):
        left, right = torch.split(self.a(x), 4, dim=1)
        return self.fc((2 * self.left(F.relu(left)) + self.right(F.relu(right))).mean((2, 3)))


class Packed(nn.Module):
    """Attention as timm writes it: one linear layer for queries, keys and values."""

    def __init__(self, named=True):
        super().__init__()
        self.embed, self.qkv, self.proj, self.head = (nn.Linear(*s) for s in ((5, 8), (8, 24), (8, 8), (8, 4)))
        self.heads = 2
        if named:
            self.num_heads = 2

    def forward(self, x):
        y = self.embed(x)
        batch, tokens, width = y.shape
        q, k, v = (
            self.qkv(y).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        )
        z = (q @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.head((y + self.proj(z.transpose(1, 2).reshape(batch, tokens, width))).mean(1))


ATTENTION = Case("attention", Attention, (3, 5), "head")
PADDED = Case("padded", lambda: CifarResNet(8), (3, 8, 8), "linear")
CASES = [*PICO, ATTENTION, PADDED]


def shuffled(case: Case, seed: int = 5) -> tuple[nn.Module, nn.Module, int]:
    """A network, a copy with its channels in a random order, and how many groups moved."""
    model = case.model()
    groups = couplings_of(model, case.example()).groups
    orders = random_orders(groups, torch.Generator().manual_seed(seed))
    other = copy.deepcopy(model)
    load_state_(other, permuted(state_of(model), groups, orders))
    return model, other, len(orders)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_permutation_leaves_the_function_unchanged_and_moves_every_hidden_group(case):
    model, other, moved = shuffled(case)
    x = case.example()
    assert moved == len(couplings_of(model, x).groups) - 1  # all but the outputs
    assert not torch.equal(next(iter(model.parameters())), next(iter(other.parameters())))
    torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-5)


def test_the_outputs_stay_where_they_are():
    case = PICO[0]
    groups = couplings_of(case.model(), case.example()).groups
    assert {g.name: g.reason for g in groups if g.reason} == {
        "fc2": "these are the network's outputs: their order is the caller's"
    }


def test_every_axis_of_every_hidden_tensor_is_in_the_table():
    model, x = ATTENTION.model(), ATTENTION.example()
    places = {(p.key, p.axis) for g in couplings_of(model, x).groups for p in g.places}
    inputs_and_singletons = {("embed.weight", 1), ("token", 0), ("token", 1), ("position", 0), ("position", 1)}
    inputs_and_singletons |= {(f"attention.bias_{n}", axis) for n in "kv" for axis in (0, 1)}
    every = {(key, axis) for key, tensor in state_of(model).items() for axis in range(tensor.dim())}
    assert every - places == inputs_and_singletons


def test_heads_change_places_as_wholes_and_keep_their_channels():
    model = ATTENTION.model()
    heads = couplings_of(model, ATTENTION.example())["attention.heads"]
    assert heads.blocks.tolist() == [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]
    for order in (random_orders([heads], torch.Generator().manual_seed(s))["attention.heads"] for s in range(5)):
        sources = order[heads.blocks[0]] % 8 // 4
        assert len(sources.unique()) == 1  # one head, of queries, keys and values alike


def test_packed_queries_keys_and_values_move_within_and_with_their_heads():
    case = Case("packed", Packed, (3, 5), "head")
    model, other, _ = shuffled(case)
    packed = couplings_of(model, case.example())["qkv"]
    assert packed.blocks.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert next(p for p in packed.places if p.key == "qkv.weight").local[1].tolist() == [1, 9, 17]
    assert not torch.equal(model.qkv.weight, other.qkv.weight)
    torch.testing.assert_close(other(case.example()), model(case.example()))


def test_heads_that_nobody_names_are_left_alone():
    case = Case("packed", lambda: Packed(named=False), (3, 5), "head")
    assert "changes the network's output" in couplings_of(case.model(), case.example())["qkv"].reason


def test_zero_padded_shortcuts_shift_the_channels():
    model = PADDED.model()
    groups = couplings_of(model, PADDED.example())
    stem = groups["conv1"]
    assert stem.n == 16
    local = {(p.key, p.axis): p.local.flatten().tolist() for p in stem.places}
    assert local["conv1.weight", 0] == list(range(16))
    assert local["layer2.0.conv2.weight", 0] == list(range(8, 24))
    assert local["linear.weight", 1] == list(range(24, 40))


def test_a_group_that_the_graph_describes_wrongly_is_left_alone_with_a_reason():
    torch.manual_seed(0)
    model, x = Split(), torch.randn(2, 3, 4, 4)
    groups = couplings_of(model, x).groups
    wrong = [g for g in groups if g.name.startswith("a") and g.reason]
    assert wrong
    assert all("changes the network's output" in g.reason for g in wrong)


def test_tracing_touches_nothing():
    model = PICO[1].model().train()
    model.stem.weight.requires_grad_(False)
    before = {key: tensor.clone() for key, tensor in state_of(model).items()}
    couplings_of(model, PICO[1].example())
    assert model.training
    assert model.bna.training
    assert not model.stem.weight.requires_grad
    assert all(torch.equal(tensor, before[key]) for key, tensor in state_of(model).items())


def test_a_network_that_does_not_run_says_so():
    with pytest.raises(ValueError, match="cannot be traced on the example inputs"):
        couplings_of(randomise_(PICO[0].build()), torch.randn(2, 4, 8, 8))
