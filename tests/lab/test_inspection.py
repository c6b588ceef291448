from __future__ import annotations

import pytest
from torch import nn

from intrafusion.lab import training
from intrafusion.lab.inspection import Inspection, inspect
from intrafusion.lab.recipe.loader import read_recipe

TEXT = """\
model: {name: digits_cnn}
data: {name: digits, test_images: 100}
train: {epochs: 1}
prune: {ratios: [0.5], ignored: [classifier]}
output: never_written
threads: 1
"""


@pytest.fixture(autouse=True)
def nothing_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "train_", lambda *_, **__: pytest.fail("trained"))


def look(*assignments: str) -> Inspection:
    return inspect(read_recipe(TEXT, "r.yaml", assignments), progress=False)


def test_every_group_with_its_widths_and_layers() -> None:
    found = look("prune.iterative_steps=2")
    assert found.weights == "untrained weights, which give the widths of the trained ones"
    (cut,) = found.cuts
    assert [(g.name, g.before, g.after, g.outcome, g.readers) for g in cut.groups] == [
        ("features.0", 32, 16, "fused", ("features.3",)),
        ("features.3", 64, 32, "fused", ("features.7",)),
        ("features.7", 64, 32, "fused", ("classifier",)),
    ]
    assert (cut.parameters, found.parameters) == (15_418, 58_474)
    lines = str(found).splitlines()
    assert lines[2] == "0.5 removed: 15,418 parameters (26.4%), 452,864 MACs (25.3%)"
    assert lines[4].split() == ["features.0", "32", "->", "16", "fused", "features.3"]


@pytest.mark.parametrize(
    "importance",
    ["taylor", "chip", "reconstruction", "reconstruction_backward", "reconstruction_data_free", "flap", "wanda"],
)
def test_no_importance_needs_images_for_local_widths(importance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("intrafusion.lab.data.dataset.Dataset.draw", lambda *_, **__: pytest.fail("read images"))
    assert look(f"prune.importance={importance}").cuts[0].groups[0].after == 16


def test_global_widths_of_random_weights_are_marked() -> None:
    assert "the global ranking depends on the weights" in look("prune.global=true").weights


def test_each_group_alone_and_a_target() -> None:
    found = look("prune.groups=each")
    assert [(cut.group, [g.name for g in cut.groups]) for cut in found.cuts] == [
        (name, [name]) for name in ("features.0", "features.3", "features.7")
    ]
    assert "0.5 removed of features.3 alone: " in str(found)
    (cut,) = (found := look("prune.ratios=null", "prune.target.parameters=0.3")).cuts
    assert cut.parameters / found.parameters == pytest.approx(0.3, rel=0.02)


def test_selection_and_its_reason() -> None:
    assert {group.outcome for group in look("fusion=discard").cuts[0].groups} == {"selected"}
    (cut,) = look(f"model.name={__name__}:tied", "prune.ignored=['2', '4']").cuts
    assert [(group.name, group.outcome) for group in cut.groups] == [("0", "fused"), ("1", "selected")]
    assert "ties its weight to another layer" in cut.groups[1].reason


def tied(num_classes: int) -> nn.Module:
    """Two convolutions share their weight."""
    stem, first, second = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
    second.weight = first.weight
    return nn.Sequential(stem, first, second, nn.Flatten(), nn.Linear(8 * 4, num_classes))


def test_widths_that_are_no_multiples_of_eight_and_what_rounding_leaves() -> None:
    found = look("prune.ratios=0.3")
    (cut,) = found.cuts
    assert [group.after for group in cut.groups] == [22, 44, 44]
    assert cut.odd == ("features.0 22", "features.3 44", "features.7 44")
    (rounded,) = look("prune.ratios=0.3", "prune.round_to=8").cuts
    assert cut.rounded is not None
    assert (cut.rounded.macs, cut.rounded.parameters) == (rounded.macs, rounded.parameters)
    assert rounded.macs < cut.macs
    note, last, _, advice = str(found).splitlines()[-4:]
    assert note == "Widths that are no multiples of 8: features.0 22, features.3 44, features.7 44."
    assert "docs/deploy.md" in advice
    assert last.startswith(f"With --set prune.round_to=8: {rounded.parameters:,} parameters (")
    assert "stay whole" not in last


def test_rounding_that_leaves_narrow_groups_whole_says_so() -> None:
    found = look("prune.ratios=0.8")
    assert [group.after for group in found.cuts[0].groups] == [6, 12, 12]
    assert "; a group of fewer than 8 channels would stay whole" in str(found)


@pytest.mark.parametrize("assignment", ["prune.ratios=0.5", "prune.round_to=4"])
def test_round_widths_and_widths_that_were_chosen_are_not_remarked(assignment: str) -> None:
    found = look("prune.ratios=0.3", assignment)
    assert (found.cuts[0].odd, found.cuts[0].rounded) == ((), None)
    assert "multiples" not in str(found)
