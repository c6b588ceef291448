"""Accuracy, operations and size of a network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from intrafusion.lab.data import Dataset


@dataclass(frozen=True)
class Accuracy:
    """``correct`` of ``total`` images; integers, so that nothing depends on the size of a batch."""

    correct: int
    total: int

    @property
    def percent(self) -> float:
        """In per cent; nan for no images."""
        return 100 * self.correct / self.total if self.total else float("nan")

    def __str__(self) -> str:
        return f"{self.percent:.2f} %"


def evaluate(
    model: nn.Module, data: Dataset, split: str = "test", *, batch_size: int = 500, progress: bool = True
) -> Accuracy:
    """Count the images of a split whose label has the largest logit, as :func:`hits` finds them."""
    right = hits(model, data, split, batch_size=batch_size, progress=progress)
    return Accuracy(int(right.sum()), len(right))


def hits(
    model: nn.Module, data: Dataset, split: str = "test", *, batch_size: int = 500, progress: bool = True
) -> Tensor:
    """Which images of a split have the largest logit at their label: bool ``[N]``, on the CPU, in the split's order.

    The network is in eval mode while it is measured and gets its modes back afterwards.
    """
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    right = []
    batches = -(-len(data.split(split)) // batch_size)
    try:
        with torch.no_grad():
            bar = tqdm(data.batches(split, batch_size, device=device), desc=f"evaluate {split}", total=batches,
                       delay=2, leave=False, disable=None if progress else True)  # fmt: skip
            for images, labels in bar:
                right.append((model(images).argmax(1) == labels).cpu())
    finally:
        for module, training in modes:
            module.training = training
    return torch.cat(right)


def count_macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of one forward pass of ``example`` (``[1, C, H, W]``): convolutions and matrix products."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(example)
    return counter.get_total_flops() // 2


def count_parameters(model: nn.Module) -> int:
    """Scalar parameters; buffers are not counted."""
    return sum(parameter.numel() for parameter in model.parameters())
