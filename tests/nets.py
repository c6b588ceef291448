"""Pico networks of every layer kind, each as (name, builder, example input, layers to ignore)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def randomise_(model: nn.Module) -> nn.Module:
    """Norms with statistics and weights of their own, of both signs: a fresh network would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(
            module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)
        ):
            if module.weight is not None:
                module.weight.data = 0.5 + torch.rand(module.weight.shape, generator=generator)
                module.weight.data[::3] *= -1
                module.bias.data = 0.3 * torch.randn(module.bias.shape, generator=generator)
            if getattr(module, "running_mean", None) is not None:
                module.running_mean = 0.3 * torch.randn(module.running_mean.shape, generator=generator)
                module.running_var = 0.5 + torch.rand(module.running_var.shape, generator=generator)
        if isinstance(module, nn.PReLU):
            module.weight.data = torch.rand(module.weight.shape, generator=generator)
    return model.eval()


class Plain(nn.Module):
    """conv -> BN -> ReLU -> conv (bias) -> BN -> flatten -> linear -> linear."""

    def __init__(self, width=8):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, 6, 3, padding=1), nn.BatchNorm2d(6, affine=False)
        self.fc1, self.bn3, self.fc2 = nn.Linear(24, 10), nn.BatchNorm1d(10), nn.Linear(10, 4)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.adaptive_avg_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        return self.fc2(F.relu(self.bn3(self.fc1(x.flatten(1)))))


class Residual(nn.Module):
    """A residual stream with a layer in and out of the same group, and a layer scale."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.a, self.bna, self.b, self.bnb = (
            nn.Conv2d(8, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.Conv2d(6, 8, 1),
            nn.BatchNorm2d(8),
        )
        self.scale = nn.Parameter(torch.rand(1, 8, 1, 1) + 0.5)
        self.c, self.bnc = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        y = F.relu(self.bn0(self.stem(x)))
        y = y + self.scale * self.bnb(self.b(F.relu(self.bna(self.a(y)))))
        y = F.relu(y + self.bnc(self.c(y)))
        return self.fc(y.mean((2, 3)))


class Concat(nn.Module):
    """Dense connectivity: a batch-norm behind a concat, and a consumer that reads a tensor twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        self.bn, self.c = nn.BatchNorm2d(10), nn.Conv2d(10, 6, 1)
        self.d, self.fc = nn.Conv2d(12, 6, 1), nn.Linear(6, 4)

    def forward(self, x):
        a = self.a(x)
        y = self.c(F.relu(self.bn(torch.cat([a, self.b(F.relu(a))], 1))))
        return self.fc(F.relu(self.d(torch.cat([y, F.relu(y)], 1))).mean((2, 3)))


class Depthwise(nn.Module):
    """An inverted residual block as in MobileNetV2: expand, depthwise, project."""

    def __init__(self):
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.project, self.fc = nn.Conv2d(8, 6, 1), nn.Linear(6, 4)

    def forward(self, x):
        y = F.relu6(self.bn2(self.depthwise(F.relu6(self.bn1(self.expand(x))))))
        return self.fc(F.relu(self.project(y)).mean((2, 3)))


class Grouped(nn.Module):
    """A ResNeXt block, a GroupNorm and a transposed convolution with batch-norm."""

    def __init__(self):
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.b, self.gn = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.GroupNorm(2, 8)
        self.up, self.bn_up = nn.ConvTranspose2d(8, 8, 2, stride=2, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        y = F.relu(self.gn(self.b(F.relu(self.bn(self.a(x))))))
        return self.fc(F.relu(self.bn_up(self.up(y))).mean((2, 3)))


class Transposed(nn.Module):
    """Transposed convolution, PReLU, instance-norm."""

    def __init__(self):
        super().__init__()
        self.a, self.prelu = nn.Conv2d(3, 8, 3, padding=1), nn.PReLU(8)
        self.up, self.bn = nn.ConvTranspose2d(8, 6, 2, stride=2), nn.BatchNorm2d(6)
        self.b, self.norm, self.fc = nn.Conv2d(6, 6, 3), nn.InstanceNorm2d(6, affine=True), nn.Linear(6, 4)

    def forward(self, x):
        y = F.relu(self.bn(self.up(self.prelu(self.a(x)))))
        return self.fc(F.relu(self.norm(self.b(y))).mean((2, 3)))


class Reused(nn.Module):
    """One layer called twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.shared, self.bn, self.fc = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.Linear(8, 4),
        )

    def forward(self, x):
        y = F.relu(self.stem(x))
        y = F.relu(self.bn(self.shared(y)))
        return self.fc(F.relu(self.bn(self.shared(y))).mean((2, 3)))


class Conv1d3d(nn.Module):
    """One- and three-dimensional convolutions with batch-norm."""

    def __init__(self):
        super().__init__()
        self.a, self.bna = nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.b, self.bnb = nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.c, self.bnc = nn.Conv3d(8, 6, 1, bias=False), nn.BatchNorm3d(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        y = F.relu(self.bnb(self.b(F.relu(self.bna(self.a(x))))))
        y = F.relu(self.bnc(self.c(y[..., None, None])))
        return self.fc(y.mean((2, 3, 4)))


class Mlp(nn.Module):
    """A token mixer: linear layers, LayerNorm over the channels, a positional parameter."""

    def __init__(self):
        super().__init__()
        self.embed, self.position = nn.Linear(6, 8), nn.Parameter(0.1 * torch.randn(1, 5, 8))
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        y = self.embed(x) + self.position
        y = y + self.down(F.gelu(self.up(self.norm(y))))
        return self.head(y.mean(1))


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    last: str = "fc"

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return randomise_(self.build())

    def example(self) -> Tensor:
        return torch.randn(2, *self.shape, generator=torch.Generator().manual_seed(2))

    def ignored(self, model: nn.Module) -> list[nn.Module]:
        return [model.get_submodule(self.last)]


PICO = [
    Case("plain", Plain, (3, 8, 8), "fc2"),
    Case("residual", Residual, (3, 6, 6)),
    Case("concat", Concat, (3, 6, 6)),
    Case("depthwise", Depthwise, (3, 6, 6)),
    Case("grouped", Grouped, (3, 6, 6)),
    Case("transposed", Transposed, (3, 6, 6)),
    Case("reused", Reused, (3, 6, 6)),
    Case("conv1d3d", Conv1d3d, (3, 9)),
    Case("mlp", Mlp, (5, 6), "head"),
]
