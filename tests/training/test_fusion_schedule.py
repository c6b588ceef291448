"""FusionSchedule: prunes inside a training loop, and takes optimizer and averaged weights along."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from intrafusion import FusionError, FusionSchedule, IntraFusionPruner
from intrafusion.training.averaged_weights import prune_twin_
from tests.nets import PICO, Case
from tests.training.optimizers import BIASLESS, held

PLAIN = PICO[0]


class Loop:
    """A user's own loop over random data."""

    def __init__(self, case: Case = PLAIN, at=(2, 4), fusion="barycentre", ema=None, make=torch.optim.AdamW, **kwargs):
        torch.manual_seed(0)
        self.case, self.model = case, case.model()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
            self.pruner = IntraFusionPruner(
                self.model,
                case.example(),
                tp.importance.GroupMagnitudeImportance(p=1),
                iterative_steps=len(at),
                ignored_layers=case.ignored(self.model),
                fusion=fusion,
                **kwargs,
            )
        self.optimizer = make(self.model.parameters(), lr=1e-3)
        self.ema = None if ema is None else ema(self.model)
        self.schedule = FusionSchedule(self.pruner, self.optimizer, at=at, ema=self.ema)

    def run(self, first: int, last: int) -> list[bool]:
        pruned = []
        for step in range(first, last + 1):
            generator = torch.Generator().manual_seed(step)
            self.model.train()
            self.model(torch.randn(8, *self.case.shape, generator=generator)).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if isinstance(self.ema, AveragedModel):
                self.ema.update_parameters(self.model)
            pruned.append(self.schedule.step())
        return pruned


def ema(model: nn.Module) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_it_prunes_at_the_scheduled_steps_only_and_training_goes_on_warm():
    loop = Loop(at=(2, 4))
    assert loop.run(1, 6) == [False, True, False, True, False, False]
    assert loop.schedule.finished
    assert loop.model.conv1.out_channels == 4
    assert {group.step for group in loop.schedule.report.fused} == {1, 2}
    assert loop.model.training
    assert [id(p) for p in held(loop.optimizer)] == [id(p) for p in loop.model.parameters()]
    assert all(float(loop.optimizer.state[p]["step"]) == 6 for p in held(loop.optimizer))


@pytest.mark.parametrize("fusion", ["barycentre", "data-free"])
@pytest.mark.parametrize("case", [PICO[0], PICO[1], PICO[2], PICO[8]], ids=lambda case: case.name)
def test_an_average_that_equals_the_network_goes_on_equal_bit_for_bit(case, fusion):
    loop = Loop(case, at=(2,), fusion=fusion, ema=lambda model: AveragedModel(model, use_buffers=True))
    loop.run(1, 1)
    loop.ema.module.load_state_dict(loop.model.state_dict())
    loop.schedule.step()
    assert str(loop.ema.module) == str(loop.model)
    assert same(loop.ema.module, loop.model)
    assert loop.ema.module(case.example()).shape == (2, 4)


@pytest.mark.parametrize("case", PICO, ids=lambda case: case.name)
def test_without_a_refit_or_batch_norm_pruning_commutes_with_averaging(case):
    """Maps are linear: the average of the pruned networks is the pruned average."""
    loop = Loop(case, at=(1,), fusion="discard")
    first = copy.deepcopy(loop.model)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    mean = copy.deepcopy(first)
    with torch.no_grad():
        for m, a, b in zip(mean.parameters(), first.parameters(), loop.model.parameters(), strict=True):
            m.copy_((a + b) / 2)
    loop.schedule.step()
    for network in (first, mean):
        prune_twin_(loop.pruner, network)
    for m, a, b in zip(mean.parameters(), first.parameters(), loop.model.parameters(), strict=True):
        torch.testing.assert_close(m, (a + b) / 2)


@pytest.mark.parametrize("fusion", ["barycentre", "data-free"])
def test_an_average_goes_on_being_updated_and_means_the_same_channels(fusion):
    loop = Loop(at=(2, 4), fusion=fusion, ema=ema)
    loop.run(1, 6)
    assert [p.shape for p in loop.ema.module.parameters()] == [p.shape for p in loop.model.parameters()]
    assert int(loop.ema.n_averaged) == 6
    x = torch.randn(64, *PLAIN.shape)
    with torch.no_grad():
        a, b = loop.ema.module.eval()(x), loop.model.eval()(x)
    assert float((a - b).norm() / b.norm()) < 0.2


@pytest.mark.parametrize("wrap", [copy.deepcopy, lambda m: AveragedModel(m)], ids=["copy", "buffers left out"])
def test_averages_of_other_kinds_modes_and_frozen_ones(wrap):
    def make(model):
        average = wrap(model).requires_grad_(False)
        return average.eval()

    loop = Loop(BIASLESS, at=(1, 2), fusion="data-free", ema=make)
    loop.schedule.step()
    inside = getattr(loop.ema, "module", loop.ema)
    assert inside.b.bias is not None
    assert not any(p.requires_grad for p in inside.parameters())
    assert not any(module.training for module in inside.modules())
    loop.schedule.step()
    assert inside(BIASLESS.example()).shape == (2, 4)


def test_statistics_that_an_average_leaves_out_are_taken_from_the_network():
    loop = Loop(
        at=(3,), fusion="data-free", ema=lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0))
    )
    loop.run(1, 3)  # a decay of 0: the average's weights are the network's, its statistics are those of the start
    assert same(loop.ema.module, loop.model)


def test_timms_average_is_understood():
    timm = pytest.importorskip("timm")
    loop = Loop(at=(1,), ema=lambda model: timm.utils.ModelEmaV3(model, decay=0.9))
    loop.schedule.step()
    assert same(loop.ema.module, loop.model)
    loop.ema.update(loop.model)


def state(loop: Loop) -> dict:
    return copy.deepcopy(
        {"model": loop.model.state_dict(), "optimizer": loop.optimizer.state_dict(), "ema": loop.ema.state_dict()}
    )


@pytest.mark.parametrize("broken", ["network", "average", "optimizer"])
def test_a_failure_leaves_network_average_optimizer_and_count_as_they_were(broken, monkeypatch):
    loop = Loop(at=(3, 4), fusion="data-free", ema=ema)
    loop.run(1, 2)
    before, text = state(loop), str(loop.model)
    held_before = [id(p) for p in held(loop.optimizer)]
    if broken == "network":
        monkeypatch.setattr("intrafusion.correct.correction.Correction.finish", lambda self: 1 / 0)
    elif broken == "average":
        monkeypatch.setattr("intrafusion.training.averaged_weights.replay_", lambda *args: 1 / 0)
    else:
        loop.optimizer.state[loop.model.conv1.weight]["odd"] = torch.zeros_like(loop.model.conv1.weight)
        before = state(loop)
    with pytest.raises((FusionError, ValueError), match="odd" if broken == "optimizer" else "division by zero"):
        loop.schedule.step()
    after = state(loop)
    assert str(loop.model) == text
    assert all(torch.equal(after["model"][k], v) for k, v in before["model"].items())
    assert all(torch.equal(after["ema"][k], v) for k, v in before["ema"].items())
    assert [id(p) for p in held(loop.optimizer)] == held_before
    assert loop.schedule.calls == 2
    assert not loop.schedule.report.groups
    monkeypatch.undo()
    for group in loop.optimizer.state.values():
        group.pop("odd", None)
    assert loop.run(3, 4) == [True, True]


@pytest.mark.parametrize(
    ("case", "options"),
    [
        (PLAIN, {}),
        (PLAIN, {"global_pruning": True}),
        (BIASLESS, {"fusion": "data-free"}),
    ],
    ids=["local", "global", "added biases"],
)
def test_a_run_that_is_interrupted_ends_bit_identical(case, options):
    whole = Loop(case, at=(2, 4), ema=ema, **options)
    whole.run(1, 5)
    first = Loop(case, at=(2, 4), ema=ema, **options)
    first.run(1, 3)
    saved, schedule = state(first), json.loads(json.dumps(first.schedule.state_dict()))
    second = Loop(case, at=(2, 4), ema=ema, **options)
    second.schedule.load_state_dict(schedule)
    second.model.load_state_dict(saved["model"])
    second.ema.load_state_dict(saved["ema"])
    second.optimizer.load_state_dict(saved["optimizer"])
    assert second.run(4, 5) == [True, False]
    assert same(whole.model, second.model)
    assert same(whole.ema, second.ema)


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    loop = Loop(at=(1, 2), ema=ema)
    loop.schedule.step()
    good = loop.schedule.state_dict()
    fresh = Loop(at=(1, 2), ema=ema)
    before = str(fresh.model)
    for change, message in [
        ({"format": 9}, "format 9"),
        ({"at": [1, 3]}, r"at=\[1, 3\]"),
        ({"history": [*good["history"], ["conv9", True, [0]]]}, "does not fit"),
        ({"history": [["conv1", True, [70]]]}, "does not fit"),
        ({"added": ["nowhere.bias"]}, "does not fit"),
    ]:
        with pytest.raises(ValueError, match=message):
            fresh.schedule.load_state_dict({**good, **change})
        assert str(fresh.model) == before
        assert str(fresh.ema.module) == before
        assert fresh.schedule.calls == 0
    with pytest.raises(ValueError, match="pruned already"):
        loop.schedule.load_state_dict(good)
    fresh.schedule.load_state_dict(good)
    assert str(fresh.model) == str(loop.model)


@pytest.mark.parametrize("at", [(), (0, 1), (3, 2), (2, 2)])
def test_steps_that_are_no_schedule_are_refused(at):
    loop = Loop()
    with pytest.raises(ValueError, match="increasing, counted from 1"):
        FusionSchedule(loop.pruner, loop.optimizer, at=at)


def test_what_does_not_fit_is_told_before_training():
    loop = Loop(at=(1, 2))
    with pytest.raises(ValueError, match="iterative_steps=3"):
        FusionSchedule(loop.pruner, at=(1, 2, 3))
    with pytest.raises(ValueError, match="is not of the pruner's network"):
        FusionSchedule(loop.pruner, torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1), at=(1, 2))
    with pytest.raises(ValueError, match=r"'conv1.weight' has shape none there"):
        FusionSchedule(loop.pruner, at=(1, 2), ema=nn.Linear(2, 2))


def test_a_sharded_network_is_refused():
    loop = Loop()
    loop.model.conv1.weight.placements = ("Shard(dim=0)",)
    with pytest.raises(ValueError, match=r"'conv1.weight' is sharded over several devices"):
        FusionSchedule(loop.pruner, at=(1, 2))


def test_it_works_without_an_optimizer_or_an_average():
    loop = Loop(at=(1, 2))
    assert FusionSchedule(loop.pruner, at=(1, 2)).step()
