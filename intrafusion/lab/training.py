"""A plain, seeded training loop: SGD with momentum and a cosine schedule."""

from __future__ import annotations

import logging
import math

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from intrafusion.lab.data import Dataset
from intrafusion.lab.errors import LabError
from intrafusion.lab.sections import TrainSection

_log = logging.getLogger(__name__)


def train_(model: nn.Module, data: Dataset, settings: TrainSection, *, progress: bool = True) -> float:
    """Train ``model`` in place on the ``train`` split, leave it in eval mode and return the last epoch's mean loss.

    The order of the images depends on ``settings.seed`` alone. Nothing is selected on any split.

    Raises:
        LabError: the loss is no longer finite.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    optimiser = torch.optim.SGD(
        model.parameters(),
        settings.lr,
        settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=settings.momentum > 0,
    )
    steps = settings.epochs * -(-len(data.split("train")) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
    device = next(model.parameters()).device
    model.train()
    bar = tqdm(total=steps, desc="train", unit=" steps", delay=1, leave=False, disable=None if progress else True)
    mean = math.nan
    with bar, torch.enable_grad():
        for epoch in range(settings.epochs):
            losses: list[float] = []
            for images, labels in data.batches("train", settings.batch_size, generator=generator, device=device):
                loss = F.cross_entropy(model(images), labels)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
                losses.append(loss.item())
                bar.update()
            mean = sum(losses) / len(losses)
            if not math.isfinite(mean):
                raise LabError(
                    f"training diverged in epoch {epoch + 1} (loss {mean}); lower train.lr ({settings.lr:g})"
                )
            bar.set_postfix(epoch=epoch + 1, loss=f"{mean:.4f}")
    model.eval()
    _log.info("trained %d epochs, last mean loss %.4f", settings.epochs, mean)
    return mean
