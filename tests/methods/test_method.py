"""A method of one's own: what it is told, what it may change, what is refused; and nothing heavy outlives a step."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from intrafusion import (
    Fusion,
    FusionError,
    IntraFusionPruner,
    Method,
    Pair,
    Plan,
    merge_rule,
    method,
)
from intrafusion.groups.table import GroupTable
from intrafusion.methods import METHODS
from intrafusion.ot import selection_pair
from tests.methods.common import Summed, batches, build, dense, error, same, stepped, summed

HERE = __name__


class NoMethod:
    """A class, but none of a method."""


# --- a rule


def test_a_rule_is_what_it_returns():
    merge_rule("summed")(summed)
    pruner = build(Fusion(merge="summed"))
    pruner.step()
    assert same(pruner.model, stepped(Fusion(merge="paper")))
    assert {group.merged for group in pruner.report.groups} == {"summed"}


@pytest.mark.parametrize("name", ["summed", "Summed"])
def test_what_is_named_by_its_module_needs_no_registration(name):
    assert same(stepped(Fusion(merge=f"{HERE}:{name}")), stepped(Fusion(merge="paper")))


def test_a_corrected_preset_starts_from_a_rule_of_ones_own():
    asked: list[int] = []

    @merge_rule("asked")
    def rule(plan: Plan) -> Pair:
        asked.append(len(plan.kept))
        return summed(plan)

    model = stepped(Fusion(merge="asked", correct="data-free"))
    assert asked == [8, 3, 5]
    assert error(model) < 0.5 * error(stepped("discard"))


# --- a class


class Witness(Method):
    """Discards, and remembers all that it is told."""

    inputs = "calibration"

    def __init__(self) -> None:
        self.told: list[str] = []

    def begin(self, view, tables) -> None:
        self.told.append("begin " + " ".join(f"{table.name}:{table.n}" for table in tables))
        self.view = view
        self.seen = dict.fromkeys(view.order, 0)

        def count(name: str) -> Callable[[Tensor], None]:
            return lambda inputs: self.seen.__setitem__(name, self.seen[name] + len(inputs))

        view.watch({name: count(name) for name in view.order})
        self.described = {table.name: view.features(table, "filters", "readers").shape[0] for table in tables}
        self.scored = {table.name: view.importance(table) for table in tables}

    def pair(self, table: GroupTable, plan: Plan, view) -> Pair:
        self.told.append(f"pair {table.name}")
        return selection_pair(plan.kept, table.n)

    def mixed_(self, table, pair, view) -> None:
        width = len(view.model.get_submodule(table.name).weight)
        self.told.append(f"mixed {table.name}:{len(pair.kept)} of {width}")

    def end_(self, view) -> None:
        self.told.append(f"end {view.model.conv1.out_channels}")


NO_REPAIR = pytest.mark.filterwarnings("ignore::intrafusion.WorseThanCut")


def witnessed(cls: type[Witness], calibration) -> tuple[Witness, IntraFusionPruner]:
    method("witness")(cls)
    pruner = build(Fusion(merge="witness"), calibration)
    pruner.step()
    assert pruner.last_step is not None
    return pruner.last_step.method, pruner  # type: ignore[return-value]


def test_a_method_is_told_of_all_groups_first_and_then_of_one_after_the_other():
    found, pruner = witnessed(Witness, batches())
    widths = {"conv1": (16, 8), "conv2": (6, 3), "fc1": (10, 5)}
    order = [group.name for group in pruner.report.groups]
    assert sorted(order) == list(widths)
    each = [(f"pair {name}", f"mixed {name}:{widths[name][1]} of {widths[name][0]}") for name in order]
    begin = "begin " + " ".join(f"{name}:{widths[name][0]}" for name in order)
    assert found.told == [begin, *(line for lines in each for line in lines), "end 8"]


def test_a_method_sees_inputs_features_and_scores_of_every_group():
    found, _ = witnessed(Witness, batches())
    assert found.seen == {"conv1": 56, "conv2": 56, "fc1": 56, "fc2": 56}  # eight inputs judge
    assert found.described == {"conv1": 16, "conv2": 6, "fc1": 10}
    assert {name: len(score) for name, score in found.scored.items()} == found.described


class Repairing(Witness):
    """Writes a bias that says when the layer was seen."""

    def repair_(self, layer, view) -> None:
        self.told.append(f"repair {layer.name}")
        self.widths = [*getattr(self, "widths", []), (layer.layer.weight.shape[0], len(layer.rows.weights))]
        assert len(layer.sights) == len(view.batches) == 2
        for (before, now), count in zip(layer.sights, (32, 24), strict=True):  # eight inputs judge
            assert before.inputs.shape[0] == now.inputs.shape[0] == count
            assert before.output.shape[1] == layer.dense.weight.shape[0]
            assert now.output.shape[1] == layer.layer.weight.shape[0]
        layer.layer.bias = nn.Parameter(torch.full((layer.layer.weight.shape[0],), float(len(self.widths))))


class RepairingLate(Repairing):
    after_cut = True


@NO_REPAIR
def test_a_layer_is_repaired_before_its_own_group_is_cut():
    found, pruner = witnessed(Repairing, batches())
    order = [line.split(":")[0] for line in found.told if line.split()[0] in ("repair", "pair")]
    assert order == ["pair conv1", "repair conv2", "pair conv2", "repair fc1", "pair fc1", "repair fc2"]
    assert found.widths == [(6, 6), (10, 10), (4, 4)]
    assert [layer.bias[0].item() for layer in (pruner.model.conv2, pruner.model.fc1, pruner.model.fc2)] == [1, 2, 3]


@NO_REPAIR
def test_a_layer_is_repaired_after_its_own_group_has_been_cut_if_the_method_says_so():
    found, pruner = witnessed(RepairingLate, batches())
    order = [line.split(":")[0] for line in found.told if line.split()[0] in ("repair", "pair")]
    assert order == ["pair conv1", "repair conv1", "pair conv2", "repair conv2", "pair fc1", "repair fc1", "repair fc2"]
    assert found.widths == [(8, 8), (3, 3), (5, 5), (4, 4)]
    assert [layer.bias[0].item() for layer in (pruner.model.conv1, pruner.model.fc2)] == [1, 4]


def test_a_repair_on_the_inputs_of_the_user_makes_the_network_nearer_to_the_dense_one():
    @method("bias only")
    class BiasOnly(Method):
        inputs, plan = "calibration", False

        def pair(self, table, plan, view) -> Pair:
            return selection_pair(plan.kept, table.n)

        def repair_(self, layer, view) -> None:
            """The mean output of the layer (or of its batch-norm) becomes the dense one's."""
            axes = [0, 2, 3] if layer.layer.weight.dim() == 4 else [0]
            owner = layer.norm if layer.norm is not None and layer.norm.affine else layer.layer
            lost = torch.stack([(before.output - now.output).mean(axes) for before, now in layer.sights]).mean(0)
            owner.bias = nn.Parameter(owner.bias + lost)

    assert error(stepped(Fusion(merge="bias only"), batches())) < 0.8 * error(stepped("discard"))


def test_a_method_without_a_plan_is_told_the_kept_channels_and_the_report_has_no_remark():
    @method("unplanned")
    class Unplanned(Method):
        plan = False

        def pair(self, table, plan, view) -> Pair:
            assert not plan.coupling[~torch.isin(torch.arange(table.n), plan.kept)].any()
            return selection_pair(plan.kept, table.n)

    pruner = build(Fusion(merge="unplanned"))
    pruner.step()
    assert same(pruner.model, stepped("discard"))
    assert [(group.merged, group.reason) for group in pruner.report.groups] == [("unplanned", "")] * 3


# --- refusals


def test_an_unknown_method_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"Fusion.merge is 'nope'.*'paper', 'barycentre'"):
        Fusion(merge="nope")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tests.methods.nowhere:rule", "cannot be imported"),
        (f"{HERE}:nowhere", "cannot be imported"),
        (f"{HERE}:NoMethod", "neither a function from a plan to a pair nor a subclass of Method"),
        (f"{HERE}:HERE", "neither a function from a plan to a pair nor a subclass of Method"),
    ],
)
def test_what_is_no_method_is_refused_by_the_settings(name, message):
    with pytest.raises(ValueError, match=re.escape(f"method {name!r}") + ".*" + message):
        Fusion(merge=name)


@pytest.mark.parametrize("value", [NoMethod, 3])
def test_what_is_no_method_is_not_registered(value):
    with pytest.raises(TypeError, match="neither a function from a plan to a pair nor a subclass of Method"):
        method("wrong")(value)
    assert "wrong" not in METHODS


def test_inputs_that_there_are_not_are_refused():
    with pytest.raises(TypeError, match=r"Wrong\.inputs is 'images': choose one of 'none', 'synthetic', 'calibration'"):
        method("wrong")(type("Wrong", (Summed,), {"inputs": "images"}))


def test_a_name_is_given_once():
    with pytest.raises(ValueError, match="'paper' exists already"):
        merge_rule("paper")(summed)


@pytest.mark.parametrize("correct", ["data-free", "calibrated"])
@pytest.mark.parametrize("cls", [Witness, type("Repairs", (Summed,), {"repair_": lambda self, layer, view: None})])
def test_a_method_that_corrects_itself_is_no_start_of_another_correction(cls, correct):
    method("itself")(cls)
    with pytest.raises(ValueError, match=f"correct must be 'none', not '{correct}'"):
        Fusion(merge="itself", correct=correct)


def test_a_method_that_looks_at_inputs_needs_them_and_another_takes_none():
    method("witness")(Witness)
    with pytest.raises(ValueError, match="needs calibration="):
        build(Fusion(merge="witness"))
    with pytest.raises(ValueError, match="looks at none of yours"):
        build(Fusion(merge="paper"), batches())


@pytest.mark.parametrize("where", ["pair", "mixed_", "repair_", "end_"])
def test_a_method_that_fails_changes_nothing_and_says_where(where):
    def broken(self, *_):
        raise KeyError("mine")

    method("broken")(type("Broken", (Repairing,), {where: broken}))
    pruner = build(Fusion(merge="broken"), batches())
    place = "group 'conv1'" if where in ("pair", "mixed_") else "group 'conv2'" if where == "repair_" else "refitting"
    with pytest.raises(FusionError, match=f"{place}.*mine"):
        pruner.step()
    assert same(pruner.model, dense())


def test_a_method_without_a_pair_says_so():
    method("empty")(type("Empty", (Method,), {}))
    with pytest.raises(FusionError, match="Empty gives no pair: define pair"):
        build(Fusion(merge="empty")).step()
