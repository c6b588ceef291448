"""Networks of every kind, trained on scikit-learn's digits and pruned without fine-tuning: does it hold in general?

    python -m benchmarks.kinds                  # offline, about ten minutes on one core
    python -m benchmarks.kinds --kind depthwise --descent 1000

All channels that torch-pruning prunes except the classifier's, residual streams included; L1 importance; accuracy on
the 539 test digits. `discard`, `data-free` and `calibrated` keep the same channels. Nothing is chosen on test images.
`--descent` adds what so many steps of all layers together make of each method that sees inputs.
"""

from __future__ import annotations

import argparse
import warnings
from statistics import mean, stdev

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.rivals.methods import prune
from intrafusion import Fusion
from intrafusion.lab.data.dataset import Dataset
from intrafusion.lab.data.sources import digits
from intrafusion.lab.measure import evaluate
from intrafusion.lab.recipe.sections import TrainSection
from intrafusion.lab.training import train_

RATIOS = (0.3, 0.5, 0.7)
METHODS = (("discard", 0), ("paper", 0), ("data-free", 0), ("calibrated", 64), ("calibrated", 500))
"""(preset, unlabelled images)"""
DRAWN = ("data-free", "calibrated")
"""What depends on the inputs that are drawn for it."""


class InvertedResidual(nn.Module):
    """A MobileNet block: 1x1 up, 3x3 depthwise, 1x1 down, each with batch-norm."""

    def __init__(self, width: int, expansion: int = 4) -> None:
        super().__init__()
        inner = width * expansion
        self.up, self.down = nn.Conv2d(width, inner, 1, bias=False), nn.Conv2d(inner, width, 1, bias=False)
        self.depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(size) for size in (inner, inner, width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.norms[0](self.up(x)))
        y = F.relu6(self.norms[1](self.depthwise(y)))
        return x + self.norms[2](self.down(y))


class ConvNeXtBlock(nn.Module):
    """3x3 depthwise, layer-norm, linear up, GELU, linear down."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)


class ResidualMlp(nn.Module):
    """Layer-norm, linear up, GELU, linear down, three times: the MLPs of a transformer."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(64, width), nn.Linear(width, 10)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1))
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(F.gelu(up(norm(x))))
        return self.head(x)


def _pooled(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]


def _cnn(norm) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index, (before, after) in enumerate(((1, 32), (32, 48), (48, 64))):
        layers += [nn.Conv2d(before, after, 3, padding=1), norm(after), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if index == 1 else []
    return nn.Sequential(*layers, *_pooled(64))


KINDS = {
    "batch-norm": lambda: _cnn(nn.BatchNorm2d),
    "no normalisation": lambda: nn.Sequential(*list(_cnn(lambda _: nn.Identity()))[:-3], nn.Flatten(),
                                              nn.Linear(64 * 16, 64), nn.ReLU(), nn.Linear(64, 10)),
    "group-norm": lambda: _cnn(lambda width: nn.GroupNorm(4, width)),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(1, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU6(),
                                       InvertedResidual(24), InvertedResidual(24), nn.MaxPool2d(2),
                                       InvertedResidual(24), *_pooled(24)),
    "ConvNeXt": lambda: nn.Sequential(nn.Conv2d(1, 32, 2, 2), *(ConvNeXtBlock(32) for _ in range(3)), *_pooled(32)),
    "layer-norm MLP": ResidualMlp,
    "batch-norm MLP": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(),
                                            nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10)),
}  # fmt: skip


def trained(kind: str, data: Dataset) -> nn.Module:
    """A network of a kind, trained for 15 epochs, in eval mode."""
    torch.manual_seed(0)
    model = KINDS[kind]()
    batchnorm = any(isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) for module in model.modules())
    train_(model, data, TrainSection(epochs=15, lr=0.05 if batchnorm else 0.02), progress=False)
    return model.eval()


def pruned(
    dense: nn.Module, data: Dataset, ratio: float, preset: str, images: int, seed: int = 0, descent: int = 0
) -> nn.Module:
    """A pruned copy; the classifier, the layer that is called last, keeps its outputs. seed: of all that is drawn."""
    batches = [batch for batch, _ in data.draw("train", images, seed=seed)] if images else None
    l1, example = tp.importance.GroupMagnitudeImportance(p=1), torch.zeros(1, *data.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fusion = Fusion.preset(preset, descent=descent)
        return prune(fusion, dense, None, ratio, l1, example, images=batches, seed=seed)


def _cell(values: list[float]) -> str:
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kind", choices=KINDS, action="append", help="only this one (may be repeated)")
    parser.add_argument("--ratio", type=float, action="append", help="default 0.3 0.5 0.7 (may be repeated)")
    parser.add_argument("--seeds", type=int, default=1, help="the mean, and the spread, over so many draws of inputs")
    parser.add_argument("--descent", type=int, default=0, help="so many steps behind data-free and calibrated too")
    arguments = parser.parse_args()
    data = digits()
    methods = [(*method, 0) for method in METHODS]
    methods += [(*method, arguments.descent) for method in METHODS if arguments.descent and method[0] in DRAWN]
    names = [
        preset + (f", {images} images" if images else "") + (f", {steps} steps" if steps else "")
        for preset, images, steps in methods
    ]
    print(f"| network | dense | removed | {' | '.join(names)} |")
    print("| --- | ---: | ---: |" + " ---: |" * len(names))
    for kind in arguments.kind or KINDS:
        dense = trained(kind, data)
        for ratio in arguments.ratio or RATIOS:
            values = [
                [
                    evaluate(pruned(dense, data, ratio, preset, images, seed, steps), data, progress=False).percent
                    for seed in range(arguments.seeds if preset in DRAWN else 1)
                ]
                for preset, images, steps in methods
            ]
            before = evaluate(dense, data, progress=False).percent
            row = " | ".join(map(_cell, values))
            print(f"| {kind} | {before:.1f} | {ratio:.0%} | {row} |", flush=True)


if __name__ == "__main__":
    main()
