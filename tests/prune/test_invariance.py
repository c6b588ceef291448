"""What must not change: a permutation, a selection, a merge of duplicates."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch_pruning as tp
from torch import nn

from intrafusion import Fusion, IntraFusionPruner
from intrafusion.groups.apply import apply_pair
from intrafusion.groups.features import channel_features
from intrafusion.groups.table import tabulate
from intrafusion.ot import Pair, transport_plan
from intrafusion.ot.merge import barycentre
from tests.nets import PICO, Case, randomise_

BARYCENTRE = Fusion(merge="barycentre")


def torchvision_case(name: str) -> Case:
    torchvision = pytest.importorskip("torchvision")
    last = {"resnet18": "fc", "resnext50_32x4d": "fc", "mobilenet_v2": "classifier.1", "DenseNet": "classifier"}[name]

    def make() -> nn.Module:
        if name == "DenseNet":  # of 121 layers it has three times as many blocks of a kind
            return torchvision.models.DenseNet(16, (3, 4, 3, 2), 32, num_classes=10)
        return torchvision.models.get_model(name, num_classes=10)

    return Case(name, make, (3, 64, 64), last)


REAL = ["resnet18", "mobilenet_v2", "DenseNet", "resnext50_32x4d"]


def build(case: Case, **kwargs) -> tuple[nn.Module, IntraFusionPruner]:
    model = case.model()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
        pruner = IntraFusionPruner(
            model,
            case.example(),
            tp.importance.GroupMagnitudeImportance(p=1),
            ignored_layers=case.ignored(model),
            **kwargs,
        )
    return model, pruner


def tables(pruner):
    for group in pruner.DG.get_all_groups(pruner.ignored_layers, pruner.root_module_types):
        root = group[0].dep
        yield tabulate(pruner.DG, root.target.module, root.handler, pruner._get_channel_groups(group))


def class_permutation(classes: torch.Tensor) -> torch.Tensor:
    """A random permutation that stays inside the coupling classes."""
    order = torch.arange(len(classes))
    for label in classes.unique():
        members = (classes == label).nonzero().flatten()
        order[members] = members[torch.randperm(len(members))]
    return order


def relative_error(after: torch.Tensor, before: torch.Tensor) -> float:
    return ((after - before).abs().max() / before.abs().max()).item()


def check_permutation(case: Case) -> int:
    model, pruner = build(case)
    before, moved = model(case.example()), 0
    for table in tables(pruner):
        assert not table.unsupported, table.unsupported
        order = class_permutation(table.classes)
        matrix = torch.eye(table.n, dtype=torch.float64)[order]
        with torch.no_grad():
            apply_pair(table, Pair(matrix, matrix.T.clone(), torch.arange(table.n)))
        moved += int((order != torch.arange(table.n)).sum())
    assert relative_error(model(case.example()), before) < 2e-5
    return moved


@pytest.mark.parametrize("case", PICO, ids=lambda case: case.name)
def test_a_permutation_of_every_group_leaves_the_function_unchanged(case):
    assert check_permutation(case) > 4


@pytest.mark.parametrize("name", REAL)
def test_a_permutation_of_every_group_of_a_real_network_leaves_the_function_unchanged(name):
    assert check_permutation(torchvision_case(name)) > 100


def check_selection(case: Case, **kwargs) -> None:
    """With a selection plan, tensors, gradients and attributes are torch-pruning's, bit for bit."""
    theirs, ours = case.model(), case.model()
    dense = sum(parameter.numel() for parameter in theirs.parameters())
    for model in (theirs, ours):
        model(case.example()).square().mean().backward()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
        for model, make, extra in (
            (theirs, tp.pruner.BasePruner, {}),
            (ours, IntraFusionPruner, {"fusion": "discard"}),
        ):
            metric = tp.importance.GroupMagnitudeImportance(p=1)
            example = (case.example(),)
            pruner = make(model, example, metric, ignored_layers=case.ignored(model), **kwargs, **extra)
            pruner.step()
    assert sum(parameter.numel() for parameter in theirs.parameters()) < dense
    want, have = dict(theirs.named_parameters()), dict(ours.named_parameters())
    assert want.keys() == have.keys()
    for name in want:
        assert torch.equal(want[name], have[name]), name
        assert (want[name].grad is None) == (have[name].grad is None), name
        assert want[name].grad is None or torch.equal(want[name].grad, have[name].grad), name
    for name, buffer in theirs.named_buffers():
        assert torch.equal(buffer, ours.get_buffer(name)), name
    assert str(theirs) == str(ours)
    assert torch.equal(theirs(case.example()), ours(case.example()))


@pytest.mark.parametrize(
    "kwargs", [{"pruning_ratio": 0.5}, {"pruning_ratio": 0.4, "global_pruning": True}], ids=["local", "global"]
)
@pytest.mark.parametrize("case", PICO, ids=lambda case: case.name)
def test_a_selection_is_torch_pruning_bit_for_bit(case, kwargs):
    check_selection(case, **kwargs)


@pytest.mark.parametrize("name", REAL)
def test_a_selection_on_a_real_network_is_torch_pruning_bit_for_bit(name):
    check_selection(torchvision_case(name), pruning_ratio=0.5)


def duplicate_channels_(pruner) -> None:
    """Make every second channel of every group a copy of the one before it, class by class."""
    for table in tables(pruner):
        source = torch.arange(table.n)
        for label in table.classes.unique():
            members = (table.classes == label).nonzero().flatten()
            source[members[1::2]] = members[: len(members) // 2 * 2 : 2]
        rows = torch.eye(table.n, dtype=torch.float64)[source]
        with torch.no_grad():  # copied rows; columns as they are: the copies are read on their own
            apply_pair(table, Pair(rows, torch.eye(table.n, dtype=torch.float64), torch.arange(table.n)))


DUPLICABLE = [case for case in PICO if case.name not in ("transposed", "grouped")]


@pytest.mark.parametrize("case", DUPLICABLE, ids=lambda case: case.name)
def test_exact_duplicates_merge_without_a_change_of_the_output(case):
    model, pruner = build(case, pruning_ratio=0.5, fusion=Fusion(merge="barycentre", features=("filters", "biases")))
    duplicate_channels_(pruner)
    before = model(case.example())
    pruner.importance = keep_even_channels
    pruner.step()
    assert pruner.report.fused
    assert not pruner.report.fallbacks
    assert relative_error(model(case.example()), before) < 2e-5


def keep_even_channels(group) -> torch.Tensor:
    n = len(group[0].idxs)
    return 1.0 + (torch.arange(n) % 2 == 0).float()


def test_discarding_duplicates_does_change_the_output():
    case = PICO[0]
    model, pruner = build(case, pruning_ratio=0.5, fusion="discard")
    duplicate_channels_(pruner)
    before = model(case.example())
    pruner.importance = keep_even_channels
    pruner.step()
    assert relative_error(model(case.example()), before) > 0.05


def test_the_gradient_of_merged_duplicates_is_the_gradient_of_the_merged_network():
    case = PICO[0]
    model, pruner = build(case, pruning_ratio=0.5, fusion=Fusion(merge="barycentre", features=("filters", "biases")))
    duplicate_channels_(pruner)
    pruner.importance = keep_even_channels
    model(case.example()).square().sum().backward()
    pruner.step()
    carried = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(case.example()).square().sum().backward()
    for name, parameter in model.named_parameters():
        scale = parameter.grad.abs().max() + 1e-3
        assert ((carried[name] - parameter.grad).abs().max() / scale).item() < 1e-3, name


def test_keeping_every_channel_changes_nothing():
    for case in PICO:
        model, pruner = build(case)
        before = copy.deepcopy(model.state_dict())
        for table in tables(pruner):
            plan = transport_plan(channel_features(pruner.DG, table), torch.arange(table.n), classes=table.classes)
            apply_pair(table, barycentre(plan))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), case.name


def test_the_result_does_not_depend_on_the_order_of_channels():
    case = PICO[0]
    outputs = []
    for shuffle in (False, True):
        model, pruner = build(case, pruning_ratio=0.5, fusion="paper")
        if shuffle:
            for table in tables(pruner):
                matrix = torch.eye(table.n, dtype=torch.float64)[class_permutation(table.classes)]
                with torch.no_grad():
                    apply_pair(table, Pair(matrix, matrix.T.clone(), torch.arange(table.n)))
        pruner.step()
        outputs.append(model(case.example()))
    assert relative_error(outputs[1], outputs[0]) < 1e-5


def test_float64_and_float32_agree():
    case = PICO[1]
    outputs = []
    for dtype in (torch.float32, torch.float64):
        model = case.model().to(dtype)
        example = case.example().to(dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
            IntraFusionPruner(
                model,
                example,
                tp.importance.GroupMagnitudeImportance(p=1),
                ignored_layers=case.ignored(model),
                fusion="paper",
            ).step()
        outputs.append(model(example).double())
    assert relative_error(outputs[0], outputs[1]) < 1e-4


def test_randomise_touches_every_norm():
    model = randomise_(PICO[0].build())
    assert (model.bn1.weight < 0).any()
    assert model.bn1.running_mean.abs().sum() > 0
