"""intrafusion.finetune from plain Python: a pruned pico network, loaders, a teacher."""

from __future__ import annotations

import copy
import math
from functools import cache
from pathlib import Path

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import intrafusion
from intrafusion import DivergedError, History, IntraFusionPruner, Training, finetune
from intrafusion.training.finetuning import accuracy, distillation
from tests.nets import PICO, Plain, randomise_

pytestmark = pytest.mark.filterwarnings("ignore:Unwrapped parameters")


def data(count: int = 96, seed: int = 0) -> TensorDataset:
    """Noise with one brighter quarter, which is the class."""
    x = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    y = torch.arange(count) % 4
    bright = F.one_hot(y, 4).view(count, 1, 2, 2).float()
    return TensorDataset(x + F.interpolate(bright, scale_factor=4), y)


def pruned(fusion: str = "data-free") -> tuple[nn.Module, nn.Module]:
    """A dense network, and it with half of its channels."""
    return copy.deepcopy(_pruned(fusion))


@cache
def _pruned(fusion: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    dense = randomise_(Plain())
    model = randomise_(Plain())
    model.load_state_dict(dense.state_dict())
    metric = tp.importance.GroupMagnitudeImportance(p=1)
    IntraFusionPruner(
        model, torch.randn(2, 3, 8, 8), metric, pruning_ratio=0.5, ignored_layers=[model.fc2], fusion=fusion
    ).step()
    return dense, model


def loader(seed: int = 0) -> DataLoader:
    return DataLoader(data(seed=seed), 16, shuffle=True)


def test_a_pruned_network_learns_and_is_left_at_its_best_validation_epoch() -> None:
    _, model = pruned()
    held_out = list(DataLoader(data(seed=1), 32))
    start = accuracy(model, held_out)
    history = finetune(model, loader(), validation=held_out, epochs=6, lr=0.05, progress=False)
    assert isinstance(history, History)
    assert history.validation[0] == start
    assert len(history.validation) == 7
    assert len(history.losses) == 6
    assert history.losses[-1] < history.losses[0]
    assert max(history.validation) == history.validation[history.best] == accuracy(model, held_out) > start
    assert not model.training


def test_settings_may_be_an_object_or_names_and_mean_the_same() -> None:
    found = []
    for arguments in ({"training": Training(epochs=2, lr=0.02)}, {"epochs": 2, "lr": 0.02}):
        _, model = pruned()
        found.append(finetune(model, loader(), progress=False, **arguments))
    assert found[0] == found[1]
    assert found[0].best == 2


def test_finetune_is_the_function() -> None:
    assert callable(intrafusion.finetune)
    assert intrafusion.finetune.__name__ == "finetune"


def test_a_weightless_teacher_is_no_teacher() -> None:
    found = []
    for arguments in ({}, {"teacher": pruned()[0], "alpha": 0.0}):
        _, model = pruned()
        found.append(finetune(model, loader(), epochs=1, progress=False, **arguments).losses[0])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_distillation_is_the_loss_of_the_paper() -> None:
    torch.manual_seed(3)
    teacher, student, x, y = nn.Linear(5, 4), nn.Linear(5, 4), torch.randn(7, 5), torch.randint(4, (7,))
    wanted, told = (F.softmax(net(x) / 3, 1) for net in (teacher, student))
    by_hand = 0.7 * 9 * (wanted * (wanted / told).log()).sum(1).mean() + 0.3 * F.cross_entropy(student(x), y)
    loss = distillation(teacher, 3.0, 0.7)(student, x, y)
    assert torch.allclose(loss, by_hand, atol=1e-6)
    loss.backward()
    assert teacher.weight.grad is None
    assert student.weight.grad is not None
    # Its least value is the teacher itself, where the gradient of its part is zero.
    student.load_state_dict(teacher.state_dict())
    student.zero_grad()
    distillation(teacher, 3.0, 1.0)(student, x, y).backward()
    assert student.weight.grad.abs().max().item() < 1e-6


def test_a_network_learns_from_its_teacher_alone() -> None:
    dense, model = pruned("discard")
    unlabelled = [(x, torch.zeros(len(x), dtype=torch.long)) for x, _ in loader()]

    def gap() -> float:
        with torch.no_grad():
            return sum(F.mse_loss(model(x).softmax(1), dense(x).softmax(1)).item() for x, _ in unlabelled)

    before = gap()
    finetune(model, unlabelled, teacher=dense, alpha=1.0, temperature=2.0, epochs=8, lr=0.02, progress=False)
    assert gap() < 0.5 * before


@pytest.mark.parametrize("case", PICO, ids=lambda case: case.name)
def test_every_kind_of_network_can_be_fine_tuned(case) -> None:
    model, x = case.model(), case.example()
    metric = tp.importance.GroupMagnitudeImportance(p=1)
    IntraFusionPruner(model, x, metric, pruning_ratio=0.5, ignored_layers=case.ignored(model)).step()
    batches = [(torch.cat([x] * 4), torch.arange(8) % 4)] * 2
    history = finetune(model, batches, epochs=2, lr=0.001, ema=0.5, recenter=True, teacher=case.model(), progress=False)
    assert all(math.isfinite(loss) for loss in history.losses)


def test_an_interrupted_call_goes_on_after_its_last_epoch(tmp_path: Path) -> None:
    class Cut(Exception):
        pass

    class Loader(DataLoader):
        left = 2

        def __iter__(self):
            if self.left == 0:
                raise Cut
            Loader.left -= 1
            return super().__iter__()

    def call(batches, path=None):
        dense, model = pruned()
        arguments = {"teacher": dense, "epochs": 4, "ema": 0.9, "recenter": False, "progress": False}
        return finetune(model, batches, checkpoint=path, **arguments), model.state_dict()

    expected = call(loader())
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(Cut):
        call(Loader(data(), 16, shuffle=True), path)
    Loader.left = 2  # two epochs are enough for the rest
    history, found = call(Loader(data(), 16, shuffle=True), path)
    assert history == expected[0]
    assert all(torch.equal(found[name], expected[1][name]) for name in found)


def test_after_an_error_the_network_is_as_it_was() -> None:
    _, model = pruned()
    model.bn1.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(DivergedError):
        finetune(model, loader(), epochs=2, lr=1e30, recenter=True, channels_last=True, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.bn1.training
    assert not model.bn3.training
    assert model.conv1.weight.is_contiguous()


def test_bad_arguments() -> None:
    _, model = pruned()
    with pytest.raises(TypeError, match="learning_rate"):
        finetune(model, loader(), learning_rate=0.1)
    with pytest.raises(TypeError, match="train is a generator: give a DataLoader, or a list of batches"):
        finetune(model, (batch for batch in loader()))
    with pytest.raises(ValueError, match=r"temperature is 0 and alpha is 0\.9"):
        finetune(model, loader(), teacher=model, temperature=0)
    with pytest.raises(ValueError, match="there are no validation batches"):
        finetune(model, loader(), validation=[], epochs=1)


def test_accuracy_is_correct_over_total() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(2))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    right, wrong = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    batches = [(torch.cat([right] * 3), torch.zeros(3).long()), (wrong, torch.zeros(1).long())]
    assert accuracy(Fixed(), batches) == 75
