from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from intrafusion.lab.errors import LabError
from intrafusion.lab.measure import evaluate
from intrafusion.lab.models import DigitsCNN
from intrafusion.lab.sections import TrainSection
from intrafusion.lab.sources import digits
from intrafusion.lab.training import train_
from intrafusion.lab.weights import digest

QUICK = TrainSection(epochs=2)


def trained(settings: TrainSection) -> DigitsCNN:
    torch.manual_seed(0)
    model = DigitsCNN(widths=(8, 8, 8))
    train_(model, digits(), settings)
    return model


def test_training_learns_and_ends_in_eval_mode() -> None:
    model = trained(QUICK)
    assert evaluate(model, digits(), "validation").percent > 50
    assert not model.training


def test_the_seed_decides_everything() -> None:
    first = digest(trained(QUICK))
    torch.rand(17)
    assert digest(trained(QUICK)) == first
    assert digest(trained(replace(QUICK, seed=1))) != first


def test_the_global_random_state_is_left_alone() -> None:
    model, data = DigitsCNN(widths=(2, 2, 2)), digits()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_(model, data, replace(QUICK, epochs=1))
    assert torch.equal(torch.rand(3), expected)


def test_divergence_is_an_error() -> None:
    with pytest.raises(LabError, match=r"training diverged in epoch \d.*lower train\.lr \(1e\+12\)"):
        trained(TrainSection(epochs=3, lr=1e12, momentum=0.0))
