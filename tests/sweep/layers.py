"""Layers as users write them: their weight, or their input, is not what their attributes say."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class StandardisedConv2d(nn.Conv2d):
    """Every filter has mean 0 and deviation 1 before it is used."""

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, D, H', W']."""
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        deviation = self.weight.std((1, 2, 3), keepdim=True) + 1e-5
        weight = (self.weight - mean) / deviation / self.weight[0].numel() ** 0.5
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class EqualisedLinear(nn.Linear):
    """An equalised learning rate: the weight is used times a constant."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., D]."""
        return F.linear(x, self.weight * 0.5, self.bias)


class PaddedConv2d(nn.Conv2d):
    """Pads in its own forward as TensorFlow does: more on the right than on the left."""

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, D, ceil(H / stride), ceil(W / stride)]."""
        pads: list[int] = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            missing = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [missing // 2, missing - missing // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)
