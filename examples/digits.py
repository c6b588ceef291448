"""Data and network of the examples: scikit-learn's digits (offline) and a small convolutional network."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def loaders(batch_size: int = 64) -> tuple[DataLoader, DataLoader]:
    """Training and test images: [N, 1, 8, 8] in [0, 1], with labels [N]."""
    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.float32).reshape(-1, 1, 8, 8) / 16
    split = train_test_split(images, labels, test_size=0.3, random_state=0, stratify=labels)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in split)
    generator = torch.Generator().manual_seed(0)
    train = DataLoader(TensorDataset(train_x, train_y), batch_size, shuffle=True, drop_last=True, generator=generator)
    return train, DataLoader(TensorDataset(test_x, test_y), 256)


def network(width: int = 32) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels_in, channels_out in ((1, width), (width, width), (width, 2 * width)):
        layers += [nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out)]
        layers += [nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


@torch.no_grad()
def accuracy(model: nn.Module, batches: DataLoader) -> float:
    """In %."""
    training = model.training
    model.eval()
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
    model.train(training)
    return 100 * right / len(batches.dataset)  # type: ignore[arg-type]


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def example_input() -> Tensor:
    return torch.zeros(1, 1, 8, 8)
