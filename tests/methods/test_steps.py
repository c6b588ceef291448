"""What a step is and leaves behind: nothing heavy; subclasses of pruners; groups pruned by hand."""

from __future__ import annotations

import gc
import inspect
import weakref

import pytest
import torch
import torch_pruning as tp

from intrafusion import (
    Fusion,
    method,
)
from tests.methods.common import PRUNERS, Summed, batches, build, dense, error, same, stepped


class Weak(Summed):
    """Remembers, without holding it, what it is shown."""

    inputs = "synthetic"

    def begin(self, view, tables) -> None:
        self.seen = {"dense": weakref.ref(view.dense), "view": weakref.ref(view)}
        self.seen |= {"batch": weakref.ref(view.batches[0][0]), "copy": weakref.ref(view.dense.conv1.weight)}

    def repair_(self, layer, view) -> None:
        for place, sight in zip(("dense", "pruned"), layer.sights[0], strict=True):
            self.seen[f"{layer.name} output, {place}"] = weakref.ref(sight.output)
            self.seen[f"{layer.name} inputs, {place}"] = weakref.ref(sight.inputs)


@pytest.mark.filterwarnings("ignore::intrafusion.WorseThanCut")
@pytest.mark.parametrize("keep", [False, True])
def test_neither_copies_nor_inputs_nor_activations_outlive_a_step(keep):
    method("weak")(Weak)
    pruner = build(Fusion(merge="weak"))
    pruner.keep_inputs = keep
    pruner.step()
    gc.collect()
    assert pruner.last_step is not None
    alive = {name for name, seen in pruner.last_step.method.seen.items() if seen() is not None}
    # the first layer reads the batch itself
    assert alive - {"conv1 inputs, dense", "conv1 inputs, pruned"} == ({"batch"} if keep else set())
    assert len(pruner.last_step.method.seen) > 8
    assert len(pruner.last_step.inputs) > 0 if keep else pruner.last_step.inputs == ()


@pytest.mark.filterwarnings("ignore::intrafusion.WorseThanCut")
@pytest.mark.parametrize("abandoned", [False, True])
def test_the_same_holds_for_an_interactive_step_however_far_it_is_followed(abandoned):
    method("weak")(Weak)
    pruner = build(Fusion(merge="weak"))
    for group in pruner.step(interactive=True):
        group.prune()
        if abandoned:
            break
    del group
    gc.collect()
    assert pruner.last_step is not None
    assert {name for name, seen in pruner.last_step.method.seen.items() if seen() is not None} == set()


# --- pruners of one's own, and the other ways to prune


@pytest.mark.parametrize("host", PRUNERS)
def test_a_subclass_without_a_constructor_has_the_signature_of_its_parent(host):
    class Mine(host):
        pass

    class Own(Mine):
        pass

    assert inspect.signature(Mine) == inspect.signature(Own) == inspect.signature(host)
    pruner = build("paper", make=Own)
    pruner.step()
    assert pruner.model.conv1.out_channels == 8


@pytest.mark.parametrize("host", PRUNERS)
def test_a_subclass_with_a_constructor_has_its_own_signature(host):
    class Mine(host):
        def __init__(self, model, ratio=0.5, **kwargs):
            l1 = tp.importance.GroupMagnitudeImportance(p=1)
            super().__init__(model, torch.zeros(2, 3, 8, 8), l1, pruning_ratio=ratio, **kwargs)

    class Below(Mine):
        pass

    for cls in (Mine, Below):
        assert list(inspect.signature(cls).parameters) == ["model", "ratio", "kwargs"]
        model = dense()
        cls(model, 0.25, fusion="paper", ignored_layers=[model.fc2]).step()
        assert model.conv1.out_channels == 12


def test_a_group_pruned_by_hand_is_corrected_and_remembered():
    models = {}
    for fusion, given in (("discard", None), ("data-free", None), ("calibrated", batches())):
        pruner = build(fusion, given)
        conv = pruner.model.conv1
        pruner.manual_prune_width(conv, tp.prune_conv_out_channels, list(range(8)))
        assert pruner.last_step is not None
        assert [cut.root for cut in pruner.last_step.cuts] == ["conv1"]
        models[fusion] = pruner.model
    assert error(models["data-free"]) < 0.5 * error(models["discard"])
    assert error(models["calibrated"]) < 0.5 * error(models["discard"])


@pytest.mark.parametrize("first", ["listed", "one by one"])
def test_an_interactive_step_is_corrected_and_remembered(first):
    pruner = build("calibrated", batches())
    groups = pruner.step(interactive=True)
    for group in list(groups) if first == "listed" else groups:
        group.prune()
    assert pruner.last_step is not None
    assert [cut.root for cut in pruner.last_step.cuts] == ["conv1", "conv2", "fc1"]
    assert error(pruner.model) < 0.5 * error(stepped("discard"))


def test_pruning_one_by_one_is_pruning():
    pruner = build("calibrated", batches())
    for group in pruner.step(interactive=True):
        group.prune()
    assert same(pruner.model, stepped("calibrated", batches()))
