"""Training and fine-tuning as a recipe's sections say, on the images of a data set."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from intrafusion.finetuning import distillation
from intrafusion.lab.augmentation import augmentation
from intrafusion.lab.data import Dataset
from intrafusion.lab.errors import LabError
from intrafusion.lab.measure import evaluate
from intrafusion.lab.sections import FinetuneSection, OptimisationSection, TrainSection
from intrafusion.surgery.batchnorm import recenter_batchnorms_
from intrafusion.training_loop import DivergedError, History, fit_
from intrafusion.training_settings import Training
from intrafusion.training_state import digest

_log = logging.getLogger(__name__)
_RECENTRED_ON = 1000


@dataclass(frozen=True)
class TrainingImages:
    """The ``train`` split in batches, in a new order every time it is gone through.

    generator: what decides the order; part of what an interrupted training is resumed from.
    """

    data: Dataset
    settings: OptimisationSection
    generator: torch.Generator
    device: torch.device

    def __len__(self) -> int:
        return -(-len(self.data.split("train")) // self.settings.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.data.batches(
            "train",
            self.settings.batch_size,
            generator=self.generator,
            device=self.device,
            augment=augmentation(self.settings.augmentation),
        )


def train_(
    model: nn.Module, data: Dataset, settings: TrainSection, *, checkpoint: Path | None = None, progress: bool = True
) -> float:
    """Train ``model`` in place on the ``train`` split, leave it in eval mode and return the last epoch's mean loss.

    The order of the images depends on ``settings.seed`` alone. Nothing is selected on any split.

    Args:
        data: anything with the ``split``, ``batches`` and ``digest`` of a :class:`Dataset`.
        checkpoint: file that an interrupted training goes on from; see :func:`intrafusion.training_loop.fit_`. It is
            left there: remove it when the weights are safe.

    Raises:
        LabError: the loss is no longer finite, or the settings do not fit the device.
    """
    history = _fit_(model, data, settings, settings.seed, "train", checkpoint=checkpoint, progress=progress)
    _log.info("trained %d epochs, last mean loss %.4f", settings.epochs, history.losses[-1])
    return history.losses[-1]


def finetune_(
    model: nn.Module, data: Dataset, settings: FinetuneSection, *, seed: int, teacher: nn.Module | None = None,
    checkpoint: Path | None = None, progress: bool = True,
) -> History:  # fmt: skip
    """Fine-tune a pruned ``model`` in place and leave it in eval mode, at its best epoch on the ``validation`` split.

    The scores of the history are ``validation``, an accuracy in per cent, after every epoch, and ``test``, a number of
    images, after the epochs of ``settings.at``; nothing is chosen on it.

    Args:
        teacher: the dense network, used if ``settings.teacher`` is set.
        seed: one of ``settings.seeds``. The rest as in :func:`train_`.

    Raises:
        LabError: as :func:`train_`.
    """

    def scores(network: nn.Module, epoch: int) -> dict[str, float]:
        found = {"validation": evaluate(network, data, "validation", progress=False).percent}
        if epoch in settings.at:
            found["test"] = evaluate(network, data, "test", progress=False).correct
        return found

    if settings.recenter:
        recenter_batchnorms_(model, data.draw("train", _RECENTRED_ON, seed=seed))
    objective, key = None, ""
    if teacher is not None and settings.teacher:
        objective = distillation(teacher, settings.temperature, settings.alpha, settings.label_smoothing)
        key = digest(teacher, repr((settings.temperature, settings.alpha)))
    return _fit_(
        model, data, settings, seed, "finetune", objective=objective, evaluation=scores,
        checkpoint=checkpoint, key=f"{key}{settings.at}{data.digest('validation')}", progress=progress,
    )  # fmt: skip


def _fit_(
    model: nn.Module, data: Dataset, settings: OptimisationSection, seed: int, section: str, *, key: str = "",
    **options,
) -> History:  # fmt: skip
    device = next(model.parameters()).device
    images = TrainingImages(data, settings, torch.Generator().manual_seed(seed), device)
    shared = {item.name for item in fields(Training)} & {item.name for item in fields(OptimisationSection)}
    training = Training(seed=seed, **{name: getattr(settings, name) for name in shared})
    key = f"{key}{data.digest('train')}{settings.batch_size}{settings.augmentation}"
    try:
        return fit_(model, images, training, key=key, title=section, **options)
    except DivergedError as error:
        raise LabError(
            f"training diverged in epoch {error.epoch} (loss {error.loss}); lower {section}.lr ({settings.lr:g})"
        ) from None
    except ValueError as error:
        raise LabError(f"{section}: {error}") from None
