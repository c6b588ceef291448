"""Fine-tuning of a pruned network, with the dense one as its teacher if there is one."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from intrafusion.groups.batchnorm import recenter_batchnorms_
from intrafusion.training.loop import Batches, History, Objective, fit_
from intrafusion.training.seeds import seeded
from intrafusion.training.settings import Training
from intrafusion.training.state import copied, digest

_RECENTRED_ON = 1000


def finetune(
    model: nn.Module, train: Batches, training: Training | None = None, *, validation: Batches | None = None,
    teacher: nn.Module | None = None, temperature: float = 4.0, alpha: float = 0.9, recenter: bool = False,
    checkpoint: Path | str | None = None, progress: bool = True, **settings: Any,
) -> History:  # fmt: skip
    """Fine-tune a classifier in place: ``finetune(pruned, loader, validation=held_out, epochs=3, lr=0.01)``.

    The network ends in eval mode, at the epoch with the best validation accuracy (epoch 0, as it was given, included),
    or at the last epoch without ``validation``. Nothing is ever chosen on other data, so take ``validation`` from the
    training images, never from the test images.

    Args:
        model: on its device; only parameters that require a gradient are trained.
        train: batches ``(inputs [B, ...], labels int64 [B])`` that can be gone through once per epoch: a ``DataLoader``
            or a list. Random transforms and shuffling that draw from torch's generators are seeded.
        training: settings; see :class:`Training` for every field.
        validation: batches like ``train``. On its first 64 images the noise of the gradient is measured after every
            epoch, for ``History.noise``; they should be in no order of classes.
        teacher: usually the dense network, put in eval mode; its softened logits are learnt too (Hinton, Vinyals and
            Dean, 2015): ``alpha T² KL(teacher || model) + (1 - alpha) cross-entropy``, with logits divided by ``T``.
        temperature: T, above 0.
        alpha: weight of the teacher, in [0, 1].
        recenter: first give the batch-norms the statistics of about 1,000 training images, so that training starts
            from the very function that the network computes in eval mode; see
            :func:`intrafusion.recenter_batchnorms_` for when not to.
        checkpoint: file from which an interrupted call with the same arguments goes on after its last finished
            epoch. It is not removed.
        progress: show a bar (on a terminal only).
        **settings: fields of :class:`Training`, over ``training``.

    Returns:
        Per epoch the mean training loss, the validation accuracy in per cent and the noise of the gradient, and which
        epoch was best.

    Raises:
        ValueError: a setting is out of range, or the network has nothing to train.
        TypeError: an unknown setting, or batches that cannot be gone through twice.
        DivergedError: the loss is no longer finite. After any error the network is as it was given.
    """
    if temperature <= 0 or not 0 <= alpha <= 1:
        raise ValueError(f"temperature is {temperature} and alpha is {alpha}: they must be above 0 and in [0, 1]")
    for name, batches in (("train", train), ("validation", validation)):
        if batches is not None and not (hasattr(batches, "__len__") and hasattr(batches, "__iter__")):
            raise TypeError(f"{name} is a {type(batches).__name__}: give a DataLoader, or a list of batches")
    chosen = replace(training or Training(), **settings)
    objective = None if teacher is None else distillation(teacher, temperature, alpha, chosen.label_smoothing)
    key = "" if teacher is None else digest(teacher, repr((temperature, alpha)))
    before = copied(model.state_dict())
    modes = [(module, module.training) for module in model.modules()]
    try:
        if recenter:
            with seeded(chosen.seed, chosen.epochs, next(model.parameters()).device):
                recenter_batchnorms_(model, _first_images(train, _RECENTRED_ON))
        return fit_(
            model,
            train,
            chosen,
            objective=objective,
            evaluation=None if validation is None else lambda net, _: {"validation": accuracy(net, validation)},
            held_out=validation,
            checkpoint=None if checkpoint is None else Path(checkpoint),
            key=key,
            progress=progress,
            title="fine-tune",
        )
    except Exception:
        model.load_state_dict(before)
        model.zero_grad(set_to_none=True)
        for module, mode in modes:
            module.training = mode
        raise


def distillation(teacher: nn.Module, temperature: float, alpha: float, label_smoothing: float = 0.0) -> Objective:
    """The loss of Hinton et al. (2015), section 2: ``alpha T² KL(teacher || model) + (1 - alpha) cross-entropy``.

    The teacher answers in eval mode; the factor T² keeps the size of its gradients where that of the labels is.
    """

    def loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = teacher(inputs).float() / temperature
        logits = model(inputs)
        told = F.log_softmax(logits.float() / temperature, dim=1)
        distance = F.kl_div(told, F.log_softmax(wanted, dim=1), reduction="batchmean", log_target=True)
        own = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        return alpha * temperature**2 * distance + (1 - alpha) * own

    teacher.eval()
    return loss


def accuracy(model: nn.Module, batches: Batches) -> float:
    """Per cent of the images whose label has the largest logit: correct / total."""
    device = next(model.parameters()).device
    correct = total = 0
    with torch.no_grad():
        for inputs, labels in batches:
            correct += int((model(inputs.to(device)).argmax(1) == labels.to(device)).sum())
            total += len(labels)
    if total == 0:
        raise ValueError("there are no validation batches")
    return 100 * correct / total


def _first_images(batches: Batches, count: int) -> list[Tensor]:
    """The inputs of as many batches as hold ``count`` of them."""
    iterator = iter(batches)
    found = [next(iterator)[0]]
    return found + [inputs for inputs, _ in islice(iterator, -(-count // len(found[0])) - 1)]
