"""Looking into a forward pass, refitting layers, synthetic inputs: what `data-free` and `calibrated` are made of."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch_pruning as tp
from torch import nn

from intrafusion import Fusion, FusionError, IntraFusionPruner
from intrafusion.surgery.observe import call_order, look
from intrafusion.surgery.probes import dead_leaves, synthetic_inputs
from intrafusion.surgery.refit import RowMap, can_refit, refit_
from tests.nets import PICO, Case, Plain, Residual, randomise_
from tests.surgery.test_invariance import DUPLICABLE, duplicate_channels_, keep_even_channels


def l1():
    return tp.importance.GroupMagnitudeImportance(p=1)


class Chain(nn.Module):
    """Activations in every spelling: modules, functions, in place; a pool; a flatten; an addition in place."""

    def __init__(self):
        super().__init__()
        self.a, self.bn, self.act = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        self.b, self.c = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 5, 3, padding=1)
        self.fc = nn.Linear(5, 4)

    def forward(self, x):
        y = self.act(self.bn(self.a(x)))
        z = self.b(y)
        z += y
        z = nn.functional.max_pool2d(nn.functional.gelu(z), 2)
        return self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(torch.relu(self.c(z)), 1), 1))


def test_the_calls_before_a_layer_can_be_replayed():
    model, x = randomise_(Chain()), torch.randn(2, 3, 8, 8)
    for name, expected in (
        ("b", ["relu"]),
        ("c", ["gelu", "max_pool2d"]),
        ("fc", ["relu", "adaptive_avg_pool2d", "flatten"]),
    ):
        sight = look(lambda: model(x), model.get_submodule(name), None)
        assert [call.func.__name__.replace("boolean_dispatch", "max_pool2d") for call in sight.chain] == expected
        value = sight.before
        for call in sight.chain:
            value = call(value)
        assert torch.equal(value, sight.inputs), name
    assert [call.block for call in look(lambda: model(x), model.c, None).chain] == [1, 2]


def test_an_in_place_activation_does_not_hide_what_it_overwrote():
    model, x = randomise_(Chain()), torch.randn(2, 3, 8, 8)
    sight = look(lambda: model(x), model.b, None)
    assert torch.allclose(sight.before, model.bn(model.a(x)))
    assert (sight.before < 0).any()


def test_calls_that_return_their_argument_are_not_a_loop():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3)).eval()
    sight = look(lambda: model(torch.randn(5, 4)), model[3], None)
    assert [call.func.__name__ for call in sight.chain] == ["relu"]


def test_what_is_added_to_an_output_is_seen():
    model, x = randomise_(Chain()), torch.randn(2, 3, 8, 8)
    sight = look(lambda: model(x), model.b, None)
    assert torch.allclose(sight.other, sight.inputs)
    assert look(lambda: model(x), model.c, None).other is None
    assert look(lambda: model(x), model.a, model.bn).output.shape == (2, 6, 8, 8)


def test_looking_changes_nothing():
    model, x = randomise_(Chain()), torch.randn(2, 3, 8, 8)
    before = model(x)
    for name in ("a", "b", "c", "fc"):
        look(lambda: model(x), model.get_submodule(name), None)
    assert torch.equal(model(x), before)
    assert not model.b._forward_hooks
    assert not model.b._forward_pre_hooks


def test_layers_are_listed_in_the_order_of_the_forward_pass():
    model = Residual().eval()
    order = call_order(lambda: model(torch.randn(1, 3, 6, 6)), model, (nn.Conv2d, nn.Linear))
    assert order == ["stem", "a", "b", "c", "fc"]


def sights(dense, pruned, name, batches, bn=""):
    for x in batches:
        yield tuple(
            look(lambda m=m, x=x: m(x), m.get_submodule(name), m.get_submodule(bn) if bn else None)
            for m in (dense, pruned)
        )


@pytest.mark.parametrize("affine", [True, False])
def test_a_layer_behind_a_distorted_one_gets_the_dense_output_back(affine):
    """The inputs are stretched and mixed by an invertible map: the refitted layer undoes it exactly."""
    dense = randomise_(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5, affine=affine))
    )
    pruned = copy.deepcopy(dense)
    stretch = torch.randn(4, 4) + 2 * torch.eye(4)
    pruned[0].weight.data = torch.einsum("ij,jkab->ikab", stretch, pruned[0].weight.data)
    pruned[0].bias.data = stretch @ pruned[0].bias.data
    batches = [torch.randn(16, 3, 9, 9) for _ in range(4)]
    want = dense(batches[0])
    before = (want - pruned(batches[0])).abs().max()
    done = refit_(
        pruned[1], pruned[2], dense[1], dense[2], sights(dense, pruned, "1", batches, "2"), RowMap.identity(5)
    )
    assert done
    assert (want - pruned(batches[0])).abs().max() < 0.05 * before
    if affine:  # the batch-norm is real: training mode starts from the same function
        together = torch.cat(batches)
        calm, busy = pruned.eval()(together), pruned.train()(together)
        assert (calm - busy).abs().max() < 0.02 * calm.abs().max()


@pytest.mark.parametrize("groups", [2, 4])
def test_a_grouped_layer_behind_a_distorted_one_gets_the_dense_output_back(groups):
    """Every channel is stretched and shifted by itself, which a grouped layer can undo within its groups."""
    dense = randomise_(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, groups=groups), nn.BatchNorm2d(8)))
    pruned = copy.deepcopy(dense)
    pruned[0].weight.data *= torch.tensor([0.5, 2.0, -3.0, 1.0])[:, None, None, None]
    pruned[0].bias.data += torch.tensor([1.0, 0.0, -2.0, 3.0])
    batches = [torch.randn(16, 3, 9, 9) for _ in range(4)]
    want, before = dense(batches[0]), pruned(batches[0])
    assert refit_(
        pruned[1], pruned[2], dense[1], dense[2], sights(dense, pruned, "1", batches, "2"), RowMap.identity(8)
    )
    assert (want - pruned(batches[0])).abs().max() < 0.02 * (want - before).abs().max()


def test_a_layer_whose_inputs_did_not_change_is_left_alone():
    dense = randomise_(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3)))
    pruned = copy.deepcopy(dense)
    before = pruned[1].weight
    batches = [torch.randn(4, 3, 9, 9)]
    assert not refit_(pruned[1], None, dense[1], None, sights(dense, pruned, "1", batches), RowMap.identity(5))
    assert pruned[1].weight is before


def test_kinds_of_layers_that_can_be_refitted():
    assert can_refit(nn.Linear(3, 4))
    assert can_refit(nn.Conv2d(3, 4, 3, stride=2))
    assert can_refit(nn.Conv1d(3, 4, 3))
    assert can_refit(nn.Conv2d(4, 4, 3, groups=4))
    assert not can_refit(nn.ConvTranspose2d(3, 4, 3))
    assert not can_refit(nn.Linear(100_000, 2))


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

    monkeypatch.setattr("intrafusion.surgery.sequential.refit_", broken)
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


def test_synthetic_inputs_are_images_of_the_right_shape_and_reproducible():
    model = randomise_(Plain())

    def make(seed):
        return synthetic_inputs(model, (torch.zeros(2, 3, 8, 8),), lambda m, b: m(*b), seed=seed, progress=False)

    first, again, other = make(0), make(0), make(1)
    assert all(batch[0].shape[1:] == (3, 8, 8) for batch in first)
    assert sum(len(batch[0]) for batch in first) >= 64
    assert torch.equal(first[0][0], again[0][0])
    assert not torch.equal(first[0][0], other[0][0])


def test_synthetic_inputs_agree_better_with_the_batchnorms_than_the_images_they_start_from():
    model = randomise_(Plain())
    model.bn1.running_var *= 9
    start = dead_leaves(125, 3, 8, 8, torch.Generator().manual_seed(0))
    (batch,), *_ = synthetic_inputs(model, (torch.zeros(1, 3, 8, 8),), lambda m, b: m(*b), progress=False)

    def gap(images):
        value = model.conv1(images)
        return ((value.var(dim=(0, 2, 3)) / model.bn1.running_var).sqrt() - 1).square().mean().item()

    assert gap(batch) < 0.8 * gap(start)
    assert all(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_networks_that_do_not_read_images_get_noise_of_their_shape():
    model = nn.Linear(6, 4)
    batches = synthetic_inputs(model, {"input": torch.ones(2, 5, 6)}, lambda m, b: m(**b), progress=False)
    assert batches[0]["input"].shape[1:] == (5, 6)
    assert batches[0]["input"].std().item() == pytest.approx(1.0, abs=0.1)


def test_neighbouring_pixels_of_dead_leaves_are_alike_as_in_natural_images():
    images = dead_leaves(64, 3, 32, 32, torch.Generator().manual_seed(0))
    near = (images[..., 1:] * images[..., :-1]).mean().item()
    far = (images[..., 8:] * images[..., :-8]).mean().item()
    assert near > 0.7
    assert 0.1 < far < near


def test_the_presets_say_what_corrects_them():
    assert Fusion.preset("data-free").correct == "data-free"
    assert Fusion.preset("calibrated").correct == "calibrated"
    assert Fusion.preset("calibrated").discarded().correct == "none"
