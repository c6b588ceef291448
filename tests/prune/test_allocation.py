"""Unequal widths: where channels go, that the total stays, and that trying leaves no trace."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import nn

from intrafusion import Fusion, FusionError, IntraFusionPruner
from intrafusion.prune.allocation import least_damage
from intrafusion.prune.trials import Bench
from tests.correct.test_streams import WIDTH, ids, residual
from tests.nets import PICO, randomise_

CASE = PICO[0]


def l1():
    return tp.importance.GroupMagnitudeImportance(p=1)


def first_ones(group):
    return -torch.arange(len(group[0].idxs)).float()


def unlike() -> nn.Sequential:
    """Of 24 channels four are different; then 24 that all differ."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 20)).eval()
    with torch.no_grad():
        for parameter in (model[0].weight, model[0].bias):
            parameter[:] = parameter[torch.arange(24) % 4]
    return model


def pruner_of(model, allocation="measured-parameters", fusion="calibrated", **more):
    x = torch.randn(400, 16, generator=torch.Generator().manual_seed(1))
    more = {"pruning_ratio": 0.5, "ignored_layers": [model[4]], "importance": first_ones, **more}
    calibration = [x] if fusion == "calibrated" or more.pop("calibration", False) else None
    pruner = IntraFusionPruner(
        model, x[:2], fusion=fusion, calibration=calibration, allocation=allocation, **more
    )  # fmt: skip
    pruner.progress = False
    return pruner


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("allocation", ["measured", "measured-parameters"])
def test_channels_go_where_nothing_is_lost_and_the_total_stays(allocation):
    model, same = unlike(), unlike()
    pruner, equal = pruner_of(model, allocation), pruner_of(same, "equal")
    pruner.step()
    equal.step()
    assert same[0].out_features == same[2].out_features == 12
    assert model[0].out_features < 12 < model[2].out_features
    assert size(model) <= size(same)
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(2))
    wanted = unlike()(x)
    assert (model(x) - wanted).norm() < 0.7 * (same(x) - wanted).norm()
    told = pruner.report.allocation
    assert told.measured < told.equal
    assert "channels were moved between groups" in str(pruner.report)
    assert equal.report.allocation is None


@pytest.mark.parametrize("best", ["equal", "unequal"])
def test_whole_steps_decide_without_their_descent(monkeypatch, best):
    stepped = Bench.stepped

    def told(self, ratios):
        damage = stepped(self, ratios)
        assert self._pruner.fusion.descent == 3  # put back
        return damage if best == "unequal" else float(len(set(ratios.values())))

    monkeypatch.setattr(Bench, "stepped", told)
    monkeypatch.setattr("intrafusion.methods.refit.descend_", count := Mock())
    model = unlike()
    fusion = Fusion.preset("calibrated", descent=3)
    pruner_of(model, fusion=fusion, calibration=True).step()
    assert (model[0].out_features == model[2].out_features) == (best == "equal")
    assert count.call_count == 1


class Concatenated(nn.Module):
    """Three layers whose channels one layer reads side by side."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(6, 8), nn.Linear(8, 16), nn.Linear(8, 12), nn.Linear(36, 4)

    def forward(self, x):
        x = self.a(x).relu()
        return self.head(torch.cat([x, self.b(x).relu(), self.c(x).relu()], 1))


@pytest.mark.filterwarnings("ignore:.*than plain cutting would have")
def test_groups_that_meet_in_a_concat_are_tried_one_by_one():
    torch.manual_seed(0)
    model, x = Concatenated().eval(), torch.randn(64, 6)
    pruner = IntraFusionPruner(
        model, x[:2], l1(), pruning_ratio=0.5, ignored_layers=[model.head], fusion="calibrated", calibration=[x],
        allocation="measured",
    )  # fmt: skip
    pruner.step()
    assert set(pruner.report.allocation.ratios) == {"a", "b", "c"}
    assert model(x).shape == (64, 4)


def test_what_comes_out_is_what_those_ratios_give():
    model, again = unlike(), unlike()
    pruner = pruner_of(model)
    pruner.step()
    ratios = {again.get_submodule(name): ratio for name, ratio in pruner.report.allocation.ratios.items()}
    pruner_of(again, "equal", pruning_ratio_dict=ratios).step()
    for one, other in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    twin = unlike()
    ratios = {twin.get_submodule(name): ratio for name, ratio in pruner.report.allocation.ratios.items()}
    pruner_of(twin, "equal", fusion="discard", pruning_ratio_dict=ratios).step()
    assert [p.shape for p in twin.parameters()] == [p.shape for p in model.parameters()]


@pytest.mark.parametrize("fusion", ["calibrated", "data-free", "barycentre"])
def test_trying_leaves_no_trace(fusion):
    """All is tried when an interactive step begins, before anything is cut."""
    model = CASE.model()
    before = copy.deepcopy(model.state_dict())
    batches = [torch.randn(64, *CASE.shape)] if fusion == "calibrated" else None
    pruner = IntraFusionPruner(
        model, CASE.example(), l1(), pruning_ratio=0.5, ignored_layers=CASE.ignored(model), fusion=fusion,
        calibration=batches, allocation="measured", iterative_steps=2,
    )  # fmt: skip
    groups = pruner.step(interactive=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert pruner.report.allocation is not None
    assert not pruner.report.groups
    assert not pruner.report.comparisons
    assert pruner.inputs is None
    assert pruner.pruning_history() == []
    assert pruner.iterative_steps == 2
    assert len(pruner.per_step_pruning_ratio) == 3
    for group in groups:
        group.prune()
    assert torch.isfinite(model(CASE.example())).all()


def test_several_steps_come_to_the_ratios_of_the_first():
    model = unlike()
    pruner = pruner_of(model, iterative_steps=2)
    pruner.step()
    ratios = dict(pruner.report.allocation.ratios)
    pruner.step()
    assert ratios == pruner.report.allocation.ratios
    for name, ratio in ratios.items():
        assert model.get_submodule(name).out_features == pytest.approx(24 * (1 - ratio), abs=1)


def test_groups_are_scored_once_for_all_tries_and_once_for_the_step():
    model, asked = unlike(), []

    def metric(group):
        asked.append(group[0].dep.target.module)
        return first_ones(group)

    pruner = pruner_of(model, importance=metric)
    pruner.step()
    assert pruner.report.allocation is not None
    assert sorted(map(asked.count, (model[0], model[2]))) == [2, 2]


@pytest.mark.parametrize(("count", "held"), [(8, 2), (100, 25)])
def test_what_judges_the_tries_is_not_fitted_to(count, held):
    """Nor where a step has too few inputs to hold any out."""
    model, x = unlike(), torch.randn(count, 16, generator=torch.Generator().manual_seed(1))
    pruner = IntraFusionPruner(
        model, x[:2], first_ones, pruning_ratio=0.5, ignored_layers=[model[4]], fusion="calibrated", calibration=[x],
        allocation="measured",
    )  # fmt: skip
    bench = Bench(pruner, lambda: None, lambda _: 0.0)
    given = [
        torch.cat([batch[0] for batch in batches]) for batches in (bench.inputs.own, bench.inputs.judges[0].batches)
    ]
    assert [len(some) for some in given] == [count - held, held]
    assert not (given[0][:, None] == given[1][None]).all(dim=2).any()
    assert bench.told == f"{held} calibration inputs that were held out"


def test_one_group_keeps_its_ratio():
    model = unlike()
    pruner = pruner_of(model, ignored_layers=[model[2], model[4]])
    pruner.step()
    assert model[0].out_features == 12
    assert pruner.report.allocation is None


def test_a_group_with_a_ratio_of_its_own_begins_there():
    model = unlike()
    pruner = pruner_of(model, pruning_ratio_dict={model[0]: 0.75, model[2]: 0.0})
    pruner.step()
    assert model[0].out_features == 6
    assert model[2].out_features == 24


def test_feed_forward_widths_of_a_language_model_are_moved_by_what_it_expects_next_and_its_stream_is_not():
    model = residual(nn.RMSNorm)
    with torch.no_grad():
        model.scores.weight *= 5
        for parameter in model.up[1].parameters():  # 4 of 16 units are different
            parameter[:] = parameter[torch.arange(16) % 4]
    widths = {"feed_forward": 0.5, "stream": 0.25}
    pruner = IntraFusionPruner(
        model, ids(1), l1(), widths=widths, fusion="calibrated", calibration=[ids()], allocation="measured-parameters",
        ignored_layers=[model.scores],
    )  # fmt: skip
    pruner.step()
    told = pruner.report.allocation
    assert set(told.ratios) == {"up.0", "up.1"}
    assert told.measure == "divergence of the next token"
    assert 0 <= told.measured < told.equal
    assert model.up[0].out_features > 8 > model.up[1].out_features >= 4
    assert model.last.weight.shape == (WIDTH * 3 // 4,)


def test_costs_that_cannot_be_counted_are_an_error_with_the_way_out_and_nothing_has_changed(monkeypatch):
    def fails(*_):
        raise KeyError("conv9d")

    model = randomise_(unlike())
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(tp.utils, "count_ops_and_params", fails)
    with pytest.raises(FusionError, match="'measured-parameters' counts parameters"):
        pruner_of(model, "measured").step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"allocation": "best"}, "allocation is 'best': it must be one of 'equal', 'measured'"),
        ({"fusion": "discard"}, "fusion='discard' fuses nothing.*pruning_ratio_dict"),
        ({"global_pruning": True}, "so does global_pruning=True"),
    ],
)
def test_what_means_nothing_is_refused(more, said):
    with pytest.raises(ValueError, match=said):
        pruner_of(unlike(), **more)


@pytest.mark.parametrize("seed", range(5))
def test_the_least_damage_is_that_of_all_choices(seed):
    generator = np.random.default_rng(seed)
    curves = {name: SimpleNamespace(ratios=np.arange(4) / 4) for name in "abcd"}
    for curve in curves.values():
        curve.damage = np.cumsum(generator.integers(0, 9, 4)).astype(float)
        curve.saved = np.cumsum([0, *generator.integers(1, 9, 3)]).astype(float)
    for asked in (4.0, 8.0, 10.0, 20.0):
        choices = [
            (sum(c.damage[i] for c, i in zip(curves.values(), one, strict=True)), one)
            for one in itertools.product(range(4), repeat=4)
            if sum(c.saved[i] for c, i in zip(curves.values(), one, strict=True)) >= asked
        ]
        if not choices:
            continue
        found = least_damage(curves, asked)
        at = [int(4 * found[name]) for name in curves]
        assert sum(c.saved[i] for c, i in zip(curves.values(), at, strict=True)) >= asked
        assert sum(c.damage[i] for c, i in zip(curves.values(), at, strict=True)) == min(choices)[0]
