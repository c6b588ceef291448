"""Bad input: a sentence that names the culprit, and the network as it was."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch_pruning as tp
from torch import nn

import intrafusion.prune.step
from intrafusion import FusedGroup, Fusion, FusionError, IntraFusionPruner
from intrafusion.prune.step import Step
from tests.nets import Plain, randomise_


def plain() -> nn.Module:
    torch.manual_seed(0)
    return randomise_(Plain(16))


def example() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8)


def l1():
    return tp.importance.GroupMagnitudeImportance(p=1)


def increasing(group):
    return torch.arange(len(group[0].idxs)).float()


def pruner_for(model, importance=None, **kwargs):
    return IntraFusionPruner(model, example(), importance or l1(), ignored_layers=[model.fc2], **kwargs)


def state(model: nn.Module):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return str(model), {
        name: (tensor, tensor.detach().clone(), tensor.requires_grad) for name, tensor in tensors.items()
    }


def assert_unchanged(model: nn.Module, before) -> None:
    text, tensors = before
    assert str(model) == text
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert now.keys() == tensors.keys()
    for name, (tensor, value, requires_grad) in tensors.items():
        assert now[name] is tensor, name
        assert torch.equal(now[name].nan_to_num(), value.nan_to_num()), name
        assert now[name].requires_grad == requires_grad, name


def test_nan_weights_are_named_and_nothing_is_pruned():
    model = plain()
    pruner = pruner_for(model)
    model.conv2.weight.data[1, 0] = float("nan")
    model.bn1.running_var[2] = float("inf")
    before = state(model)
    with pytest.raises(ValueError, match=r"NaN or infinite values in 'conv2.weight', 'bn1.running_var'"):
        pruner.step()
    assert_unchanged(model, before)
    assert pruner.current_step == 0


def test_a_dead_channel_is_ordinary_input():
    for merge in ("paper", "barycentre"):
        for mass in ("uniform", "importance"):
            for cost in ("l1", "l2", "cosine"):
                model = plain()
                model.conv1.weight.data[3] = 0
                model.bn1.weight.data[3] = model.bn1.bias.data[3] = 0
                model.conv2.weight.data[:, [3, 5]] = 0
                model.bn1.weight.data[7] = 0  # constant, but not zero
                fusion = Fusion(merge=merge, cost=cost, source_mass=mass, target_mass=mass)
                pruner = pruner_for(model, fusion=fusion)
                pruner.step()
                assert torch.isfinite(model(example())).all()
                assert len(pruner.report.fused) == 3


def test_a_network_of_nothing_but_dead_channels_survives():
    model = plain()
    for parameter in model.parameters():
        parameter.data.zero_()
    pruner_for(model, importance=tp.importance.RandomImportance(), fusion="paper").step()
    assert torch.equal(model(example()), torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda g: torch.full((len(g[0].idxs),), float("nan")), r"importance of channel 0 is nan"),
        (lambda g: torch.arange(len(g[0].idxs)) / 0.0, r"importance of channel 0 is nan"),
        (lambda g: torch.ones(3), r"importance has shape \(3,\), expected \((16|6|10),\)"),
        (lambda g: torch.ones(len(g[0].idxs), 2), r"importance has shape"),
        (lambda g: [1.0] * len(g[0].idxs), r"the importance is a list, not a tensor"),
    ],
)
def test_a_useless_importance_names_the_group(score, message):
    model = plain()
    pruner, before = pruner_for(model, importance=score), state(model)
    with pytest.raises(FusionError, match=rf"while scoring group '\w+' \(\d+ channels\): .*{message}"):
        pruner.step()
    assert_unchanged(model, before)


def negative(group):
    return torch.linspace(-1, 1, len(group[0].idxs))


def test_negative_importance_ranks_channels_but_cannot_be_a_mass():
    model = plain()
    pruner_for(model, importance=negative).step()
    assert model.conv1.out_channels == 8
    model = plain()
    pruner = pruner_for(model, importance=negative, fusion=Fusion(source_mass="importance"))
    before = state(model)
    with pytest.raises(
        FusionError, match=r"while fusing group 'fc1' \(10 -> 5 channels\): importance masses are negative"
    ):
        pruner.step()
    assert_unchanged(model, before)


def test_an_importance_that_returns_none_leaves_the_group_and_says_so():
    model = plain()
    pruner = pruner_for(
        model, importance=lambda group: None if group[0].dep.target.module is model.conv1 else l1()(group)
    )
    pruner.step()
    assert model.conv1.out_channels == 16
    assert model.conv2.out_channels == 3
    (note,) = [group for group in pruner.report.groups if group.name == "conv1"]
    assert (note.merged, note.reason) == ("untouched", "the metric has nothing to score here")


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan"), "0.5", True])
def test_a_ratio_outside_the_unit_interval(ratio):
    with pytest.raises(ValueError, match=r"pruning_ratio is .*: it must be in \[0, 1\)"):
        pruner_for(plain(), pruning_ratio=ratio)


def test_a_ratio_of_one_is_allowed_where_it_means_go_on_until_told_to_stop():
    model = plain()
    pruner = pruner_for(model, pruning_ratio=1.0, iterative_steps=10)
    pruner.step()
    assert model.conv1.out_channels == 14


def test_other_arguments_are_checked_too():
    model = plain()
    with pytest.raises(ValueError, match="pruning_ratio_dict is 2"):
        pruner_for(model, pruning_ratio_dict={model.conv1: 2})
    with pytest.raises(ValueError, match="isomorphic=True needs global_pruning=True"):
        pruner_for(model, isomorphic=True)
    with pytest.raises(ValueError, match="iterative_steps is 0"):
        pruner_for(model, iterative_steps=0)
    with pytest.raises(TypeError, match="importance must be callable"):
        pruner_for(model, importance="l1")
    with pytest.raises(TypeError, match="ignored_layers holds 'fc1'"):
        IntraFusionPruner(model, example(), l1(), ignored_layers=["fc1"])


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (nn.DataParallel, "wrapped in DataParallel: prune model.module"),
        (lambda model: torch.compile(model, backend="eager"), "compiled: prune model._orig_mod"),
        (lambda model: "model", "must be an nn.Module, not str"),
    ],
)
def test_wrapped_models_are_refused_with_the_way_out(wrap, message):
    with pytest.raises(TypeError, match=message):
        IntraFusionPruner(wrap(plain()), example(), l1())


def test_a_distributed_model_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(TypeError, match="wrapped in DistributedDataParallel"):
            IntraFusionPruner(nn.parallel.DistributedDataParallel(plain()), example(), l1())
    finally:
        torch.distributed.destroy_process_group()


def test_an_empty_group_does_nothing():
    model = plain()
    pruner, before = pruner_for(model), state(model)
    empty = tp.dependency.Group()
    FusedGroup.wrap(empty, Step(pruner), None).prune()
    nothing = pruner.DG.get_pruning_group(model.conv1, tp.prune_conv_out_channels, [])
    FusedGroup.wrap(nothing, Step(pruner), None).prune()
    assert_unchanged(model, before)
    pruner = pruner_for(model, pruning_ratio=0.0)
    pruner.step()
    assert_unchanged(model, before)
    assert {group.merged for group in pruner.report.groups} == {"untouched"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_fuses_in_float64_and_comes_back(dtype):
    full, half = plain(), plain().to(dtype)
    for model, x in ((full, example()), (half, example().to(dtype))):
        IntraFusionPruner(model, x, increasing, ignored_layers=[model.fc2], fusion="paper").step()
    assert all(p.dtype == dtype for p in half.parameters())
    gap = (half.conv1.weight.float() - full.conv1.weight).abs().max() / full.conv1.weight.abs().max()
    assert gap.item() < 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_network_is_corrected_as_well(dtype):
    dense = plain().to(dtype)
    x = torch.randn(64, *example().shape[1:]).to(dtype)
    gaps = []
    for fusion in ("discard", "data-free"):
        model = copy.deepcopy(dense)
        IntraFusionPruner(model, example().to(dtype), l1(), ignored_layers=[model.fc2], fusion=fusion).step()
        gaps.append((model.eval()(x) - dense.eval()(x)).float().square().mean().item())
    assert all(p.dtype == dtype for p in model.parameters())
    assert gaps[1] < 0.5 * gaps[0]


def test_a_network_that_takes_one_input_at_a_time_is_told_what_to_do_and_left_alone():
    class One(Plain):
        def forward(self, x):
            if len(x) != 1:
                raise RuntimeError("one at a time, please")
            return super().forward(x)

    model = randomise_(One()).eval()
    before = state(model)
    pruner = IntraFusionPruner(model, example()[:1], l1(), ignored_layers=[model.fc2])
    with pytest.raises(FusionError, match=r"synthetic inputs.*one at a time, please.*fusion='calibrated'"):
        pruner.step()
    assert_unchanged(model, before)
    own = [torch.randn(1, *example().shape[1:]) for _ in range(16)]
    IntraFusionPruner(
        model, example()[:1], l1(), ignored_layers=[model.fc2], fusion="calibrated", calibration=own
    ).step()
    assert model.fc2.in_features < Plain().fc2.in_features


def test_a_value_that_overflows_half_precision_is_an_error_and_changes_nothing():
    model = plain().to(torch.float16)
    model.bn1.running_var.fill_(1e-6)
    model.conv1.weight.data.fill_(6e4)
    model.bn1.weight.data.fill_(6e4)
    pruner = IntraFusionPruner(
        model,
        example().half(),
        tp.importance.RandomImportance(),
        ignored_layers=[model.fc2, model.conv2, model.fc1],
        fusion="paper",
    )
    before = state(model)
    with pytest.raises(FusionError, match=r"while fusing group 'conv1'.*would not be finite in torch.float16"):
        pruner.step()
    assert_unchanged(model, before)


def test_a_failure_in_the_last_group_puts_every_group_of_the_step_back(monkeypatch):
    model = plain()
    pruner, before = pruner_for(model), state(model)
    write, calls = intrafusion.prune.step.write_, []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("out of luck")
        return write(*args, **kwargs)

    monkeypatch.setattr(intrafusion.prune.step, "write_", failing)
    with pytest.raises(FusionError, match=r"while fusing group 'fc1' \(10 -> 5 channels\): out of luck"):
        pruner.step()
    assert_unchanged(model, before)
    assert pruner.report.groups == []
    assert pruner.pruning_history() == []
    monkeypatch.undo()
    pruner.step()  # and it can be tried again
    assert model.conv1.out_channels == 8
    assert model(example()).shape == (2, 4)


def test_a_failure_of_torch_prunings_own_cut_is_undone_too(monkeypatch):
    model = plain()
    pruner, before = pruner_for(model), state(model)

    def broken(layer, idxs):
        raise IndexError("half way through")

    groups = pruner.step(interactive=True)
    group = next(groups)
    assert len(group) > 2
    monkeypatch.setattr(group[-1].dep, "handler", broken)
    with pytest.raises(FusionError, match="while fusing group"):
        group.prune()
    assert_unchanged(model, before)


def test_unknown_settings_are_named_with_what_is_allowed():
    with pytest.raises(
        ValueError, match=r"unknown fusion preset 'papr': choose one of 'data-free', 'calibrated', 'paper'"
    ):
        pruner_for(plain(), fusion="papr")
    with pytest.raises(ValueError, match=r"Fusion.cost is 'l3': choose one of 'l1', 'l2', 'cosine'"):
        Fusion(cost="l3")
    assert Fusion(features=["readers", "filters"]) == Fusion()  # type: ignore[arg-type]
    assert Fusion(features=("biases", "filters")).features == ("filters", "biases")
    choices = "'filters', 'readers', 'biases'"
    for features, said in {
        (): f"is (): choose from {choices}",
        "filters": f"is 'filters': choose from {choices}",
        ("filter",): f"holds 'filter': choose from {choices}",
        ("filters", "filters"): f"holds 'filters' twice: choose from {choices}",
        ("biases",): "is ('biases',): channels are compared by 'filters' or 'readers' at least",
    }.items():
        with pytest.raises(ValueError, match=re.escape(f"Fusion.features {said}")):
            Fusion(features=features)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not int"):
        pruner_for(plain(), fusion=3)


def test_a_frozen_network_is_not_pruned_silently():
    model = plain().requires_grad_(False)
    with pytest.warns(UserWarning, match=r"no group that it may prune.*frozen"):
        pruner = pruner_for(model)
    pruner.step()
    assert model.conv1.out_channels == 16


def test_copies_of_a_pruned_network_are_independent():
    model = plain()
    twin = copy.deepcopy(model)
    before = state(twin)
    pruner_for(model).step()
    assert_unchanged(twin, before)
