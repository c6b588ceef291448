from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from intrafusion.lab.data.sources import digits
from intrafusion.lab.measure import (
    Accuracy,
    count_macs,
    count_parameters,
    evaluate,
    hits,
    measure_latency,
    peak_memory,
    places,
    size_on_disk,
)
from intrafusion.lab.models import build_model
from intrafusion.lab.weights import save_weights
from intrafusion.models import DigitsCNN


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


def test_the_place_of_the_label_is_how_many_classes_come_before_it() -> None:
    class Fixed(nn.Linear):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.weight.expand(len(images), -1)

    labels = digits().split("test").labels
    model = Fixed(10, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.arange(10).flip(0))
    assert torch.equal(places(model, digits()), labels)
    nn.init.zeros_(model.weight)  # equal logits: the first class, not every class
    assert torch.equal(places(model, digits()), labels)
    nn.init.constant_(model.weight, float("nan"))
    assert torch.equal(hits(model, digits()), labels == 0)


def test_attention_is_counted_whichever_kernel_computes_it() -> None:
    tokens, width = 6, 8
    layer = nn.TransformerEncoderLayer(width, nhead=2, dim_feedforward=16, batch_first=True)
    projections, products, mlp = 4 * width * width, 2 * tokens * width, 2 * width * 16
    for training in (True, False):
        assert count_macs(layer.train(training), torch.zeros(1, tokens, width)) == tokens * (
            projections + products + mlp
        )
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_size_is_that_of_the_file_even_with_tied_weights(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 5))
    model[2].weight = model[0].weight
    save_weights(model, tmp_path / "w.safetensors")
    assert size_on_disk(model) == (tmp_path / "w.safetensors").stat().st_size > 4 * 25 * 2


def test_latency_is_positive_and_says_how_it_was_taken() -> None:
    model = DigitsCNN().eval()
    one, many = (measure_latency(model, torch.zeros(1, 1, 8, 8), batch) for batch in (1, 64))
    assert 0 < one.median < many.median
    assert min(one.iqr, many.iqr) >= 0
    assert (one.batch, one.threads, many.batch) == (1, 1, 64)
    assert one.device


def test_memory_of_a_processor_is_not_measured() -> None:
    assert peak_memory(DigitsCNN(), torch.zeros(1, 1, 8, 8)) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_memory_of_a_gpu_holds_at_least_the_largest_activation() -> None:
    layer = nn.Conv2d(3, 64, 3, padding=1).cuda()
    assert (peak_memory(layer, torch.zeros(1, 3, 32, 32, device="cuda"), 8) or 0) >= 8 * 64 * 32 * 32 * 4
