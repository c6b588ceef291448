"""Every step is compared with what plain cutting would have left, on inputs that nothing was fitted to."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch
import torch_pruning as tp
from torch import nn

from intrafusion import Fusion, IntraFusionPruner, Pair, WorseThanCut
from intrafusion.prune.twin import BLINDLY, Comparison, count_of, held_out, varied
from tests.nets import randomise_


def images(count=200):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(3))


class Tokens(nn.Module):
    """Free parameters, and two layers whose outputs are added."""

    def __init__(self):
        super().__init__()
        self.embed, self.position = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.randn(1, 4, 8))
        self.a, self.b, self.fc = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position
        return self.fc((torch.relu(self.a(x)) + self.b(x)).mean(dim=1))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


NETS = {"convolutional": convolutional, "tokens": Tokens}


def pruned(model, base=IntraFusionPruner, **kwargs):
    arguments = {"pruning_ratio": 0.5, "ignored_layers": [list(model.modules())[-1]]} | kwargs
    if isinstance(model, Tokens):
        arguments["unwrapped_parameters"] = [(model.position, 2)]
    pruner = base(model, images(1), tp.importance.GroupMagnitudeImportance(p=1), **arguments)
    pruner.progress = False
    return pruner


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("fusion", [Fusion(merge="barycentre"), "calibrated"])
def test_the_twin_is_torch_prunings_own_cut(net, fusion):
    torch.manual_seed(0)
    model = randomise_(NETS[net]()).eval()
    dense, plain = copy.deepcopy(model), copy.deepcopy(model)
    batches = list(images().split(50))
    pruner = pruned(model, fusion=fusion, calibration=batches if fusion == "calibrated" else None)
    pruner.step()
    pruned(plain, tp.pruner.BasePruner).step()
    (compared,) = pruner.report.comparisons
    judges = held_out(batches)[1][0] if fusion == "calibrated" else varied((images(1),))[0]
    if compared.inputs == "the example inputs":
        judges = images(1)
    for network, told in ((model, compared.fused), (plain, compared.cut)):
        with torch.no_grad():
            error = (network.eval()(judges) - dense(judges)).norm() / dense(judges).norm()
        assert told == pytest.approx(float(error), rel=1e-4)
    assert str(compared) in str(pruner.report)


def test_what_is_worse_than_the_cut_is_told_with_both_figures():
    """Column sums of the published rule, where all channels are alike up to their sign."""
    model = nn.Sequential(nn.Linear(6, 32, bias=False), nn.Linear(32, 4, bias=False))
    with torch.no_grad():
        model[0].weight[0] *= 10
        model[1].weight[:, 0] *= 10
    x = torch.randn(1, 6)
    pruner = IntraFusionPruner(
        model, x, tp.importance.GroupMagnitudeImportance(p=1), pruning_ratio=0.9, ignored_layers=[model[1]],
        fusion="paper",
    )  # fmt: skip
    with pytest.warns(WorseThanCut, match=r"worse than plain cutting.*error of the output [\d.]+, plainly cut [\d.]+"):
        pruner.step()


def tilted(plan):
    """The third channel is made up for, exactly, and the first one spoilt a little."""
    rows = torch.tensor([[0.9, 0.0, 2.0], [0.0, 1.0, 0.0]], dtype=plan.coupling.dtype)
    return Pair(rows=rows, columns=torch.eye(3, 2, dtype=plan.coupling.dtype), kept=plan.kept)


class Summed(nn.Module):
    """The sum of three inputs, by way of three channels."""

    def __init__(self, is_image):
        super().__init__()
        self.a, self.b = (nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 1, 1, bias=False)) if is_image else (
            nn.Linear(3, 3, bias=False), nn.Linear(3, 1, bias=False)
        )  # fmt: skip
        with torch.no_grad():
            self.a.weight.copy_(torch.diag(torch.tensor([2.0, 2.0, 1.0])).view_as(self.a.weight))
            self.b.weight.copy_(torch.tensor([0.5, 0.5, 1.0]).view_as(self.b.weight))

    def forward(self, x):
        return self.b(self.a(x))


@pytest.mark.parametrize("is_image", [True, False])
@pytest.mark.parametrize("silent", [True, False])
def test_what_is_better_on_noise_and_worse_on_the_example_is_told(is_image, silent):
    """As with networks of squeeze-and-excite gates, whose output on noise says nothing about images."""
    shape = (1, 3, 1, 1) if is_image else (1, 3)
    example = torch.tensor([1.0, 0.9, 0.0 if silent else 1.1]).view(shape)
    model = Summed(is_image)
    pruner = IntraFusionPruner(
        model, example, tp.importance.GroupMagnitudeImportance(p=1), pruning_ratio=0.3, ignored_layers=[model.b],
        fusion=Fusion(merge="tests.prune.test_twin:tilted"),
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pruner.step()
    assert model.a.weight.shape[0] == 2
    told = [str(warning.message) for warning in caught if issubclass(warning.category, WorseThanCut)]
    assert bool(told) is silent
    assert all("on the example inputs" in text for text in told)


@pytest.mark.parametrize("fusion", ["discard", "calibrated"])
def test_what_is_not_worse_gives_no_warning(fusion):
    model = randomise_(convolutional()).eval()
    pruner = pruned(model, fusion=fusion, calibration=[images()] if fusion == "calibrated" else None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.step()


def test_every_step_is_compared_with_the_network_before_it_and_a_failed_one_not_at_all(monkeypatch):
    model = randomise_(convolutional()).eval()
    pruner = pruned(model, fusion="barycentre", iterative_steps=3)
    pruner.step()
    monkeypatch.setattr("intrafusion.prune.step.write_", lambda *_: 1 / 0)
    with pytest.raises(Exception, match="group"):
        pruner.step()
    monkeypatch.undo()
    pruner.step()
    assert [one.step for one in pruner.report.comparisons] == [1, 2]


def test_no_copy_outlives_a_step(monkeypatch):
    made = []
    from intrafusion.prune import step

    def remembered(model):
        made.append(weakref.ref(copied := copy.deepcopy(model)))
        return copied

    monkeypatch.setattr(step, "copy_of", remembered)
    pruner = pruned(randomise_(convolutional()).eval(), fusion="paper", iterative_steps=2)
    next(iter(pruner.step(interactive=True)))  # broken off
    pruner.step()
    gc.collect()
    assert [reference() for reference in made] == [None, None]


@pytest.mark.parametrize("sizes", [[200], [50, 50, 50, 50], [1] * 40, [3, 70, 2], [2000]])
def test_one_input_in_32_is_held_out(sizes):
    batches = [(torch.full((size, 2), float(number)),) for number, size in enumerate(sizes)]
    kept, judges = held_out(batches)
    assert count_of(judges) == min(32, max(4 if sum(sizes) < 64 else 8, sum(sizes) // 32))
    together = torch.cat([batch[0] for batch in kept + judges])
    assert torch.equal(together, torch.cat([batch[0] for batch in batches]))


def test_few_inputs_and_inputs_that_cannot_be_parted():
    few = [torch.zeros(31, 3)]
    assert held_out(few) == (few, [])
    lists = [([torch.zeros(3, 4, 5), torch.zeros(3, 6, 7)],) for _ in range(32)]
    kept, judges = held_out(lists)
    assert len(kept) == 28
    assert judges[-1] is lists[-1]
    mixed = [{"x": torch.zeros(2, 4), "mask": torch.zeros(3, 4)} for _ in range(32)]
    kept, judges = held_out(mixed)
    assert len(kept) == 28
    assert judges[-1] is mixed[-1]


def test_an_example_that_says_nothing_is_varied():
    noise, kept = varied((torch.zeros(2, 3), torch.arange(3)))
    assert noise.std() > 0.3
    assert torch.equal(kept, torch.arange(3))


def test_where_noise_judges_a_small_gain_is_no_gain():
    """But a network that was only cut is as good as cut."""
    assert not Comparison(1, 0.43, 0.5, "", BLINDLY).is_worse
    assert not Comparison(1, 0.5, 0.5, "", BLINDLY).is_worse
    doubtful = Comparison(1, 0.45, 0.5, "", BLINDLY)
    assert doubtful.is_worse
    assert "may have left this network worse than plain cutting would have" in str(doubtful.warning("paper"))
    assert "may" not in str(Comparison(1, 0.6, 0.5, "", BLINDLY).warning("paper"))


@pytest.mark.parametrize(("fused", "worse"), [(0.5, False), (0.515, True), (float("nan"), True), (float("inf"), True)])
def test_worse_is_more_than_two_percent(fused, worse):
    assert Comparison(1, fused, 0.5, "").is_worse is worse
