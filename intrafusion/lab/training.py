"""Training and fine-tuning as a recipe's sections say, on the images of a data set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from intrafusion.groups.batchnorm import recenter_batchnorms_
from intrafusion.lab import weights
from intrafusion.lab.data.augmentation import augmentation
from intrafusion.lab.data.dataset import Dataset
from intrafusion.lab.errors import LabError
from intrafusion.lab.measure import evaluate
from intrafusion.lab.recipe.sections import FinetuneSection, OptimisationSection, TrainSection
from intrafusion.lab.stopwatch import Stopwatch, times_beside
from intrafusion.training.finetuning import distillation
from intrafusion.training.loop import DivergedError, History, Scheduling, fit_
from intrafusion.training.noise_scale import HELD_OUT_BATCHES, HELD_OUT_IMAGES
from intrafusion.training.processes import ALONE, Processes
from intrafusion.training.settings import Training
from intrafusion.training.state import digest

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
    model: nn.Module, data: Dataset, settings: TrainSection, *, checkpoint: Path | None = None, progress: bool = True,
    processes: Processes = ALONE,
) -> History:  # fmt: skip
    """Train ``model`` in place on the ``train`` split and leave it in eval mode; the history has no scores.

    The order of the images depends on ``settings.seed`` alone. Nothing is selected on any split; the noise of the
    gradient is measured on images of the ``validation`` split.

    Args:
        data: anything with the ``split``, ``batches``, ``draw`` and ``digest`` of a :class:`Dataset`.
        checkpoint: file that an interrupted training goes on from; see :func:`intrafusion.training.loop.fit_`. It is
            left there: remove it when the weights are safe.
        processes: who trains together; see there too.

    Raises:
        LabError: the loss is no longer finite, or the settings do not fit the device.
    """
    history = _fit_(
        model, data, settings, settings.seed, "train", checkpoint=checkpoint, progress=progress, processes=processes
    )
    _log.info("trained %d epochs, last mean loss %.4f", settings.epochs, history.losses[-1])
    return history


def train_once_(
    model: nn.Module, data: Dataset, settings: TrainSection, path: Path, *, key: str, checkpoint: Path,
    progress: bool = True, processes: Processes = ALONE, note: Callable[[History], None] | None = None,
) -> None:  # fmt: skip
    """Give ``model`` the weights kept at ``path``, or train it and keep them there if they are not those of ``key``.

    The file's metadata says the accuracy on the ``validation`` split, and in ``seconds`` how long the training took.

    Args:
        key: stands for everything the weights depend on.
        note: called with the history of a training, before the weights are kept. The rest as in :func:`train_`;
            ``checkpoint`` is removed.

    Raises:
        LabError: as :func:`train_`, or the kept file is damaged.
    """
    if processes.from_main(lambda: weights.read_metadata(path).get("key")) == key:
        weights.load_weights_(model, path)
        return
    watch = Stopwatch(checkpoint)
    history = train_(model, data, settings, checkpoint=checkpoint, progress=progress, processes=processes)
    seconds = watch.seconds()
    held_out = evaluate(model, data, "validation", progress=progress, processes=processes)
    _log.info("validation accuracy of the dense network: %s", held_out)
    facts = {"key": key, "validation": str(held_out), "seconds": f"{seconds:.3f}"}

    def keep() -> None:
        if note is not None:
            note(history)
        weights.save_weights(model, path, facts)
        forget_checkpoint(checkpoint)

    processes.from_main(keep)


def forget_checkpoint(path: Path) -> None:
    """Remove a file that training is resumed from, with its times, and its folder if nothing else is in it."""
    path.unlink(missing_ok=True)
    times_beside(path).unlink(missing_ok=True)
    with suppress(OSError):
        path.parent.rmdir()


def finetune_(
    model: nn.Module, data: Dataset, settings: FinetuneSection, *, seed: int, teacher: nn.Module | None = None,
    checkpoint: Path | None = None, progress: bool = True, processes: Processes = ALONE,
    scheduling: Scheduling | None = None, key: str = "",
) -> History:  # fmt: skip
    """Fine-tune a pruned ``model`` in place and leave it in eval mode, at its best epoch on the ``validation`` split.

    The scores of the history are ``validation``, an accuracy in per cent, after every epoch, and ``test``, a number of
    images, after the epochs of ``settings.at``; nothing is chosen on it.

    Args:
        teacher: the dense network, used if ``settings.teacher`` is set.
        seed: one of ``settings.seeds``.
        scheduling: makes what prunes the network on the way, as ``key`` says; see :func:`fit_`. The rest as in
            :func:`train_`.

    Raises:
        LabError: as :func:`train_`.
    """

    def scores(network: nn.Module, epoch: int) -> dict[str, float]:
        found = {"validation": evaluate(network, data, "validation", progress=False, processes=processes).percent}
        if epoch in settings.at:
            found["test"] = evaluate(network, data, "test", progress=False, processes=processes).correct
        return found

    if settings.recenter:
        recenter_batchnorms_(model, data.draw("train", _RECENTRED_ON, seed=seed))
    objective = None
    if teacher is not None and settings.teacher:
        objective = distillation(teacher, settings.temperature, settings.alpha, settings.label_smoothing)
        key += digest(teacher, repr((settings.temperature, settings.alpha)))
    return _fit_(
        model, data, settings, seed, "finetune", objective=objective, evaluation=scores,
        checkpoint=checkpoint, key=f"{key}{settings.at}{data.digest('validation')}", progress=progress,
        processes=processes, scheduling=scheduling,
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
        held_out = data.draw("validation", HELD_OUT_BATCHES * HELD_OUT_IMAGES, seed=seed)
        history = fit_(model, images, training, held_out=held_out, key=key, title=section, **options)
    except DivergedError as error:
        raise LabError(
            f"training diverged in epoch {error.epoch} (loss {error.loss}); lower {section}.lr ({settings.lr:g})"
        ) from None
    except ValueError as error:
        raise LabError(f"{section}: {error}") from None
    noise = history.noise and replace(history.noise, augmentation=settings.augmentation)
    return replace(history, noise=noise)
