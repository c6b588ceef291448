"""How a network is trained: the settings, and the optimizer and learning rates they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a network is trained.

    Attributes:
        epochs: passes over the training batches, at least 1.
        lr: largest learning rate of the schedule.
        optimizer: ``"sgd"`` (with Nesterov momentum), ``"adam"`` or ``"adamw"``.
        momentum: of SGD, in [0, 1).
        weight_decay: of the optimizer, on every parameter.
        schedule: ``"cosine"`` or ``"linear"`` to zero, ``"step"`` (a tenth after half of the steps, a hundredth after
            three quarters), or ``"constant"``.
        warmup_epochs: the learning rate rises linearly for so long, before the schedule; below ``epochs``.
        label_smoothing: share of the label that is spread over all classes, in [0, 1).
        amp: mixed precision, ``"none"``, ``"bf16"``, or ``"fp16"`` with a scaled loss (on a GPU only).
        accumulate: batches whose gradients make one update, which is that of the one big batch (batch-norms still see
            the small ones).
        clip_norm: the gradient's norm is cut to this.
        ema: decay in (0, 1) of an exponential moving average of weights and batch-norm statistics, updated after every
            step; it is what is evaluated and what the network is in the end.
        channels_last: keep images and weights in that memory format while training.
        seed: of everything random in an epoch, together with the epoch's number.
    """

    epochs: int = 10
    lr: float = 0.01
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0005
    schedule: Literal["cosine", "linear", "step", "constant"] = "cosine"
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    amp: Literal["none", "bf16", "fp16"] = "none"
    accumulate: int = 1
    clip_norm: float | None = None
    ema: float | None = None
    channels_last: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        allowed: Sequence[tuple[str, bool, str]] = (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("lr", self.lr > 0, "above 0"),
            ("optimizer", self.optimizer in ("sgd", "adam", "adamw"), "sgd, adam or adamw"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("schedule", self.schedule in _SHAPES, "cosine, linear, step or constant"),
            ("warmup_epochs", 0 <= self.warmup_epochs < self.epochs, "at least 0 and below epochs"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)"),
            ("amp", self.amp in ("none", "bf16", "fp16"), "none, bf16 or fp16"),
            ("accumulate", self.accumulate >= 1, "at least 1"),
            ("clip_norm", self.clip_norm is None or self.clip_norm > 0, "above 0, or None"),
            ("ema", self.ema is None or 0 < self.ema < 1, "in (0, 1), or None"),
        )
        for name, right, wanted in allowed:
            if not right:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be {wanted}")


def make_optimizer(parameters: Iterable[nn.Parameter], training: Training) -> torch.optim.Optimizer:
    """The optimizer that the settings name."""
    if training.optimizer == "sgd":
        momentum = training.momentum
        return torch.optim.SGD(
            parameters, training.lr, momentum, weight_decay=training.weight_decay, nesterov=momentum > 0
        )
    kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, training.lr, weight_decay=training.weight_decay)


_SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 + 0.5 * math.cos(math.pi * done),
    "linear": lambda done: 1.0 - done,
    "step": lambda done: 1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01,
    "constant": lambda done: 1.0,
}


def lr_factor(training: Training, step: int, per_epoch: int) -> float:
    """What the learning rate is multiplied with at ``step`` (from 0), of ``per_epoch`` in each epoch."""
    warm = round(training.warmup_epochs * per_epoch)
    if step < warm:
        return (step + 1) / (warm + 1)
    return _SHAPES[training.schedule]((step - warm) / (training.epochs * per_epoch - warm))
