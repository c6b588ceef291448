"""The noise of stochastic gradients: how strongly the settings of training weigh it, and how large it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.training.settings import Training

HELD_OUT_BATCHES, HELD_OUT_IMAGES = 4, 16
"""How many batches, of how many images each, the covariance of the gradient is measured on."""


@dataclass(frozen=True)
class NoisyEpoch:
    """The noise of one epoch.

    Attributes:
        epoch: from 1 on.
        lr: mean learning rate over the epoch's steps.
        scale: mean over its steps of what :class:`NoiseHistory` defines.
        trace: tr Sigma after the epoch, see :func:`gradient_trace`; ``None`` where it was not measured or not finite.
    """

    epoch: int
    lr: float
    scale: float
    trace: float | None = None


@dataclass(frozen=True)
class NoiseHistory:
    """How noisy a training was, epoch by epoch.

    Attributes:
        definition: ``"lr / (batch (1 - momentum))"`` for SGD, with or without Nesterov's momentum; ``"lr / batch"`` for
            Adam and AdamW, whose steps depend on the gradients' own size, so that no such factor exists. A batch is
            all images of one update. ``docs/noise_scale.md`` derives it.
        weight_decay: of the optimizer.
        augmentation: by its name, where one is known.
        epochs: one entry per epoch.
    """

    definition: str
    weight_decay: float
    augmentation: str = ""
    epochs: tuple[NoisyEpoch, ...] = ()

    def plain(self) -> dict[str, Any]:
        """As plain values, which :meth:`from_plain` reads."""
        return asdict(self)

    @classmethod
    def from_plain(cls, entry: Mapping[str, Any]) -> NoiseHistory:
        """The inverse of :meth:`plain`."""
        return cls(**{**entry, "epochs": tuple(NoisyEpoch(**epoch) for epoch in entry["epochs"])})


def definition(training: Training) -> str:
    """What :func:`noise_scale` computes for these settings, in words."""
    return "lr / (batch (1 - momentum))" if training.optimizer == "sgd" else "lr / batch"


def noise_scale(training: Training, lr: float, images: int) -> float:
    """The factor of tr Sigma in the noise of a step with learning rate ``lr`` on ``images`` images."""
    momentum = training.momentum if training.optimizer == "sgd" else 0.0
    return lr / (images * (1 - momentum))


def gradient_trace(
    model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
) -> float:
    """Unbiased estimate of tr Sigma, the sum over parameters of the variance of one image's gradient.

    From m batches of b images each: with g_i the gradient of a batch and g their mean, tr Sigma is estimated by
    ``b / (m - 1) sum_i |g_i - g|²``. It is what McCandlish et al. (2018), "An Empirical Model of Large-Batch Training",
    appendix A.1, obtain from gradients of small batches, b, and of one large batch, m b.

    The network answers in eval mode, where the gradient of a batch is the mean of its images' own. Its ``.grad``,
    buffers and modes are left as they are.

    Args:
        batches: at least 2 of equal size, ``(inputs [b, ...], labels [b])``, of independent images.
        loss: ``(model, inputs, labels) -> mean loss``.

    Raises:
        ValueError: fewer than two batches, or of different sizes.
    """
    sizes = {len(labels) for _, labels in batches}
    if len(batches) < 2 or len(sizes) > 1:
        raise ValueError(f"a covariance needs at least 2 batches of one size, not {[len(y) for _, y in batches]}")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    squares = 0.0
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for inputs, labels in batches:
            with torch.enable_grad():
                gradients = torch.autograd.grad(loss(model, inputs, labels), parameters, allow_unused=True)
            for total, gradient in zip(totals, gradients, strict=True):
                if gradient is not None:
                    total += gradient
                    squares += _square(gradient)
    finally:
        for module, mode in modes:
            module.training = mode
    count, size = len(batches), sizes.pop()
    return max(0.0, size / (count - 1) * (squares - sum(map(_square, totals)) / count))


def held_out_batches(batches: Iterable[Any]) -> list[tuple[Tensor, Tensor]]:
    """The first images of some batches, as :func:`gradient_trace` takes them; empty if there are too few for two."""
    wanted = HELD_OUT_BATCHES * HELD_OUT_IMAGES
    inputs, labels, found = [], [], 0
    for images, targets, *_ in batches:
        inputs.append(images[: wanted - found])
        labels.append(targets[: wanted - found])
        found += len(labels[-1])
        if found >= wanted:
            break
    size = min(HELD_OUT_IMAGES, found // HELD_OUT_BATCHES)
    if size == 0:
        return []
    parts = [torch.cat(tensors)[: size * HELD_OUT_BATCHES].split(size) for tensors in (inputs, labels)]
    return list(zip(*parts, strict=True))


def _square(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().sum())
