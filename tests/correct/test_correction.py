"""The presets `data-free` and `calibrated`, which correct the network while it is pruned."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch_pruning as tp
from torch import nn

from intrafusion import Fusion, FusionError, IntraFusionPruner
from tests.nets import PICO, Case
from tests.prune.test_invariance import DUPLICABLE, duplicate_channels_, keep_even_channels


def l1():
    return tp.importance.GroupMagnitudeImportance(p=1)


def build(case: Case, fusion, **kwargs):
    model = case.model()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
        pruner = IntraFusionPruner(
            model, case.example(), l1(), ignored_layers=case.ignored(model), fusion=fusion, **kwargs
        )
    return model, pruner


def batches_for(case: Case, count=64, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(32, *case.shape, generator=generator) for _ in range(count // 32)]


def distance(model: nn.Module, case: Case) -> float:
    """Mean squared difference to the dense network on fresh inputs, as a share of the dense output's variance."""
    x = torch.randn(256, *case.shape, generator=torch.Generator().manual_seed(9))
    want = case.model()(x)
    return ((model(x) - want).square().mean() / want.var(dim=0).mean()).item()


@pytest.mark.parametrize("case", PICO, ids=lambda case: case.name)
def test_calibrated_is_nearer_to_the_dense_network_than_discarding_on_every_kind_of_layer(case):
    errors = {}
    for fusion in ("discard", "calibrated"):
        model, pruner = build(case, fusion, calibration=batches_for(case) if fusion == "calibrated" else None)
        pruner.step()
        errors[fusion] = distance(model, case)
        assert torch.isfinite(torch.tensor(errors[fusion]))
    assert errors["calibrated"] < 0.5 * errors["discard"]


@pytest.mark.parametrize("case", PICO, ids=lambda case: case.name)
def test_data_free_is_nearer_to_the_dense_network_than_discarding_on_every_kind_of_layer(case):
    errors = {}
    for fusion in ("discard", "data-free"):
        model, pruner = build(case, fusion)
        pruner.step()
        errors[fusion] = distance(model, case)
    assert errors["data-free"] < 0.5 * errors["discard"]


def test_more_calibration_inputs_do_not_hurt():
    case = PICO[1]
    errors = []
    for count in (64, 1024):
        model, pruner = build(case, "calibrated", calibration=batches_for(case, count))
        pruner.step()
        errors.append(distance(model, case))
    assert errors[1] <= 1.05 * errors[0]


def test_channels_that_are_linear_combinations_of_kept_ones_are_recovered_exactly():
    """Without a nonlinearity between the layers, half of the channels carry everything."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 5))
    dense[0].weight.data[4:] = torch.randn(4, 4) @ dense[0].weight.data[:4]
    dense[0].bias.data[4:] = 0.3
    x = torch.randn(500, 12)
    want = dense(x)

    def keep_first(group):
        return -torch.arange(len(group[0].idxs)).float()

    IntraFusionPruner(
        dense,
        x[:2],
        keep_first,
        pruning_ratio=0.5,
        ignored_layers=[dense[1]],
        fusion="calibrated",
        calibration=[x[:250]],
    ).step()
    assert dense[0].out_features == 4
    assert ((dense(x) - want).square().mean() / want.var()).item() < 1e-3


@pytest.mark.parametrize("fusion", ["data-free", "calibrated"])
@pytest.mark.parametrize("case", DUPLICABLE, ids=lambda case: case.name)
def test_exact_duplicates_are_removed_without_a_trace(case, fusion):
    """Up to the ridge of the regressions; the plan may pair the wrong channels, since the columns differ."""
    model, pruner = build(case, fusion, **({"calibration": batches_for(case, 256)} if fusion == "calibrated" else {}))
    duplicate_channels_(pruner)
    (x,) = batches_for(case, 32, seed=9)
    before = model(x)
    pruner.importance = keep_even_channels
    pruner.step()
    assert ((model(x) - before).norm() / before.norm()).item() < 1e-3


class Halved(nn.Linear):
    """Its call does not see the weight as it stands, so that it is not refitted."""

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight / 2, self.bias)


@pytest.mark.parametrize("fusion", ["data-free", "calibrated"])
@pytest.mark.parametrize("reader", [nn.Linear, Halved])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, nn.Identity])
def test_pairs_in_front_of_a_small_norm_are_removed_without_a_trace(norm, reader, fusion):
    """Three channels behind a norm hardly vary, each in its own way: the ridge of a regression is large for them."""
    for seed in range(3):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 6), norm(6), nn.SiLU(), reader(6, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
        with torch.no_grad():
            for place in [model[0].weight, model[0].bias, *model[1].parameters()]:
                place[:] = torch.randn_like(place)
                place[1::2] = place[::2]
            model[0].weight[:2] *= 8
        x = torch.randn(200, 8)
        before = model(x)
        pruner = IntraFusionPruner(
            model, x[:2], keep_even_channels, pruning_ratio=0.5, ignored_layers=[model[3], model[5]], fusion=fusion,
            calibration=[torch.randn(64, 8)] if fusion == "calibrated" else None,
        )  # fmt: skip
        pruner.step()
        assert model[0].out_features == 3
        assert ((model(x) - before).norm() / before.norm()).item() < 1e-4


def test_groups_may_be_pruned_by_hand_in_any_order():
    case = PICO[0]
    for late in (False, True):
        model, pruner = build(case, "calibrated", calibration=batches_for(case))
        groups = pruner.step(interactive=True)
        if late:
            groups = reversed(list(groups))
        for group in groups:
            group.prune()
        assert model.conv1.out_channels == 4
        assert distance(model, case) < 2.0
        assert {group.merged for group in pruner.report.groups} == {"calibrated"}


def test_a_step_that_cuts_nothing_leaves_the_network_alone():
    """The correction of the step before is over: it must not refit what the user has changed since."""
    case = PICO[0]
    model, pruner = build(case, "calibrated", calibration=batches_for(case))
    pruner.step()
    model.conv1.weight.data *= 2
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.warns(UserWarning, match="exceed the maximum iterative steps"):
        pruner.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_failure_of_the_correction_puts_the_network_back(monkeypatch):
    case = PICO[0]
    model, pruner = build(case, "calibrated", calibration=batches_for(case))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    text = str(model)

    def broken(*args, **kwargs):
        raise ValueError("no solution today")

    monkeypatch.setattr("intrafusion.methods.refit.refit_", broken)
    with pytest.raises(FusionError, match="no solution today"):
        pruner.step()
    assert str(model) == text
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("fusion", "calibration", "error", "message"),
    [
        ("calibrated", None, ValueError, "needs calibration=<iterable of input batches"),
        ("calibrated", [], ValueError, "the calibration iterable is empty"),
        ("paper", [torch.ones(1)], ValueError, "calibration inputs are given, but"),
        ("calibrated", ["image.jpg"], TypeError, "calibration batch 0 is a str"),
        (
            "calibrated",
            [torch.ones(1, 3), torch.ones(0, 3)],
            ValueError,
            r"batch 1 has no inputs, its shape is \[0, 3\]",
        ),
    ],
)
def test_calibration_inputs_are_checked(fusion, calibration, error, message):
    with pytest.raises(error, match=message):
        build(PICO[0], fusion, calibration=calibration)


def test_calibration_inputs_with_nan_are_named():
    batches = batches_for(PICO[0])
    batches[1][3] = float("nan")
    with pytest.raises(ValueError, match="calibration batch 1 holds NaN or infinite values"):
        build(PICO[0], "calibrated", calibration=batches)


def test_activations_that_overflow_are_an_error_that_changes_nothing():
    case = PICO[0]
    model, pruner = build(case, "calibrated", calibration=[1e37 * batch for batch in batches_for(case)])
    text = str(model)
    with pytest.raises(FusionError, match="not finite"):
        pruner.step()
    assert str(model) == text


def test_the_presets_say_what_corrects_them():
    assert Fusion.preset("data-free").correct == "data-free"
    assert Fusion.preset("calibrated").correct == "calibrated"
    assert Fusion.preset("calibrated").discarded().correct == "none"
