from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from intrafusion.lab.data.dataset import Dataset
from intrafusion.lab.data.sources import digits
from intrafusion.lab.errors import LabError
from intrafusion.lab.measure import evaluate
from intrafusion.lab.recipe.sections import FinetuneSection, TrainSection
from intrafusion.lab.training import finetune_, train_
from intrafusion.lab.weights import digest
from intrafusion.models import DigitsCNN
from intrafusion.training.loop import History
from intrafusion.training.settings import Training

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


def test_an_interrupted_training_ends_bit_for_bit_where_a_whole_one_does(tmp_path: Path) -> None:
    settings = TrainSection(epochs=3, augmentation="crop_flip", batch_size=200)
    expected = digest(trained(settings))

    class Cut(Exception):
        pass

    @dataclass(frozen=True)
    class Failing(Dataset):
        """Digits that cannot be read in the third epoch."""

        def batches(self, *args: Any, **kwargs: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            passes.append(args)
            if len(passes) == 3:
                raise Cut
            return super().batches(*args, **kwargs)

    passes: list[Any] = []
    plain = digits()
    data = Failing(**{item.name: getattr(plain, item.name) for item in fields(Dataset)})
    path = tmp_path / "dense.pt"
    for error in (pytest.raises(Cut), nullcontext()):
        torch.manual_seed(0)
        model = DigitsCNN(widths=(8, 8, 8))
        with error:
            train_(model, data, settings, checkpoint=path, progress=False)
    assert len(passes) == 4
    assert digest(model) == expected


def test_every_setting_reaches_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def fit_(model: Any, batches: Any, training: Training, **_: Any) -> History:
        given.extend([training, batches])
        return History((0.0,), (), 1)

    monkeypatch.setattr("intrafusion.lab.training.fit_", fit_)
    chosen = {
        "epochs": 3, "lr": 0.1, "optimizer": "adamw", "momentum": 0.5, "weight_decay": 0.1, "schedule": "step",
        "warmup_epochs": 0.5, "label_smoothing": 0.1, "amp": "bf16", "accumulate": 2, "clip_norm": 1.0, "ema": 0.9,
        "channels_last": True, "seed": 7,
    }  # fmt: skip
    train_(DigitsCNN(widths=(2, 2, 2)), digits(), TrainSection(**chosen, batch_size=100, augmentation="flip"))
    assert given[0] == Training(**chosen)
    assert len(given[1]) == math.ceil(len(digits().split("train")) / 100)
    assert {item.name for item in fields(Training)} == set(chosen)


def test_fine_tuning_reports_test_accuracy_where_it_was_asked_for_and_keeps_the_best_epoch() -> None:
    torch.manual_seed(0)
    model, data = DigitsCNN(widths=(8, 8, 8)), digits(validation=0.3)
    history = finetune_(model, data, FinetuneSection(epochs=4, lr=0.05, at=(1, 3)), seed=0, progress=False)
    assert [sorted(score) for score in history.scores] == [
        ["validation"], ["test", "validation"], ["validation"], ["test", "validation"], ["validation"]
    ]  # fmt: skip
    assert evaluate(model, data, "validation").percent == max(history.validation) == history.validation[history.best]


def test_a_teacher_is_used_only_if_asked_for() -> None:
    found = []
    for teacher in (False, True):
        torch.manual_seed(0)
        model, dense = DigitsCNN(widths=(4, 4, 4)), DigitsCNN(widths=(8, 8, 8)).eval()
        section = FinetuneSection(epochs=1, teacher=teacher)
        found.append(finetune_(model, digits(), section, seed=0, teacher=dense, progress=False).losses)
    assert found[0] != found[1]


def test_half_precision_without_a_gpu_is_an_error_that_names_the_section() -> None:
    with pytest.raises(LabError, match=r"train: amp='fp16' needs a GPU"):
        trained(TrainSection(epochs=1, amp="fp16"))


def test_divergence_is_an_error() -> None:
    with pytest.raises(LabError, match=r"training diverged in epoch \d.*lower train\.lr \(1e\+12\)"):
        trained(TrainSection(epochs=3, lr=1e12, momentum=0.0))
