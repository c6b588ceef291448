"""Alignment: permuted copies come back exactly, wider copies merge back, and what cannot be aligned is named."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from intrafusion import align
from intrafusion.average.couplings import couplings_of
from intrafusion.groups.places import load_state_, permuted, random_orders, state_of
from tests.average.test_couplings import ATTENTION, CASES, shuffled
from tests.nets import PICO, Case, Plain, Residual, randomise_


def furthest(first: nn.Module, second: nn.Module) -> float:
    return max(
        float((a.double() - b.double()).abs().max())
        for a, b in zip(state_of(first).values(), state_of(second).values(), strict=True)
    )


@pytest.mark.parametrize("by", ["weights", "matching"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_permuted_copy_aligns_back_exactly(case, by):
    model, other, _ = shuffled(case)
    assert furthest(model, other) > 0.1
    found = align(other, model, case.example(), by=by)
    assert furthest(found.apply(other), model) == 0
    assert found.distance == 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_plans_between_permuted_copies_are_permutations(case):
    model, other, _ = shuffled(case)
    found = align(other, model, case.example(), coupling="plan")
    assert furthest(found.apply(other), model) < 1e-6
    for group in found.groups:
        assert group.coupling.sum().item() == pytest.approx(1)


def hand_permuted(model: Plain) -> Plain:
    """The oracle: written out for this network, without the table."""
    other = copy.deepcopy(model)
    p, q, r = (torch.randperm(n, generator=torch.Generator().manual_seed(n)) for n in (8, 6, 10))
    with torch.no_grad():
        other.conv1.weight.copy_(model.conv1.weight[p])
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(other.bn1, name).copy_(getattr(model.bn1, name)[p])
            getattr(other.bn3, name).copy_(getattr(model.bn3, name)[r])
        other.conv2.weight.copy_(model.conv2.weight[q][:, p])
        other.conv2.bias.copy_(model.conv2.bias[q])
        other.bn2.running_mean.copy_(model.bn2.running_mean[q])
        other.bn2.running_var.copy_(model.bn2.running_var[q])
        columns = (4 * q[:, None] + torch.arange(4)).flatten()
        other.fc1.weight.copy_(model.fc1.weight[r][:, columns])
        other.fc1.bias.copy_(model.fc1.bias[r])
        other.fc2.weight.copy_(model.fc2.weight[:, r])
    return other


def test_a_copy_permuted_by_hand_aligns_back_exactly():
    model = PICO[0].model()
    other = hand_permuted(model)
    torch.testing.assert_close(other(PICO[0].example()), model(PICO[0].example()))
    for by in ("weights", "matching"):
        assert furthest(align(other, model, PICO[0].example(), by=by).apply(other), model) == 0


@pytest.mark.parametrize("case", [PICO[1], PICO[2], PICO[8], ATTENTION], ids=lambda case: case.name)
def test_activations_find_the_permutation_too(case):
    model, other, _ = shuffled(case)
    batches = [torch.randn(32, *case.shape)]
    assert furthest(align(other, model, case.example(), by="activations", batches=batches).apply(other), model) == 0


def test_matching_gets_nearer_than_one_pass_and_than_no_alignment():
    case = PICO[1]
    first = case.model()
    torch.manual_seed(7)
    second = randomise_(case.build())
    given = align(first, first, case.example()).distance
    one_pass = align(second, first, case.example(), by="weights").distance
    matched = align(second, first, case.example())
    assert given == 0
    assert matched.distance < one_pass
    assert matched.sweeps >= 1


def test_the_distance_of_one_group_is_the_least_of_all_orders():
    """Oracle: all 6! orders of a network with one hidden layer."""
    torch.manual_seed(3)
    nets = [nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).requires_grad_(False) for _ in range(2)]
    found = align(nets[1], nets[0], torch.randn(2, 4))
    (a, b), (c, d) = ([net[0], net[2]] for net in nets)
    least = min(
        float((a.weight - c.weight[list(o)]).square().sum() + (a.bias - c.bias[list(o)]).square().sum())
        + float((b.weight - d.weight[:, list(o)]).square().sum())
        for o in itertools.permutations(range(6))
    ) + float((b.bias - d.bias).square().sum())
    assert found.distance * sum(float(p.square().sum()) for p in nets[0].parameters()) == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_aligned_network_computes_what_it_did_before(case):
    first = case.model()
    torch.manual_seed(11)
    second = randomise_(case.build())
    x = case.example()
    torch.testing.assert_close(align(second, first, x).apply(second)(x), second(x), rtol=1e-4, atol=1e-5)


def widened(model: Plain) -> Plain:
    """Every channel of conv1 twice, read half each: the same function, twice as wide."""
    wide = Plain(width=16)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for key in [k for k in state if k.startswith(("conv1", "bn1")) and state[k].dim()]:
        state[key] = state[key].repeat(2, *[1] * (state[key].dim() - 1))
    state["conv2.weight"] = state["conv2.weight"].repeat(1, 2, 1, 1) / 2
    wide.load_state_dict(state)
    return wide.eval()


@pytest.mark.parametrize("by", ["weights", "matching", "activations"])
def test_duplicated_channels_merge_back_into_the_narrower_network(by):
    model = PICO[0].model()
    wide = widened(model)
    x = PICO[0].example()
    torch.testing.assert_close(wide(x), model(x))
    groups = couplings_of(wide, x).groups
    orders = random_orders(groups, torch.Generator().manual_seed(4))
    load_state_(wide, permuted(state_of(wide), groups, orders))
    found = align(wide, model, x, by=by, batches=[torch.randn(64, 3, 8, 8)] if by == "activations" else None)
    narrow = found.apply(wide)
    assert narrow.conv1.weight.shape == model.conv1.weight.shape
    torch.testing.assert_close(narrow(x), model(x), rtol=1e-4, atol=1e-5)
    assert found["conv1"].plan is not None
    torch.testing.assert_close(found["conv1"].coupling.sum(dim=1), torch.full((16,), 1 / 16, dtype=torch.float64))
    torch.testing.assert_close(found["conv1"].coupling.sum(dim=0), torch.full((8,), 1 / 8, dtype=torch.float64))


def test_a_pruned_network_and_its_parent_meet_at_the_narrower_width():
    import torch_pruning as tp

    case = PICO[2]
    dense = case.model()
    narrow = copy.deepcopy(dense)
    importance = tp.importance.MagnitudeImportance(p=1)
    tp.pruner.BasePruner(narrow, (case.example(),), importance, pruning_ratio=0.5, ignored_layers=[narrow.fc]).step()
    merged = align(dense, narrow, case.example()).apply(dense)
    assert {k: v.shape for k, v in merged.state_dict().items()} == {k: v.shape for k, v in narrow.state_dict().items()}
    assert narrow.a.weight.shape != dense.a.weight.shape
    assert torch.isfinite(merged(case.example())).all()


def test_alignment_touches_neither_network_and_keeps_modes_and_frozen_parameters():
    case = PICO[0]
    model, other, _ = shuffled(case)
    other.train()
    other.conv1.weight.requires_grad_(False)
    before = [copy.deepcopy(net.state_dict()) for net in (model, other)]
    aligned = align(other, model, case.example()).apply(other)
    for net, old in zip((model, other), before, strict=True):
        assert all(torch.equal(tensor, old[key]) for key, tensor in net.state_dict().items())
    assert aligned.training
    assert aligned is not other
    assert not aligned.conv1.weight.requires_grad
    assert aligned.conv2.weight.requires_grad


def test_the_same_seed_gives_the_same_alignment():
    first, second = PICO[1].model(), randomise_(Residual())
    orders = [align(second, first, PICO[1].example(), seed=3)["stem"].order for _ in range(2)]
    assert torch.equal(*orders)


class TestErrors:
    x = PICO[0].example()

    def test_other_architecture(self):
        with pytest.raises(ValueError, match=r"different architectures: only the reference has 'a\.bias'"):
            align(PICO[0].model(), PICO[1].model(), self.x)

    def test_reference_wider_than_the_model(self):
        with pytest.raises(ValueError, match="group 'conv1' is narrower in the model"):
            align(PICO[0].model(), randomise_(Plain(16)), self.x)

    def test_other_outputs(self):
        other = PICO[0].model()
        other.fc2 = nn.Linear(10, 7)
        with pytest.raises(ValueError, match=r"'fc2.weight' is \(7, 10\) in the model, \(4, 10\) in the reference"):
            align(other, PICO[0].model(), self.x)

    def test_nan(self):
        bad = PICO[0].model()
        bad.conv2.bias.data[1] = torch.nan
        with pytest.raises(ValueError, match=r"'conv2\.bias' of the model holds NaN"):
            align(bad, PICO[0].model(), self.x)

    def test_settings(self):
        model = PICO[0].model()
        with pytest.raises(ValueError, match="by is 'weight': choose one of 'weights'"):
            align(model, model, self.x, by="weight")
        with pytest.raises(ValueError, match="coupling is 'soft'"):
            align(model, model, self.x, coupling="soft")
        with pytest.raises(TypeError, match=r"the model must be an nn\.Module, not Tensor"):
            align(torch.zeros(3), model, self.x)

    def test_apply_to_another_network(self):
        model = PICO[0].model()
        with pytest.raises(ValueError, match="align it first"):
            align(model, model, self.x).apply(PICO[1].model())


REAL = ("resnet18", "alexnet", "mobilenet_v2", "densenet121", "convnext_tiny", "vit_b with four blocks")


def real_case(name: str) -> Case:
    torchvision = pytest.importorskip("torchvision")
    if name.startswith("vit"):
        return Case(name, lambda: torchvision.models.VisionTransformer(32, 16, 4, 12, 768, 3072), (3, 32, 32))
    size = 64 if name == "alexnet" else 32
    return Case(name, lambda: torchvision.models.get_model(name, num_classes=10), (3, size, size))


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_permuted_copies_of_real_networks_align_back_exactly(name):
    model, other, _ = shuffled(real_case(name))
    found = align(other, model, real_case(name).example())
    assert furthest(found.apply(other), model) <= 1e-6
    assert list(found.unaligned.values()) == ["these are the network's outputs: their order is the caller's"]


def test_what_is_aligned_in_a_vision_transformer():
    """The stream, the channels inside the heads, the hidden layer of every MLP; with all their tensors."""
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.VisionTransformer(32, 16, 2, 2, 8, 16, num_classes=3)
    groups = couplings_of(model, torch.randn(1, 3, 32, 32))
    layers = [f"encoder.layers.encoder_layer_{i}" for i in range(2)]
    names = [
        "conv_proj",
        *(f"{layer}.{part}" for layer in layers for part in ("self_attention.heads", "mlp.0")),
        "heads.head",
    ]
    assert [group.name for group in groups.groups] == names
    assert {
        "class_token",
        "encoder.pos_embedding",
        "conv_proj.weight",
        "encoder.ln.weight",
        "heads.head.weight",
    } <= set(groups["conv_proj"].tensors)
    places = {(p.key, p.axis) for group in groups.groups for p in group.places}
    for layer in layers:
        attention = f"{layer}.self_attention"
        assert {(f"{attention}.in_proj_weight", axis) for axis in (0, 1)} <= places
        assert {(f"{attention}.out_proj.weight", axis) for axis in (0, 1)} <= places
