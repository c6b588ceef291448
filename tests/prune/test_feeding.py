"""What a network is fed with is tried first: objects it gives, lists it takes, batches that it does not run on."""

from __future__ import annotations

import copy
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from intrafusion import IntraFusionPruner
from tests.prune.test_bad_input import assert_unchanged, state

PRESETS = ("discard", "paper", "data-free", "calibrated")


def l1():
    return tp.importance.GroupMagnitudeImportance(p=1)


@dataclass
class Decoded:
    sample: torch.Tensor
    steps: int = 3


class Holding:
    def __init__(self, logits):
        self.logits, self.hidden = logits, None


Pair = namedtuple("Pair", "scores boxes")


class Net(nn.Module):
    """Two layers to prune and one to ignore, whatever goes in and comes out."""

    def __init__(self, take=lambda *x: x[0], give=lambda y: y):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 2, 1)
        self.take, self.give = take, give

    def forward(self, *args, **kwargs):
        return self.give(self.c(self.b(self.a(self.take(*args, **kwargs)).relu()).relu()))


def pruned(model, example, fusion, batches, **more):
    if fusion == "calibrated":
        more["calibration"] = batches
    pruner = IntraFusionPruner(model.eval(), example, l1(), ignored_layers=[model.c], fusion=fusion, **more)
    pruner.progress = False
    pruner.step()
    return pruner


x = torch.rand(24, 3, 6, 6)


@pytest.mark.filterwarnings("ignore::intrafusion.prune.twin.WorseThanCut")
@pytest.mark.parametrize("fusion", PRESETS)
@pytest.mark.parametrize(
    ("give", "transform"),
    [
        (Decoded, lambda out: out.sample),
        (Decoded, None),
        (Holding, None),
        (lambda y: Pair(y, [y + 1, None]), None),
        (lambda y: Holding({"deep": Decoded(y)}), lambda out: out.logits),
    ],
)
def test_whatever_object_holds_the_output_it_is_checked_and_corrected(give, transform, fusion):
    torch.manual_seed(0)
    model = Net(give=give)
    plain = Net()
    plain.load_state_dict(model.state_dict())
    pruner = pruned(model, x[:2], fusion, [x], output_transform=transform)
    assert fusion == "discard" or len(pruner.report.fused) == 2
    pruned(plain, x[:2], fusion, [x])
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


def test_an_output_without_tensors_asks_for_a_transform():
    model = Net(give=lambda y: str(y))
    with pytest.raises(ValueError, match="gives no tensor for example_inputs: give output_transform="):
        IntraFusionPruner(model, x[:2], l1(), ignored_layers=[model.c])


def images(n):
    return list(torch.rand(n, 3, 6, 6))


TAKEN = {  # how the network takes its inputs, an example, batches
    "list": (lambda images: torch.stack([(i - 0.4) / 0.2 for i in images]), (images(2),), lambda: (images(6),)),
    "bare list": (lambda images: torch.stack(list(images)), images(2), lambda: images(6)),
    "dictionary": (lambda pixels, flag: pixels * flag, {"pixels": x[:2], "flag": 2}, lambda: {"pixels": x, "flag": 2}),
    "nested": (
        lambda inputs: inputs["views"][0] + inputs["views"][1],
        ({"views": (x[:2], x[:2])},),
        lambda: ({"views": (x, x.flip(0))},),
    ),
}


@pytest.mark.filterwarnings("ignore::intrafusion.prune.twin.WorseThanCut")
@pytest.mark.parametrize("name", TAKEN)
def test_what_is_taken_as_example_is_taken_as_a_calibration_batch(name):
    take, example, batch = TAKEN[name]
    torch.manual_seed(0)
    dense = Net(take).eval()
    model = copy.deepcopy(dense)
    pruner = pruned(model, example, "calibrated", [batch() for _ in range(4)])
    assert len(pruner.report.fused) == 2
    cut = copy.deepcopy(dense)
    pruned(cut, example, "discard", None)
    given = batch()

    def run(network):
        if isinstance(given, dict):
            return network(**given)
        return network(given) if name == "bare list" else network(*given)

    wanted = run(dense)
    assert (run(model) - wanted).norm() < 0.8 * (run(cut) - wanted).norm()


labelled = DataLoader(TensorDataset(x, torch.arange(24)), 8)
WRONG = {
    r"batch 0 \(2 tensors: float32 \[8, 3, 6, 6\], int64 \[8\]\) does not run: .*; give inputs without": labelled,
    r"batch 0 \(1 tensor: uint8 .*does not run: .*in the dtype and the range .*example inputs are 1 tensor: float32": [
        (x * 255).byte()
    ],
    r"is one tensor of shape \[24, 3, 6, 6\], but an iterable of batches": x,
    r"batch 0 \(1 tensor: float32 \[3, 6, 6\]\) is a single input where a batch of them is meant": list(x),
    r"batch 0 .* does not run: .*channels": [torch.rand(4, 5, 6, 6)],
}


class Plain(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))


@pytest.mark.parametrize("message", WRONG)
def test_a_batch_that_does_not_run_is_named_by_the_constructor_with_what_may_be_wrong(message):
    model = Plain().train()
    before = state(model)
    with pytest.raises((ValueError, TypeError), match=f"calibration {message}"):
        IntraFusionPruner(
            model, x[:2], l1(), ignored_layers=[model[-1]], fusion="calibrated", calibration=WRONG[message]
        )
    assert_unchanged(model, before)
    assert all(module.training for module in model.modules())


def test_an_example_that_does_not_run_is_named_too():
    model = Plain()
    with pytest.raises(
        ValueError, match=r"does not run on example_inputs \(1 tensor: float32 \[2, 5, 6, 6\]\): Runtime"
    ):
        IntraFusionPruner(model, torch.rand(2, 5, 6, 6), l1())


def test_the_example_may_have_been_made_under_inference_mode():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with torch.inference_mode():
        example = torch.randn(1, 3, 8, 8)
    IntraFusionPruner(model, example, l1(), ignored_layers=[model[2]], fusion="discard").step()
    assert model[0].out_channels == 4
