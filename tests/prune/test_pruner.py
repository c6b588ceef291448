"""Drop-in: constructor, stepping, attributes and side effects are torch-pruning's."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
import torch_pruning as tp
from torch import nn

import intrafusion
from intrafusion import (
    FusedGroup,
    Fusion,
    IntraFusionBNScalePruner,
    IntraFusionGroupNormPruner,
    IntraFusionGrowingRegPruner,
    IntraFusionPruner,
)
from tests.nets import PICO, Mlp, Plain, Residual, randomise_

SIBLINGS = [
    (IntraFusionPruner, tp.pruner.BasePruner),
    (IntraFusionPruner, tp.pruner.MetaPruner),
    (IntraFusionPruner, tp.pruner.MagnitudePruner),
    (IntraFusionBNScalePruner, tp.pruner.BNScalePruner),
    (IntraFusionGroupNormPruner, tp.pruner.GroupNormPruner),
    (IntraFusionGrowingRegPruner, tp.pruner.GrowingRegPruner),
]


def plain() -> nn.Module:
    torch.manual_seed(0)
    return randomise_(Plain(16))


def example() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def l1():
    return tp.importance.GroupMagnitudeImportance(p=1)


def quietly(make, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
        return make(*args, **kwargs)


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize(("ours", "theirs"), SIBLINGS)
def test_the_signature_is_theirs_and_then_ours_by_keyword_only(ours, theirs):
    want = list(inspect.signature(theirs).parameters.values())
    have = list(inspect.signature(ours).parameters.values())
    assert [p.name for p in have[:-6]] == [p.name for p in want]
    assert [p.name for p in have[-6:]] == ["fusion", "calibration", "memory_limit", "after_cut", "widths", "allocation"]
    assert {p.kind for p in have[-6:]} == {inspect.Parameter.KEYWORD_ONLY}


def test_positional_arguments_mean_what_they_mean_there():
    theirs, ours = plain(), plain()
    arguments = (True, 0.4, None, 1.0, 1)
    tp.pruner.BasePruner(theirs, (example(),), l1(), *arguments, ignored_layers=[theirs.fc2]).step()
    IntraFusionPruner(ours, example(), l1(), *arguments, ignored_layers=[ours.fc2], fusion="discard").step()
    assert same(theirs, ours)


CONFIGURATIONS = {
    "local": {},
    "global": {"global_pruning": True},
    "isomorphic": {"global_pruning": True, "isomorphic": True},
    "iterative": {"iterative_steps": 3},
    "round_to": {"round_to": 4},
    "max_ratio": {"max_pruning_ratio": 0.3, "iterative_steps": 2},
    "ratio_dict": {"pruning_ratio_dict": lambda m: {m.conv1: 0.25, m.fc1: 0.7}},
    "scope": {"global_pruning": True, "pruning_ratio_dict": lambda m: {(m.conv1, m.conv2): 0.25}},
    "out_groups": {"out_channel_groups": lambda m: {m.conv1: 2}},
    "in_groups": {"in_channel_groups": lambda m: {m.conv2: 4}},
    "roots": {"root_module_types": [nn.Conv2d]},
}


def arguments_for(name: str, model: nn.Module) -> dict:
    return {k: v(model) if callable(v) else v for k, v in CONFIGURATIONS[name].items()}


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize(("ours", "theirs"), SIBLINGS[2:])
def test_every_configuration_discards_exactly_as_torch_pruning(ours, theirs, name):
    models = plain(), plain()
    for model, make, extra in zip(models, (theirs, ours), ({}, {"fusion": "discard"}), strict=True):
        options = arguments_for(name, model)
        pruner = make(model, (example(),), l1(), pruning_ratio=0.5, ignored_layers=[model.fc2], **options, **extra)
        for _ in range(options.get("iterative_steps", 1)):
            pruner.step()
    assert str(models[0]) == str(models[1])
    assert str(models[0]) != str(plain())
    assert same(*models)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_configuration_fuses_to_the_widths_of_torch_pruning(name):
    theirs, ours = plain(), plain()
    for model, make in ((theirs, tp.pruner.BasePruner), (ours, IntraFusionPruner)):
        options = arguments_for(name, model)
        pruner = make(model, (example(),), l1(), pruning_ratio=0.5, ignored_layers=[model.fc2], **options)
        for _ in range(options.get("iterative_steps", 1)):
            pruner.step()
    assert [p.numel() for p in ours.parameters()][-1] == [p.numel() for p in theirs.parameters()][-1]
    assert pruner.report.fused
    assert torch.isfinite(ours(example())).all()


def test_interactive_steps_do_nothing_until_prune_is_called():
    model = plain()
    before = copy.deepcopy(model)
    pruner = IntraFusionPruner(model, example(), l1(), ignored_layers=[model.fc2])
    groups = 0
    for group in pruner.step(interactive=True):
        assert isinstance(group, FusedGroup)
        assert isinstance(group, tp.dependency.Group)
        groups += 1
    assert groups == 3
    assert same(model, before)


def test_interactive_pruning_is_pruning():
    automatic, by_hand = plain(), plain()
    IntraFusionPruner(automatic, example(), l1(), ignored_layers=[automatic.fc2]).step()
    for group in IntraFusionPruner(by_hand, example(), l1(), ignored_layers=[by_hand.fc2]).step(interactive=True):
        group.prune()
    assert same(automatic, by_hand)


def test_exec_and_call_of_a_group_fuse_too():
    models = [plain() for _ in range(3)]
    for model, act in zip(models, ("prune", "exec", "__call__"), strict=True):
        for group in IntraFusionPruner(model, example(), l1(), ignored_layers=[model.fc2]).step(interactive=True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                getattr(group, act)()
    assert same(models[0], models[1])
    assert same(models[0], models[2])


def test_a_group_can_be_pruned_at_other_channels_and_is_recorded_once():
    model = plain()
    pruner = IntraFusionPruner(model, example(), l1(), ignored_layers=[model.fc2])
    next(iter(pruner.step(interactive=True))).prune(idxs=[0, 3])
    assert len(pruner.pruning_history()) == 1
    assert pruner.pruning_history()[0][2] == [0, 3]


def test_history_and_state_dict_rebuild_the_fused_network():
    model = plain()
    pruner = IntraFusionPruner(model, example(), l1(), ignored_layers=[model.fc2])
    pruner.step()
    again = plain()
    rebuilt = IntraFusionPruner(again, example(), l1(), ignored_layers=[again.fc2])
    rebuilt.load_pruning_history(pruner.pruning_history())
    again.load_state_dict(model.state_dict())
    assert torch.equal(model(example()), again(example()))


def test_iterative_steps_fuse_every_time_and_then_stop_with_a_warning():
    model = plain()
    pruner = IntraFusionPruner(model, example(), l1(), iterative_steps=2, ignored_layers=[model.fc2])
    pruner.step()
    assert model.conv1.out_channels == 12
    pruner.step()
    assert model.conv1.out_channels == 8
    assert {group.step for group in pruner.report.fused} == {1, 2}
    with pytest.warns(UserWarning, match="exceed the maximum iterative steps"):
        pruner.step()


def test_defaults_are_not_shared_between_pruners():
    first, second = (IntraFusionPruner(m, example(), l1(), ignored_layers=[m.fc2]) for m in (plain(), plain()))
    assert first.in_channel_groups is not second.in_channel_groups
    assert first.num_heads is not second.num_heads


def test_the_users_num_heads_is_the_one_that_torch_pruning_updates():
    heads: dict = {}
    model = plain()
    assert IntraFusionPruner(model, example(), l1(), num_heads=heads, ignored_layers=[model.fc2]).num_heads is heads


def test_modes_and_frozen_parameters_survive():
    model = plain().train()
    model.bn1.eval()
    model.conv1.weight.requires_grad_(False)
    pruner = IntraFusionPruner(model, example(), l1(), ignored_layers=[model.fc2])
    pruner.step()
    assert model.training
    assert not model.bn1.training
    assert not model.conv1.weight.requires_grad
    assert model.conv2.weight.requires_grad


def test_layer_types_can_be_ignored():
    model = plain()
    IntraFusionPruner(model, example(), l1(), ignored_layers=[nn.Linear]).step()
    assert model.fc1.out_features == 10
    assert model.conv1.out_channels == 8


def test_ignored_parameters_and_unwrapped_parameters():
    model = randomise_(Residual())
    unwrapped = [(model.scale, 1)]
    IntraFusionPruner(
        model, torch.randn(2, 3, 6, 6), l1(), ignored_layers=[model.fc], unwrapped_parameters=unwrapped
    ).step()
    assert model.scale.shape == (1, 4, 1, 1)
    assert unwrapped[0][0] is not model.scale
    assert len(unwrapped) == 1


def test_manual_prune_width_reads_a_float_as_torch_pruning_does():
    model = plain()
    pruner = IntraFusionPruner(model, example(), l1(), ignored_layers=[model.fc2])
    with pytest.warns(UserWarning, match="fraction of channels that stays"):
        pruner.manual_prune_width(model.conv1, tp.prune_conv_out_channels, 0.25)
    assert model.conv1.weight.shape[0] == model.conv1.out_channels == 4
    pruner.manual_prune_width(model.conv2, tp.prune_conv_out_channels, [1, 2])
    assert model.conv2.weight.shape[:2] == (4, 4)
    assert model(example()).shape == (2, 4)


def test_regularizers_of_the_siblings_still_work():
    for make in (IntraFusionBNScalePruner, IntraFusionGroupNormPruner, IntraFusionGrowingRegPruner):
        model = plain().train()
        model.bn2 = nn.BatchNorm2d(6)  # torch-pruning's regularizer cannot pass over one without a weight
        metric = tp.importance.BNScaleImportance() if make is IntraFusionBNScalePruner else l1()
        pruner = make(model, example(), metric, ignored_layers=[model.fc2])
        model(example()).sum().backward()
        pruner.update_regularizer()
        before = model.conv1.weight.grad.clone(), model.bn1.weight.grad.clone()
        pruner.regularize(model)
        assert not (torch.equal(before[0], model.conv1.weight.grad) and torch.equal(before[1], model.bn1.weight.grad))
        pruner.step()
        assert pruner.report.fused


def test_bn_scale_sees_the_users_network_even_in_the_paper_preset():
    models = plain(), plain()
    tp.pruner.BasePruner(
        models[0], (example(),), tp.importance.BNScaleImportance(), ignored_layers=[models[0].fc2]
    ).step()
    pruner = IntraFusionPruner(models[1], example(), tp.importance.BNScaleImportance(), ignored_layers=[models[1].fc2])
    pruner.step()
    assert [p[2] for p in pruner.pruning_history()]
    assert models[0].conv1.out_channels == models[1].conv1.out_channels


def test_the_paper_preset_scores_the_folded_network():
    """Kept channels = GroupMagnitudeImportance(p=1) of torch-pruning on a network whose batch-norms are folded away."""
    model = plain()
    model.bn2 = nn.Identity()
    by_hand = copy.deepcopy(model)
    for conv, bn in ((by_hand.conv1, by_hand.bn1), (by_hand.fc1, by_hand.bn3)):
        scale = bn.weight / (bn.running_var + bn.eps).sqrt()
        conv.weight.data *= scale.reshape(-1, *[1] * (conv.weight.dim() - 1))
        shift = bn.bias - scale * bn.running_mean
        conv.bias = nn.Parameter(shift.data if conv.bias is None else (scale * conv.bias + shift).data)
    by_hand.bn1 = by_hand.bn3 = nn.Identity()
    folded = tp.pruner.BasePruner(by_hand, (example(),), l1(), ignored_layers=[by_hand.fc2])
    folded.step()
    fusion = Fusion(score_on="folded")
    pruner = IntraFusionPruner(model, example(), l1(), ignored_layers=[model.fc2], fusion=fusion)
    pruner.step()
    assert [entry[2] for entry in pruner.pruning_history()] == [entry[2] for entry in folded.pruning_history()]


def test_scoring_leaves_every_tensor_the_very_one_it_was():
    model = plain()
    before = {name: (p, p.data_ptr()) for name, p in model.named_parameters()}
    pruner = IntraFusionPruner(model, example(), l1(), ignored_layers=[model.fc2], fusion="paper")
    list(pruner.step(interactive=True))
    after = dict(model.named_parameters())
    assert all(after[name] is p and after[name].data_ptr() == pointer for name, (p, pointer) in before.items())
    assert model.bn1.affine
    assert model.conv1.bias is None


def test_taylor_is_the_same_on_the_folded_network():
    """|w dL/dw| does not change when a batch-norm is folded into w."""
    scores = []
    for fusion in (Fusion(score_on="model"), Fusion(score_on="folded")):
        model = plain()
        model(example()).square().sum().backward()
        metric = tp.importance.GroupTaylorImportance()
        pruner = IntraFusionPruner(model, example(), metric, ignored_layers=[model.fc2], fusion=fusion)
        groups = list(pruner.step(interactive=True))
        scores.append([pruner.score_of(pruner.table(group)) for group in groups])
    assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(*scores, strict=True))


def test_the_report_says_what_happened_to_every_group():
    model = plain()
    pruner = IntraFusionPruner(
        model, example(), l1(), pruning_ratio_dict={model.conv1: 0.0}, ignored_layers=[model.fc2]
    )
    assert str(pruner.report) == "nothing pruned yet"
    pruner.step()
    table = str(pruner.report)
    by_name = {group.name: group for group in pruner.report.groups}
    assert by_name["conv1"].merged == "untouched"
    assert (by_name["conv2"].channels_before, by_name["conv2"].channels_after) == (6, 3)
    assert by_name["fc1"].cost > 0
    assert all(name in table for name in ("conv1", "conv2", "fc1", "6 -> 3", "data-free"))


def test_one_network_with_a_dictionary_input_and_forward_fn():
    class Net(Mlp):
        def forward(self, tokens):
            return super().forward(tokens)

    for kwargs in ({}, {"forward_fn": lambda model, batch: model(batch["tokens"])}):
        model = Net()
        pruner = quietly(
            IntraFusionPruner, model, {"tokens": torch.randn(2, 5, 6)}, l1(), ignored_layers=[model.head], **kwargs
        )
        pruner.step()
        assert model(torch.randn(2, 5, 6)).shape == (2, 4)


def test_the_example_keeps_its_batch_axis():
    seen = []
    model = plain()
    model.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    IntraFusionPruner(model, example()[:1], l1(), ignored_layers=[model.fc2])
    assert {tuple(shape) for shape in seen} == {(1, 3, 8, 8)}


def test_public_names():
    assert set(intrafusion.__all__) <= set(dir(intrafusion))
    assert len(intrafusion.__all__) <= 40  # few enough to be read at once
    assert {case.name for case in PICO} >= {"residual", "depthwise", "grouped", "reused"}
