"""All layers together, towards what the dense network gives, after the last refit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from intrafusion import Fusion, FusionError, IntraFusionPruner
from intrafusion.correct.descent import _parted
from tests.nets import randomise_

CALIBRATED = {"merge": "barycentre", "cost": "l2", "correct": "calibrated"}


class Residual(nn.Module):
    """A stream of 8 channels with two blocks; only what is inside of these is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.inner = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)) for _ in range(2))
        self.outer = nn.ModuleList(nn.Conv2d(12, 8, 3, padding=1) for _ in range(2))
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for inner, outer in zip(self.inner, self.outer, strict=True):
            x = (x + outer(inner(x).relu())).relu()
        return self.head(x)


def first_ones(group):
    return -torch.arange(len(group[0].idxs)).float()


def pruned(descent: int):
    torch.manual_seed(0)
    model = randomise_(Residual()).eval()
    dense, x = copy.deepcopy(model), torch.randn(128, 3, 8, 8)
    pruner = pruner_of(model, x, descent)
    pruner.step()
    return dense, model, pruner


def pruner_of(model, x, descent, calibration=None):
    pruner = IntraFusionPruner(
        model, x[:2], first_ones, pruning_ratio=0.5, ignored_layers=[model.stem, *model.outer, model.head],
        fusion=Fusion(**CALIBRATED, descent=descent), calibration=calibration or [x[:60], x[60:]],
    )  # fmt: skip
    pruner.progress = False
    return pruner


def error(dense, model):
    x = torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return float((model(x) - dense(x)).norm() / dense(x).norm())


def test_on_other_inputs_the_network_is_nearer_to_the_dense_one_than_without():
    dense, refitted, _ = pruned(0)
    _, model, pruner = pruned(60)
    assert error(dense, model) < 0.97 * error(dense, refitted)
    assert [p.shape for p in model.parameters()] == [p.shape for p in refitted.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert {group.merged for group in pruner.report.fused} == {"calibrated"}


def test_where_no_step_is_better_the_refitted_network_stays(monkeypatch):
    monkeypatch.setattr("intrafusion.correct.descent._RATE", 10.0)
    _, refitted, _ = pruned(0)
    with pytest.warns(UserWarning, match="nothing better than the refit"):
        _, model, _ = pruned(3)
    for value, other in zip(model.state_dict().values(), refitted.state_dict().values(), strict=True):
        assert torch.equal(value, other)


def test_a_rate_that_is_too_high_is_lowered(monkeypatch):
    monkeypatch.setattr("intrafusion.correct.descent._RATE", 10.0)
    dense, refitted, _ = pruned(0)
    _, model, _ = pruned(200)
    assert error(dense, model) < error(dense, refitted)


def test_statistics_and_what_is_frozen_stay():
    _, refitted, _ = pruned(0)
    torch.manual_seed(0)
    model = randomise_(Residual()).eval()
    model.head.bias.requires_grad_(False)
    model.head.weight.grad = given = torch.ones_like(model.head.weight)
    pruner_of(model, torch.randn(128, 3, 8, 8), 20).step()
    assert not model.head.bias.requires_grad
    assert torch.equal(model.head.weight.grad, given)
    for (name, value), other in zip(model.named_buffers(), refitted.buffers(), strict=True):
        assert torch.equal(value, other), name


def test_a_descent_that_fails_leaves_the_network_as_it_was(monkeypatch):
    torch.manual_seed(0)
    model = randomise_(Residual()).eval()
    before = copy.deepcopy(model.state_dict())
    pruner = pruner_of(model, torch.randn(128, 3, 8, 8), 20)
    steps = torch.optim.Adam.step

    def fails(self, *args):
        steps(self, *args)
        raise RuntimeError("no more")

    monkeypatch.setattr(torch.optim.Adam, "step", fails)
    with pytest.raises(FusionError, match="no more"):
        pruner.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Outputs(nn.Module):
    """Gives what is cut as well, beside integers and what is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, x):
        h = self.a(x).relu()
        y = self.b(h)
        return h, y.masked_fill(torch.arange(5) == 4, float("-inf")), y.argmax(1)


def depthwise():
    middle = nn.Conv2d(16, 16, 3, padding=1, groups=16)
    return nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), middle, nn.ReLU(), nn.Conv2d(16, 5, 1))


def transposed():
    return nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.ConvTranspose2d(16, 5, 2, stride=2))


@pytest.mark.filterwarnings("ignore:1 of the groups could only be cut", "ignore:.*than plain cutting would have")
@pytest.mark.parametrize(("make", "shape"), [(depthwise, (3, 8, 8)), (transposed, (3, 8, 8)), (Outputs, (6,))])
def test_widths_that_change_elsewhere_are_not_compared(make, shape):
    left = {}
    for steps in (0, 20):
        torch.manual_seed(0)
        model, x = make().eval(), torch.randn(96, *shape)
        kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
        last = [module for module in model.modules() if isinstance(module, kinds)][-1]
        pruner = IntraFusionPruner(
            model, x[:2], first_ones, pruning_ratio=0.5, ignored_layers=[last], calibration=[x],
            fusion=Fusion(**CALIBRATED, descent=steps),
        )  # fmt: skip
        pruner.progress = False
        pruner.step()
        left[steps] = list(model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(left[0], left[20], strict=True))


@pytest.mark.parametrize("stop", ["half", "frozen", "no gradient"])
def test_where_there_is_nothing_to_move_the_refitted_network_stays_and_a_warning_says_so(stop):
    model = Residual().eval()
    x = torch.randn(128, 3, 8, 8)
    if stop == "half":
        model, x = model.bfloat16(), x.bfloat16()
    pruner = pruner_of(model, x, 5)
    if stop == "frozen":
        model.requires_grad_(False)
    if stop == "no gradient":
        model.forward = torch.no_grad()(model.forward)
    said = {
        "half": "are torch.bfloat16",
        "frozen": "no weights may be trained",
        "no gradient": "no output has a gradient",
    }
    with pytest.warns(UserWarning, match=said[stop]):
        pruner.step()
    with torch.no_grad():
        assert model(x).isfinite().all()


def test_what_judges_is_the_users_own():
    fitted, judges = _parted([torch.zeros(40, 2), torch.zeros(3, 2)], [torch.ones(64, 2)] * 9)
    assert [len(part) for part in judges] == [5]
    assert sorted(len(part) for part in fitted) == [3, 3, 32] + [64] * 9
    assert not any(part.any() for part in judges)
    one = [torch.zeros(1, 2)]
    for parts in _parted(one, []):
        assert [part.tolist() for part in parts] == [one[0].tolist()]
    fitted, judges = _parted([], [torch.arange(16.0)])  # where there is nothing but synthetic inputs, these judge
    assert torch.equal(torch.cat(fitted), torch.arange(14.0))
    assert torch.equal(torch.cat(judges), torch.arange(14.0, 16.0))


def test_without_data_it_descends_on_synthetic_inputs():
    left = {}
    for steps in (0, 60):
        torch.manual_seed(0)
        model = randomise_(Residual()).eval()
        dense = copy.deepcopy(model)
        pruner = IntraFusionPruner(
            model, torch.randn(2, 3, 8, 8), first_ones, pruning_ratio=0.5,
            ignored_layers=[model.stem, *model.outer, model.head],
            fusion=Fusion.preset("data-free", descent=steps),
        )  # fmt: skip
        pruner.progress = False
        pruner.step()
        left[steps] = error(dense, model)
    assert left[60] < 0.97 * left[0]


def test_networks_that_read_tokens_descend_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 12)).eval()
    dense, ids = copy.deepcopy(model), torch.randint(12, (64, 9))
    pruner = IntraFusionPruner(
        model, ids[:1], first_ones, pruning_ratio=0.5, ignored_layers=[model[0], model[3]], calibration=[ids],
        fusion=Fusion(**CALIBRATED, descent=50),
    )  # fmt: skip
    pruner.progress = False
    pruner.step()
    assert model[1].out_features == 8
    with torch.no_grad():
        assert float((model(ids) - dense(ids)).norm() / dense(ids).norm()) < 0.5


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"descent": -1, "correct": "calibrated"}, "Fusion.descent is -1: it must be a number of steps"),
        ({"descent": True, "correct": "calibrated"}, "Fusion.descent is True"),
        ({"descent": 10}, "goes with correct='calibrated' or 'data-free', not 'none'"),
    ],
)
def test_what_means_nothing_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Fusion(merge="barycentre", **settings)


def test_a_preset_takes_other_values():
    assert Fusion.preset("calibrated", descent=50) == Fusion(**CALIBRATED, descent=50)
    assert Fusion.preset("discard") is Fusion.preset("discard")
    with pytest.raises(TypeError, match="dissent"):
        Fusion.preset("calibrated", dissent=50)
    with pytest.raises(ValueError, match="goes with correct="):
        Fusion.preset("paper", descent=50)


@pytest.mark.filterwarnings("ignore:descent has found nothing better")
@pytest.mark.parametrize("shape", [(7, 3, 8, 8), (40, 3, 8, 8)])
def test_calibration_may_have_been_made_in_any_way(shape):
    x = torch.randn(*shape)
    with torch.inference_mode():
        fixed = torch.randn(*shape)
    for batch in (fixed, x.clone().requires_grad_(True), x.clone().requires_grad_(True) * 2):
        torch.manual_seed(0)
        model = randomise_(Residual()).eval()
        pruner = pruner_of(model, torch.randn(2, 3, 8, 8), 5, [batch])
        pruner.step()
        assert not batch.is_leaf or batch.grad is None


@pytest.mark.filterwarnings("ignore:descent has found nothing better")
def test_what_was_made_under_inference_mode_need_not_be_images():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    with torch.inference_mode():
        batch = torch.randn(64, 6)
    pruner = IntraFusionPruner(
        model, torch.randn(2, 6), first_ones, pruning_ratio=0.5, ignored_layers=[model[4]], calibration=[batch],
        fusion=Fusion.preset("calibrated", descent=5),
    )  # fmt: skip
    pruner.progress = False
    pruner.step()
    assert model[2].weight.shape == (8, 8)
