from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from intrafusion.lab.data import digits
from intrafusion.lab.measure import Accuracy, count_macs, count_parameters, evaluate, hits
from intrafusion.lab.models import DigitsCNN, build_model


def test_accuracy_does_not_depend_on_the_batch_size() -> None:
    torch.manual_seed(0)
    model, data = DigitsCNN(), digits()
    results = {evaluate(model, data, batch_size=size) for size in (7, 100, 538, 10_000)}
    assert len(results) == 1
    assert results.pop().total == 539


def test_accuracy_is_that_of_the_split() -> None:
    data = digits()
    constant = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.zeros_(constant[1].weight)
    with torch.no_grad():
        constant[1].bias.copy_(torch.eye(10)[3])
    for split in ("train", "validation", "test"):
        expected = int((data.split(split).labels == 3).sum())
        assert evaluate(constant, data, split).correct == expected
        assert torch.equal(hits(constant, data, split, batch_size=100), data.split(split).labels == 3)


def test_modes_are_given_back() -> None:
    model = DigitsCNN().train()
    model.features[1].eval()
    before = [module.training for module in model.modules()]
    evaluate(model, digits(), "validation")
    assert [module.training for module in model.modules()] == before


def test_evaluating_leaves_the_data_usable_for_training() -> None:
    data, model = digits(), DigitsCNN()
    evaluate(model, data, "train")
    images, _ = next(data.batches("train", 4))
    model(images).sum().backward()


def test_percent() -> None:
    assert str(Accuracy(877, 1000)) == "87.70 %"
    assert math.isnan(Accuracy(0, 0).percent)


def test_counts_of_known_networks() -> None:
    assert count_parameters(build_model("cifar_resnet20")) == 269_722
    layer = nn.Conv2d(3, 5, 3, padding=1)
    assert count_macs(layer, torch.zeros(1, 3, 8, 8)) == 5 * 3 * 9 * 64
    assert count_macs(nn.Linear(7, 11), torch.zeros(1, 7)) == pytest.approx(77)
