"""What metrics measure on inputs: all layers in one pass, again only where the network has changed."""

from __future__ import annotations

import copy

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from intrafusion import ReconstructionImportance
from intrafusion.groups import readings
from tests.nets import PICO, Plain, randomise_
from tests.prune.test_importance import MEASURED, METRICS, group_of

pytestmark = pytest.mark.filterwarnings("ignore:Unwrapped parameters", "ignore:.*could only be cut")


class Calls:
    """Counts the forward passes of a network."""

    def __init__(self, model: nn.Module) -> None:
        self.number = 0
        model.register_forward_pre_hook(self)

    def __call__(self, *_) -> None:
        self.number += 1


def scored(metric, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    graph = tp.DependencyGraph().build_dependency(model, (x,), verbose=False)
    found = {graph._module2name[group[0].dep.target.module]: metric(group) for group in graph.get_all_groups()}
    return {name: score for name, score in found.items() if score is not None}


@pytest.mark.parametrize("metric", MEASURED)
@pytest.mark.parametrize("case", PICO, ids=lambda case: case.name)
def test_all_groups_of_a_network_need_one_pass_and_are_scored_as_each_by_itself(case, metric):
    model, x = case.model().eval(), case.example()
    together = METRICS[metric](x)
    graph = tp.DependencyGraph().build_dependency(model, (x,), verbose=False)
    calls = Calls(model)
    scores = [(group, together(group)) for group in graph.get_all_groups()]
    batches = len(together._inputs._batches)
    assert calls.number == batches
    for group, score in scores:
        alone = METRICS[metric](x)
        readings_of = alone._inputs._readings
        readings_of._asked = 1  # as after a change: this group's layers only
        got = alone(group)
        assert (got is None) == (score is None)
        if score is not None:
            torch.testing.assert_close(got, score, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("metric", MEASURED)
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.conv1.weight.data.mul_(-1),  # no version tells
        lambda model: model.bn1.running_mean.add_(1),
        lambda model: model.conv1.weight.data.copy_(model.conv1.weight.data.flip(0).clone()),
        lambda model: setattr(model, "conv1", copy.deepcopy(model.conv1).requires_grad_(False)),
    ],
    ids=["weight", "buffer", "order", "module"],
)
def test_what_was_measured_on_another_network_is_not_used(metric, change):
    model, x = randomise_(Plain()), torch.randn(16, 3, 8, 8)
    kept = METRICS[metric](x)
    scored(kept, model, x)
    with torch.no_grad():
        change(model)
    fresh, again = scored(METRICS[metric](x), model, x), scored(kept, model, x)
    for name, score in fresh.items():
        torch.testing.assert_close(again[name], score, atol=1e-12, rtol=0)


@pytest.mark.parametrize("metric", MEASURED)
def test_every_step_of_an_iterative_pruning_measures_once(metric):
    model, x = randomise_(Plain()), torch.randn(16, 3, 8, 8)
    calls, kind = Calls(model), METRICS[metric](x)
    pruner = tp.pruner.BasePruner(
        model, (x,), kind, pruning_ratio=0.6, iterative_steps=3, ignored_layers=[model.fc2]
    )  # fmt: skip
    number, batches = calls.number, len(kind._inputs._batches)
    for step in range(3):
        pruner.step()
        assert calls.number == number + (step + 1) * batches


def test_where_each_group_is_scored_on_a_network_of_its_own_its_layers_alone_are_measured():
    model, x = randomise_(Plain()), torch.randn(16, 3, 8, 8)
    metric, held = ReconstructionImportance([x]), []
    groups = [group_of(model, layer, x[:1]) for layer in (model.conv1, model.conv2, model.fc1)]
    for group, changed in zip([*groups, *groups], [False, False, True, True, True, False], strict=True):
        if changed:
            model.bn1.running_mean.add_(0.1)
        metric(group)
        held.append(len(metric._inputs._readings._held))
    assert held == [4, 4, 4, 1, 1, 4]  # two groups were scored on one network, then each on its own, then two again


@pytest.mark.parametrize("metric", MEASURED)
def test_wide_layers_and_many_of_them_are_measured_as_all_others(metric, monkeypatch):
    model, x = randomise_(Plain()), torch.randn(16, 3, 8, 8)
    expected = scored(METRICS[metric](x), model, x)
    for name, value in (("WIDEST", 7), ("MOST_VALUES", 40), ("_AT_ONCE", 50)):
        monkeypatch.setattr(readings, name, value)
        for name, score in scored(METRICS[metric](x), model, x).items():
            torch.testing.assert_close(score, expected[name], atol=1e-10, rtol=0)
