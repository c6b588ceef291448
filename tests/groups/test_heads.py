"""Attention blocks are found, verified, and shown to torch-pruning channel by channel."""

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

from intrafusion import IntraFusionPruner
from intrafusion.groups.heads import blocks_of, find_heads, heads_by_layer, opaque


def l1():
    return tp.importance.GroupMagnitudeImportance(p=1)


class Block(nn.Module):
    """Attention with shared keys, rotary positions or a bias for each head, as wanted."""

    def __init__(self, heads=4, shared=1, dim=4, width=12, rotary=False, slopes=False):
        super().__init__()
        self.num_heads, self.head_dim, self.num_key_value_groups = heads, dim, shared
        self.rotary = rotary
        self.slopes = nn.Parameter(torch.randn(heads, 1, 1)) if slopes else None
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(width, size) for size in (heads * dim, heads * dim // shared, heads * dim // shared)
        )
        self.o_proj = nn.Linear(heads * dim, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in self.layers())
        if self.rotary:
            q, k = _turned(q), _turned(k)
        k, v = (one.repeat_interleave(self.num_key_value_groups, dim=1) for one in (k, v))
        logits = q @ k.mT / 2
        if self.slopes is not None:
            logits = logits + self.slopes * torch.arange(logits.shape[-1])
        return self.o_proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))

    def layers(self):
        return self.q_proj, self.k_proj, self.v_proj


def _turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] * 0.9 ** torch.arange(half)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


class Network(nn.Module):
    def __init__(self, width=12, blocks=2, block=Block, **options):
        super().__init__()
        self.inputs = nn.Linear(5, width)
        self.blocks = nn.ModuleList(block(width=width, **options) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.up, self.down = nn.Linear(width, 20), nn.Linear(20, width)
        self.scores = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return self.scores((x + self.down(F.gelu(self.up(x)))).mean(dim=1))


def network(**options) -> Network:
    torch.manual_seed(0)
    return Network(**options).eval()


def found(model: nn.Module):
    x = torch.randn(2, 6, 5)
    return find_heads(model, lambda m: [m(x)])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (True, True)),
        ({"shared": 2}, (True, True)),
        ({"rotary": True}, (True, False)),
        ({"shared": 4, "rotary": True}, (True, False)),
        ({"slopes": True}, (False, True)),
    ],
)
def test_blocks_are_found_with_what_of_them_can_change_places(options, expected):
    model = network(**options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    blocks = found(model)
    assert [block.name for block in blocks] == ["blocks.0", "blocks.1"]
    assert all((block.heads, block.dim) == (4, 4) for block in blocks)
    assert all(block.key_heads == 4 // options.get("shared", 1) for block in blocks)
    assert all((block.heads_move, block.dims_move) == expected for block in blocks)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_packed_projections_are_found():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
    x = torch.randn(1, 3, 32, 32)
    blocks = find_heads(model, lambda m: [m(x)])
    assert [(block.name, block.is_packed, block.heads) for block in blocks] == [
        ("blocks.0.attn", True, 3),
        ("blocks.1.attn", True, 3),
    ]
    assert all(block.heads_move and block.dims_move for block in blocks)


def test_what_the_user_says_of_heads_is_kept():
    model = network()
    blocks = blocks_of(model)
    assert set(heads_by_layer(blocks, {blocks[0].queries: 2})) == set(blocks[1].projections)
    given = {blocks[0].queries: 2, blocks[0].keys: 2, blocks[0].values: 2}
    pruner = IntraFusionPruner(model, torch.randn(1, 6, 5), l1(), num_heads=given, fusion="discard")
    assert pruner.num_heads is given
    assert given[blocks[0].queries] == 2
    assert given[blocks[1].queries] == 4


@pytest.mark.parametrize("shared", [1, 2])
def test_torch_pruning_sees_channels_that_go_together_behind_rotary_positions(shared):
    model = network(rotary=True, shared=shared)
    with opaque(blocks_of(model)):
        graph = tp.DependencyGraph().build_dependency(model, (torch.randn(1, 6, 5),))
    block = model.blocks[0]
    group = graph.get_pruning_group(block.o_proj, tp.prune_linear_in_channels, [0, 1, 2, 3])
    cut = {item.dep.target.module: sorted(item.idxs) for item in group if isinstance(item.dep.target.module, nn.Linear)}
    assert set(cut) == {block.o_proj, *block.layers()}
    assert cut[block.q_proj] == [0, 1, 2, 3]
    assert not block.o_proj._forward_pre_hooks
    assert not block.q_proj._forward_hooks


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
def test_channels_inside_of_heads_with_rotary_positions_are_left_or_refused():
    x = torch.randn(1, 6, 5)
    model = network(rotary=True)
    pruner = IntraFusionPruner(
        model, x, l1(), pruning_ratio=0.5, ignored_layers=[model.scores, model.inputs], fusion="discard"
    )
    pruner.step()
    assert all(block.q_proj.out_features == 16 for block in model.blocks)
    with pytest.raises(ValueError, match=r"head_dim.*blocks\.0.*rotary"):
        IntraFusionPruner(network(rotary=True), x, l1(), widths={"head_dim": 0.5})
    with pytest.raises(ValueError, match=r"heads.*blocks\.0.*slopes"):
        IntraFusionPruner(network(slopes=True), x, l1(), widths={"heads": 0.5})


def test_the_history_of_a_network_with_shared_keys_can_be_cut_again():
    x = torch.randn(1, 6, 5)
    model = network(shared=2)
    pruner = IntraFusionPruner(model, x, l1(), widths={"heads": 0.5, "feed_forward": 0.5}, fusion="discard")
    pruner.step()
    again = IntraFusionPruner(network(shared=2), x, l1(), fusion="discard")
    again.cut_again(pruner.pruning_history())
    for name, value in model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def _with_circuits_of_rank(model: Network, rank: int) -> Network:
    """Queries, keys and values of every head in a space of that many dimensions, in a basis of its own."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for block in model.blocks:
            for layer in block.layers():
                weight = layer.weight.unflatten(0, (-1, 4))
                basis = torch.randn(len(weight), 4, rank, generator=generator)
                layer.weight.copy_((basis @ weight[:, :rank]).flatten(0, 1))
                layer.bias.copy_((basis @ layer.bias.unflatten(0, (-1, 4))[:, :rank, None]).flatten())
    return model


@pytest.mark.parametrize("fusion", ["calibrated", "data-free"])
@pytest.mark.parametrize("shared", [1, 2])
def test_channels_inside_of_heads_that_are_not_needed_leave_without_a_trace(fusion, shared):
    model = _with_circuits_of_rank(network(shared=shared), 2)
    x = torch.randn(96, 6, 5)
    before = model(x)
    pruner = IntraFusionPruner(
        model, x[:1], l1(), widths={"head_dim": 0.5}, fusion=fusion, calibration=[x] if fusion == "calibrated" else None
    )
    pruner.step()
    assert [block.head_dim for block in model.blocks] == [2, 2]
    assert (model(x) - before).norm() < 1e-3 * before.norm()
    assert [group.merged for group in pruner.report.groups] == [fusion, fusion]


class Packed(Network):
    """The same with one layer for all three, and torch's own attention, which divides by the root of the width."""

    def __init__(self):
        super().__init__(blocks=0)
        self.attn = _PackedBlock()

    def forward(self, x: Tensor) -> Tensor:
        return self.scores((self.inputs(x) + self.attn(self.inputs(x))).mean(dim=1))


class _PackedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads, self.head_dim, self.table = 3, 4, None
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v, self.table).transpose(1, 2).flatten(2))


class _TableBlock(_PackedBlock):
    """Relative positions, of each head its own, so small that they are not seen in an output yet (Swin)."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(1e-6 * torch.randn(1, 3, 6, 6))


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
def test_heads_with_tables_of_their_own_stay_and_the_channels_inside_go():
    torch.manual_seed(0)
    model = Packed().eval()
    model.attn = _TableBlock()
    x = torch.randn(96, 6, 5)
    before = model(x)
    (block,) = found(model)
    assert (block.heads_move, block.dims_move, block.scaled) == (False, True, True)
    with pytest.raises(ValueError, match="told apart by something else"):
        IntraFusionPruner(model, x[:1], l1(), widths={"heads": 0.3})
    pruner = IntraFusionPruner(
        model, x[:1], l1(), widths={"head_dim": 0.25}, fusion="calibrated", calibration=[x], unwrapped_parameters=[]
    )
    pruner.step()
    assert (model.attn.num_heads, model.attn.head_dim, model.attn.qkv.out_features) == (3, 3, 27)
    assert model.attn.table.shape == (1, 3, 6, 6)
    assert (model(x) - before).norm() < 0.2 * before.norm()


@pytest.mark.parametrize("widths", [{"head_dim": 0.5}, {"head_dim": 0.5, "heads": 0.3}])
def test_a_packed_layer_and_the_scale_of_the_logits_follow(widths):
    torch.manual_seed(0)
    model = Packed().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (model.attn.qkv.weight, model.attn.qkv.bias[:, None]):
            parts = tensor.unflatten(0, (9, 4))
            parts.copy_(torch.randn(9, 4, 2, generator=generator) @ torch.randn(9, 2, 4, generator=generator) @ parts)
        if "heads" in widths:  # a head that nobody reads
            model.attn.proj.weight[:, 4:8] = 0
    basis = torch.randn(9, 4, 2, generator=generator)
    with torch.no_grad():
        whole = torch.cat([model.attn.qkv.weight, model.attn.qkv.bias[:, None]], dim=1).unflatten(0, (9, 4))
        whole = (basis @ whole[:, :2]).flatten(0, 1)
        model.attn.qkv.weight.copy_(whole[:, :-1])
        model.attn.qkv.bias.copy_(whole[:, -1])
    x = torch.randn(96, 6, 5)
    before = model(x)
    pruner = IntraFusionPruner(
        model,
        x[:1],
        lambda group: model.attn.proj.weight.norm(dim=0),
        widths=widths,
        fusion="calibrated",
        calibration=[x],
    )
    pruner.step()
    assert (model.attn.num_heads, model.attn.head_dim) == (2 if "heads" in widths else 3, 2)
    assert (model(x) - before).norm() < 1e-3 * before.norm()


@pytest.mark.parametrize("fusion", ["calibrated", "data-free"])
def test_reducing_heads_is_better_than_leaving_channels_out(fusion):
    errors = {}
    x = torch.randn(200, 6, 5)
    for one in ("discard", fusion):
        model = network()
        before = model(x)
        given = [x[:100]] if one == "calibrated" else None
        IntraFusionPruner(model, x[:1], l1(), widths={"head_dim": 0.5}, fusion=one, calibration=given).step()
        errors[one] = (model(x[100:]) - before[100:]).norm().item()
    assert errors[fusion] < 0.5 * errors["discard"]


@pytest.mark.parametrize("shared", [1, 2])
def test_several_steps_lose_heads_and_the_channels_inside_of_them(shared):
    model = _with_circuits_of_rank(network(shared=shared, heads=8), 1)
    with torch.no_grad():  # every other head is not read
        for block in model.blocks:
            block.o_proj.weight.unflatten(1, (8, 4))[:, 1::2] = 0
    x = torch.randn(96, 6, 5)
    before = model(x)

    def metric(group):
        block = next(b for b in model.blocks if any(item.dep.target.module is b.o_proj for item in group))
        dim = block.head_dim
        norms = block.o_proj.weight.detach().unflatten(1, (-1, dim)).norm(dim=(0, 2))
        return norms.repeat_interleave(dim)

    widths = {"heads": 0.5, "head_dim": 0.75}
    pruner = IntraFusionPruner(
        model, x[:1], metric, widths=widths, iterative_steps=2, fusion="calibrated", calibration=[x]
    )
    pruner.step()
    pruner.step()
    assert [(block.head_dim, block.o_proj.in_features) for block in model.blocks] == [(1, 4), (1, 4)]
    assert (model(x) - before).norm() < 1e-3 * before.norm()
