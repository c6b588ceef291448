"""The part of the sweep that CI runs: some networks, every preset; and that seeds, faults and files mean what they say.

The rest: `python -m tests.sweep --count 500 --from 0`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.sweep.checks import PRESETS, Row, check, state_of
from tests.sweep.checks import changes as changed
from tests.sweep.draft import Draft, Value, call
from tests.sweep.generator import Drawn, draw
from tests.sweep.shrink import shrink
from tests.sweep.summary import append, read, summary

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

# All parts of the check for one network; one step for the others, by one of the two presets that refit.
_WHOLE, _STEP = (304,), tuple(seed for seed in range(303, 326) if seed != 304)


def _cases(seeds: tuple[int, ...], presets: Callable[[int], tuple[str, ...]]) -> list[tuple[int, str]]:
    return [(seed, preset) for seed in seeds for preset in presets(seed)]


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "preset"), _cases(_WHOLE, lambda seed: PRESETS))
def test_a_random_network_is_pruned_as_promised(seed, preset):
    row = check(draw(seed), preset)
    assert not row.faults(), f"python -m tests.sweep --shrink {seed} --presets {preset}: {row}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "preset"),
    _cases(_STEP, lambda seed: ("paper", "barycentre", ("data-free", "calibrated")[seed % 2])),
)
def test_a_step_over_a_random_network_is_no_worse_than_the_cut_or_says_so(seed, preset):
    row = check(draw(seed), preset, ("step",))
    assert not row.faults(), f"python -m tests.sweep --shrink {seed} --presets {preset} --parts step: {row}"


def test_a_seed_is_one_network():
    for seed in range(20):
        one, other = draw(seed), draw(seed)
        assert one == other
        inputs = one.batch(2, part=1)
        assert torch.equal(one.model()(inputs)[0], other.model()(inputs)[0])
        assert not torch.equal(inputs, one.batch(2, part=2))


def test_networks_of_every_kind_are_drawn():
    sources = "".join(draw(seed).source for seed in range(200))
    for part in (
        "nn.Conv1d", "nn.Conv2d", "nn.Conv3d", "nn.ConvTranspose2d", "nn.Linear", "BatchNorm", "GroupNorm", "LayerNorm",
        "InstanceNorm", "RMSNorm", "PReLU", "torch.cat", "groups=", "dilation=", "stride=", "padding_mode=", "'same'",
        "input=", "StandardisedConv2d(", "PaddedConv2d(", "EqualisedLinear(", "self.shared1", "self.twin1", "alpha=",
        "self.tower1", "nn.Parameter", "self.excite1", ".flatten(1)", "adaptive_max_pool", ") ** 2",
    ):  # fmt: skip
        assert part in sources, part


def test_faults_are_told():
    right = Row(1, "paper", ours=0.5, twin=0.5, duplicates=1.0)
    assert right.faults() == []  # sums of sums: the published rule does not keep duplicates
    assert replace(right, preset="barycentre").faults() == ["duplicates not exact"]
    assert replace(right, ours=0.6).faults() == ["worse without a warning"]
    assert replace(right, ours=float("nan")).faults() == ["worse without a warning"]
    assert replace(right, ours=0.6, warned=True).faults() == []
    assert replace(right, error="IndexError: 3", named=False).faults() == ["crash"]
    assert replace(right, state="tensor fc1.weight").faults() == ["state changed by an error"]


def test_rows_are_read_again_and_the_last_one_holds(tmp_path):
    path = tmp_path / "rows" / "sweep.jsonl"
    first, second = Row(1, "paper", ours=2.0, twin=1.0), Row(1, "paper", ours=1.0, twin=2.0)
    append(path, first)
    append(path, second)
    assert read(path) == {(1, "paper"): second}
    assert "worse without a warning" in summary([first])
    assert "worse without a warning" not in summary([second])


def test_a_change_is_seen():
    model = draw(0).model()
    before = state_of(model)
    assert changed(before, state_of(model)) == ""
    next(model.parameters()).data += 1
    model.train()
    found = changed(before, state_of(model))
    assert "mode" in found
    assert "more" in found


def test_a_faulty_network_is_made_smaller(monkeypatch):
    def faulty(drawn: Drawn, preset: str, parts: object) -> Row:
        return Row(drawn.seed, preset, error="" if ".abs()" not in drawn.source else "RuntimeError: abs", named=False)

    monkeypatch.setattr("tests.sweep.shrink.check", faulty)
    smaller, row = shrink(draw(0), "paper", ())
    assert ".abs()" in smaller.source
    assert len(smaller.source) < len(draw(0).source)
    assert row.error
    smaller.model()(smaller.batch(2, part=0))
    with pytest.raises(ValueError, match="no fault"):
        shrink(draw(1), "paper", ())


def test_calls_are_written_as_code():
    assert call("nn.Conv2d", 3, 8, 1, bias=None, padding="same") == "nn.Conv2d(3, 8, 1, padding='same')"
    draft = Draft(random.Random(0), 2)
    assert draft.value("f(x)", 3, 8) == Value("x1", 3, 8)
    assert "        x1 = f(x)\n        return x1\n" in draft.source("x1")
