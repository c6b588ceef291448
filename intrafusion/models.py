"""Dense networks by name: ResNets and VGG for CIFAR, a small CNN for digits, and those of torchvision and timm.

A checkpoint may name its dense network (:func:`intrafusion.save`), and a file can be anyone's: whatever the name, no
code is run but that of this file and of the two libraries.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

_VGG11 = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")


class UnknownModelError(ValueError):
    """No network has the name, or the library that may have it is not installed."""


class ZeroPadShortcut(nn.Module):
    """ResNet's parameter-free "option A" shortcut.

    ``[N, C, H, W] -> [N, C + 2 * padding, H / stride, W / stride]``: every ``stride``-th pixel, then ``padding``
    channels of zeros on each side.
    """

    def __init__(self, stride: int, padding: int) -> None:
        super().__init__()
        self.stride, self.padding = stride, padding

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: ``[N, C, H, W] -> [N, planes, H / stride, W / stride]``.

    Where the shape changes, the shortcut is a 1x1 convolution with batch-norm if ``project``, else zero-padding.
    """

    def __init__(self, channels: int, planes: int, stride: int, project: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        if stride == 1 and channels == planes:
            self.shortcut = nn.Identity()
        elif project:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))
        else:
            self.shortcut = ZeroPadShortcut(stride, (planes - channels) // 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """The ResNet of depth ``6 n + 2`` for 32x32 images: 16-32-64 channels in three stages of ``n`` blocks.

    ``[N, 3, 32, 32] -> [N, num_classes]``.
    """

    def __init__(self, depth: int, num_classes: int = 10) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"a CIFAR ResNet has depth 6 n + 2 (20, 32, 44, 56, 110, ...), not {depth}")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)
        _initialise_(self)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.layer3(self.layer2(self.layer1(y)))
        return self.linear(F.adaptive_avg_pool2d(y, 1).flatten(1))


class CifarResNet18(nn.Module):
    """ResNet-18 for 32x32 images: a 3x3 stem without a max-pool, then 64-128-256-512 channels, two blocks each.

    ``[N, 3, H, W] -> [N, num_classes]``. The keys are those of the widely used ``pytorch-cifar`` checkpoints. ``width``
    is the number of channels of the first stage.
    """

    def __init__(self, num_classes: int = 10, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, 2, stride=1)
        self.layer2 = _stage(width, 2 * width, 2, stride=2, project=True)
        self.layer3 = _stage(2 * width, 4 * width, 2, stride=2, project=True)
        self.layer4 = _stage(4 * width, 8 * width, 2, stride=2, project=True)
        self.linear = nn.Linear(8 * width, num_classes)
        _initialise_(self)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.layer4(self.layer3(self.layer2(self.layer1(y))))
        return self.linear(F.adaptive_avg_pool2d(y, 1).flatten(1))


class CifarVGG(nn.Module):
    """VGG with batch-norm for 32x32 images and one linear layer at the end.

    ``[N, 3, 32, 32] -> [N, num_classes]``. ``plan`` lists channel counts and ``"M"`` for a 2x2 max-pool.
    """

    def __init__(self, plan: tuple[int | str, ...] = _VGG11, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for entry in plan:
            if isinstance(entry, str):
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(channels, entry, 3, padding=1), nn.BatchNorm2d(entry), nn.ReLU()]
            channels = entry
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)
        _initialise_(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


class DigitsCNN(nn.Module):
    """The demo's network: three convolutions with batch-norm for 8x8 grey images and one linear layer.

    ``[N, 1, 8, 8] -> [N, num_classes]``.
    """

    def __init__(self, num_classes: int = 10, widths: tuple[int, int, int] = (32, 64, 64)) -> None:
        super().__init__()
        first, second, third = widths
        self.features = nn.Sequential(
            nn.Conv2d(1, first, 3, padding=1, bias=False),
            nn.BatchNorm2d(first),
            nn.ReLU(),
            nn.Conv2d(first, second, 3, padding=1, bias=False),
            nn.BatchNorm2d(second),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(second, third, 3, padding=1, bias=False),
            nn.BatchNorm2d(third),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Linear(third * 4, num_classes)
        _initialise_(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


def _stage(channels: int, planes: int, blocks: int, stride: int, project: bool = False) -> nn.Sequential:
    rest = [BasicBlock(planes, planes, 1) for _ in range(blocks - 1)]
    return nn.Sequential(BasicBlock(channels, planes, stride, project), *rest)


def _initialise_(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _resnet(depth: int) -> Callable[[int], nn.Module]:
    return lambda num_classes: CifarResNet(depth, num_classes)


LIBRARIES = ("torchvision", "timm")
MODELS: dict[str, Callable[[int], nn.Module]] = {
    **{f"cifar_resnet{depth}": _resnet(depth) for depth in (20, 32, 44, 56, 110)},
    "cifar_resnet18": lambda num_classes: CifarResNet18(num_classes),
    "cifar_vgg11_bn": lambda num_classes: CifarVGG(num_classes=num_classes),
    "cifar_vit": lambda num_classes: _vit(num_classes),
    "digits_cnn": lambda num_classes: DigitsCNN(num_classes),
}


def named_model(name: str, num_classes: int = 10) -> nn.Module:
    """The network ``name`` with random weights: one of ``MODELS``, ``torchvision:NAME`` or ``timm:NAME``.

    Raises:
        UnknownModelError: there is none of that name, with the closest one, or its library is not installed.
    """
    library, colon, rest = name.partition(":")
    if colon and library == "torchvision":
        return _from_torchvision(rest, num_classes)
    if colon and library == "timm":
        return _from_timm(rest, num_classes)
    if name not in MODELS:
        raise UnknownModelError(
            f"no network is called '{name}'{_suggest(name, MODELS)} Known: {', '.join(MODELS)}, "
            f"{', '.join(f'{library}:NAME' for library in LIBRARIES)}"
        )
    return MODELS[name](num_classes)


def _from_torchvision(name: str, num_classes: int) -> nn.Module:
    from torchvision import models

    known = models.list_models()
    if name not in known:
        raise UnknownModelError(f"torchvision has no network '{name}'{_suggest(name, known)}")
    return models.get_model(name, weights=None, num_classes=num_classes)


def _vit(num_classes: int) -> nn.Module:
    """timm's ViT for 32x32 images: patches of 4x4 pixels, 4 blocks, 128 channels, 4 heads, 256 hidden units."""
    transformer: Any = _timm("cifar_vit", "timm.models.vision_transformer")
    return transformer.VisionTransformer(
        img_size=32, patch_size=4, embed_dim=128, depth=4, num_heads=4, mlp_ratio=2, num_classes=num_classes,
        norm_layer=nn.LayerNorm,
    )  # fmt: skip


def _timm(name: str, module: str = "timm") -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UnknownModelError(f"'{name}' needs the package timm: pip install 'intrafusion[timm]'") from None


def _from_timm(name: str, num_classes: int) -> nn.Module:
    timm = _timm(f"timm:{name}")
    if not timm.is_model(name):
        raise UnknownModelError(f"timm has no network '{name}'{_suggest(name, timm.list_models())}")
    return timm.create_model(name, pretrained=False, num_classes=num_classes)


def _suggest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else "."
