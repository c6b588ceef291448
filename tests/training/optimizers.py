"""Optimizers to prune under, and what they hold."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.nets import Case

OPTIMIZERS: dict[str, Callable] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, amsgrad=True),
    "adam foreach": lambda p: torch.optim.Adam(p, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p),
    "radam": lambda p: torch.optim.RAdam(p),
    "adamax": lambda p: torch.optim.Adamax(p),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-4, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p),
}


def train_(model: nn.Module, optimizer, case: Case, steps: int = 3) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, *case.shape, generator=generator)).square().mean().backward()
        optimizer.step()


def held(optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def tensors(optimizer, parameter) -> dict[str, Tensor]:
    state = optimizer.state[parameter]
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and value.dim() > 0}


class Biasless(nn.Module):
    """A layer without a bias and without a batch-norm: a refit gives it a bias."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 3, bias=False)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(F.relu(self.b(F.relu(self.a(x)))).mean((2, 3)))


BIASLESS = Case("biasless", Biasless, (3, 8, 8))
