from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch_pruning as tp
from torch import nn

from intrafusion import Fusion
from intrafusion.lab.data.sources import digits
from intrafusion.lab.errors import LabError
from intrafusion.lab.models import build_model
from intrafusion.lab.pruning import (
    IMPORTANCES,
    OutputChanged,
    OverrideError,
    coupled_layers,
    group_roots,
    ignored_layers,
    own_ratios,
    prune,
)
from intrafusion.lab.recipe.sections import PruneSection
from intrafusion.lab.weights import digest
from intrafusion.models import CifarResNet18, DigitsCNN

SETTINGS = PruneSection(ratios=(0.5,), ignored=("classifier",))
EXAMPLE = torch.zeros(1, 1, 8, 8)
PAPER = Fusion.preset("paper")


def make_model() -> DigitsCNN:
    torch.manual_seed(0)
    model = DigitsCNN(widths=(8, 12, 12)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


@pytest.fixture
def model() -> DigitsCNN:
    return make_model()


def test_discarding_is_plain_torch_pruning(model: nn.Module) -> None:
    pruned = prune(model, EXAMPLE, SETTINGS, Fusion.preset("discard"), 0.5, data=digits())
    plain = make_model()
    importance = tp.importance.GroupMagnitudeImportance(p=1)
    tp.pruner.BasePruner(plain, (EXAMPLE,), importance, ignored_layers=[plain.classifier]).step()
    assert digest(pruned.model) == digest(plain)


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("global_pruning", [False, True])
def test_every_importance_keeps_the_same_channels_fused_and_discarded(
    model: nn.Module, importance: str, global_pruning: bool
) -> None:
    settings = replace(SETTINGS, importance=importance, global_pruning=global_pruning, images=50)
    fusion = Fusion(merge="paper")
    before = digest(model)
    data = digits()
    fused = prune(model, EXAMPLE, settings, fusion, 0.5, data=data)
    twin = prune(model, EXAMPLE, settings, fusion.discarded(), 0.5, data=data)
    assert fused.kept == twin.kept
    assert digest(fused.model) != digest(twin.model)
    assert digest(model) == before
    assert all(parameter.grad is None for parameter in [*model.parameters(), *fused.model.parameters()])
    again = prune(model, EXAMPLE, settings, fusion, 0.5, data=data)
    assert digest(again.model) == digest(fused.model)


def test_random_importance_follows_its_seed_and_leaves_the_global_state_alone(model: nn.Module) -> None:
    settings = replace(SETTINGS, importance="random")
    kept = {prune(model, EXAMPLE, replace(settings, seed=s), PAPER, 0.5, data=digits()).kept for s in (1, 1, 2)}
    assert len(kept) == 2
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    prune(model, EXAMPLE, settings, PAPER, 0.5, data=digits())
    assert torch.equal(torch.rand(2), expected)


def test_one_group_alone_leaves_the_others_whole(model: nn.Module) -> None:
    assert group_roots(model, EXAMPLE, SETTINGS) == ["features.0", "features.3", "features.7"]
    pruned = prune(model, EXAMPLE, SETTINGS, PAPER, 0.5, data=digits(), only="features.3")
    assert channels(pruned.model) == [8, 6, 12]
    assert [group.name for group in pruned.groups if group.channels_after < group.channels_before] == ["features.3"]
    with pytest.raises(LabError, match=r"no group starts at 'features\.1'; groups: features\.0, features\.3"):
        prune(model, EXAMPLE, SETTINGS, PAPER, 0.5, data=digits(), only="features.1")


def test_resnet20_has_nine_groups_inside_its_blocks() -> None:
    settings = PruneSection(ratios=(0.5,), ignored=("conv1", "layer*.conv2", "linear"))
    roots = group_roots(build_model("cifar_resnet20"), torch.zeros(1, 3, 32, 32), settings)
    assert roots == [f"layer{i}.{j}.conv1" for i in (1, 2, 3) for j in range(3)]


def test_round_to(model: nn.Module) -> None:
    pruned = prune(model, EXAMPLE, replace(SETTINGS, round_to=4), PAPER, 0.5, data=digits())
    assert {n % 4 for n in channels(pruned.model)} == {0}


def test_ratio_zero_changes_nothing(model: nn.Module) -> None:
    assert digest(prune(model, EXAMPLE, SETTINGS, PAPER, 0.0, data=digits()).model) == digest(model)


def test_patterns(model: nn.Module) -> None:
    assert ignored_layers(model, ["features.?", "classifier"])[-1] is model.get_submodule("classifier")
    assert ignored_layers(model, []) == []
    with pytest.raises(LabError, match=r"'fc' matches no layer; closest: features\.\d, features\.\d, features\.\d"):
        ignored_layers(model, ["fc"])


def test_a_pruned_output_is_an_error(model: nn.Module) -> None:
    with pytest.raises(OutputChanged, match="from 10 to 5 values; its last layer must be left alone"):
        prune(model, EXAMPLE, replace(SETTINGS, ignored=()), PAPER, 0.5, data=digits())


@pytest.mark.parametrize(
    "changes",
    [
        {"iterative_steps": 3},
        {"iterative_steps": 2, "importance": "taylor"},
        {"iterative_steps": 2, "global_pruning": True},
        {"global_pruning": True, "isomorphic": True},
        {"overrides": {"features.3": 0.25}},
        {"overrides": {"features.3": 0.25}, "global_pruning": True},
    ],
    ids=str,
)
def test_twins_keep_the_same_channels(model: nn.Module, changes: dict) -> None:
    settings, data = replace(SETTINGS, images=50, **changes), digits()
    fused, twin = (prune(model, EXAMPLE, settings, PAPER, 0.5, data=data, discard=d) for d in (False, True))
    assert fused.kept == twin.kept
    shapes = [[tuple(p.shape) for p in pruned.model.parameters()] for pruned in (fused, twin)]
    assert shapes[0] == shapes[1]
    assert digest(fused.model) != digest(twin.model)


def test_steps_reach_the_ratio(model: nn.Module) -> None:
    pruned = prune(model, EXAMPLE, replace(SETTINGS, iterative_steps=2), PAPER, 0.5, data=digits())
    assert channels(pruned.model) == [4, 6, 6]
    assert [(g.name, g.channels_before, g.channels_after) for g in pruned.groups if g.name == "features.0"] == [
        ("features.0", 8, 6), ("features.0", 6, 4),
    ]  # fmt: skip


@pytest.mark.parametrize("global_pruning", [False, True])
def test_an_override_is_the_ratio_of_its_group(model: nn.Module, global_pruning: bool) -> None:
    settings = replace(SETTINGS, overrides={"*.3": 0.25, "features.0": 0.0}, global_pruning=global_pruning)
    assert own_ratios(model, EXAMPLE, settings) == {"features.3": 0.25, "features.0": 0.0}
    assert channels(prune(model, EXAMPLE, settings, PAPER, 0.5, data=digits()).model) == [8, 9, 6]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"classifier": 0.2}, r"'classifier' matches no pruned layer; closest: features\.7, "),
        ({"features.1": 0.2}, r"'features\.1' matches no pruned layer"),
        ({"features.0": 0.2, "features.*": 0.3}, r"the group of features\.0 has the ratio 0\.2 already"),
    ],
)
def test_overrides_that_do_not_fit(model: nn.Module, overrides: dict, message: str) -> None:
    with pytest.raises(OverrideError, match=message):
        own_ratios(model, EXAMPLE, replace(SETTINGS, overrides=overrides))


def test_coupled_layers_are_named() -> None:
    settings = PruneSection(ratios=(0.5,), ignored=("fc",))
    groups = coupled_layers(build_model("torchvision:resnet18"), torch.zeros(1, 3, 32, 32), settings)
    stem = groups[0]
    assert stem.name == "conv1"
    assert set(stem.producers) == {"conv1", "layer1.0.conv2", "layer1.1.conv2"}
    assert set(stem.readers) == {"layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.downsample.0"}


def channels(model: nn.Module) -> list[int]:
    return [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]


def test_a_network_that_torch_pruning_breaks_is_an_error() -> None:
    settings = PruneSection(ratios=(0.5,), ignored=("linear",))  # zero-padded shortcuts
    model = build_model("cifar_resnet20").eval()
    said = r"the pruned network cannot be run \(.*shapes.*\): torch-pruning does not"
    with pytest.warns(UserWarning, match="does not run with its new widths"), pytest.raises(OutputChanged, match=said):
        prune(model, torch.zeros(1, 3, 32, 32), settings, Fusion.preset("discard"), 0.5, data=digits())


@pytest.mark.parametrize("preset", ["data-free", "paper"])
def test_every_group_of_the_cifar_resnet18_is_fused(preset: str) -> None:
    torch.manual_seed(0)
    model = CifarResNet18(width=4).eval()
    settings = PruneSection(ratios=(0.5,), ignored=("linear",))
    pruned = prune(model, torch.zeros(1, 3, 8, 8), settings, Fusion.preset(preset), 0.5, data=digits())
    assert len(pruned.groups) == 12
    assert "selection" not in {group.merged for group in pruned.groups}
    for layer in ("conv1", "layer1.1.conv2", "layer2.0.shortcut.0", "layer4.1.conv1"):
        before, after = (network.get_submodule(layer).weight.shape[0] for network in (model, pruned.model))
        assert after == before // 2
    output = pruned.model(torch.randn(2, 3, 8, 8))
    assert output.shape == (2, 10)
    assert bool(torch.isfinite(output).all())


@pytest.mark.filterwarnings("ignore:Unwrapped parameters")
@pytest.mark.parametrize("fusion", ["discard", "data-free", "calibrated"])
def test_kinds_of_width_of_a_transformer(fusion: str) -> None:
    vision = pytest.importorskip("timm.models.vision_transformer", reason="pip install 'intrafusion[timm]'")
    torch.manual_seed(0)
    dense = vision.VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, embed_dim=16, depth=2, num_heads=4, mlp_ratio=2, num_classes=10
    ).eval()
    settings = PruneSection(ratios=(0.5,), widths=("feed_forward", "head_dim", "stream"), images=60)
    data = digits()
    fused = prune(dense, EXAMPLE, settings, Fusion.preset(fusion), 0.5, data=data)
    twin = prune(dense, EXAMPLE, settings, Fusion.preset(fusion), 0.5, data=data, discard=True)
    assert fused.kept == twin.kept
    for model in (fused.model, twin.model):
        block = model.get_submodule("blocks.1")
        assert (block.attn.qkv.out_features, block.attn.qkv.in_features, block.mlp.fc1.out_features) == (24, 8, 16)
        assert (block.attn.num_heads, block.attn.head_dim) == (4, 2)
        assert model(EXAMPLE).shape == (1, 10)
    assert (digest(fused.model) == digest(twin.model)) == (fusion == "discard")
