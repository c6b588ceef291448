"""The networks of the zoo: who builds them, how large their inputs are, and in which order they are measured."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.texts import TEXTS

PIXELS = 64
CLASSES = 10
_SIDES = {"inception_v3": 96, "maxvit_t": 224, "ssd300_vgg16": 96}
"""Where 64 pixels are too few (or, for maxvit_t, no multiple of its windows)."""
_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
}
_VIT_PIXELS = 32
_BACKBONES = (
    "fasterrcnn_mobilenet_v3_large_fpn", "fasterrcnn_resnet50_fpn", "fcos_resnet50_fpn", "retinanet_resnet50_fpn_v2",
    "ssd300_vgg16", "ssdlite320_mobilenet_v3_large",
)  # fmt: skip
"""The six different ones: Mask R-CNN and Keypoint R-CNN have that of Faster R-CNN."""
_TIMM = {
    "tinynet_e": 2.0, "lcnet_035": 1.6, "mobilenetv3_small_050": 1.6, "mnasnet_small": 2.0, "resnet10t": 5.4,
    "tf_efficientnet_lite0": 4.7, "regnetx_002": 2.7, "repvgg_a0": 9.1, "mobileone_s0": 5.3, "ghostnet_050": 2.6,
    "semnasnet_050": 2.1, "vit_tiny_patch16_224": 5.7, "deit_tiny_patch16_224": 5.7, "mobilevit_xxs": 1.3,
    "edgenext_xx_small": 1.3, "convnext_atto": 3.7, "convnextv2_atto": 3.7, "starnet_s1": 2.9, "poolformer_s12": 11.9,
    "pvt_v2_b0": 3.7, "levit_128s": 7.8, "resmlp_12_224": 15.4, "mixer_s32_224": 19.1, "ecaresnet26t": 16.0,
    "skresnet18": 12.0, "legacy_seresnet18": 11.8, "ese_vovnet19b_dw": 6.5, "cspresnet50": 21.6, "dla34": 15.7,
    "hrnet_w18_small": 13.2, "res2net50_26w_4s": 25.7, "selecsls42": 30.4, "nf_resnet26": 16.0,
    "resnetv2_50": 25.5, "xcit_nano_12_p16_224": 3.1, "coat_tiny": 5.5, "efficientformerv2_s0": 3.6,
    "fastvit_t8": 4.0, "repghostnet_050": 2.3, "rexnet_100": 4.8,
}  # fmt: skip
_TIMM_SIZED = ("vit_", "deit_", "resmlp_", "mixer_", "xcit_", "levit_", "coat_", "efficientformerv2_")
"""Families whose tables have the size of the image: they are told it where they allow it."""


@dataclass(frozen=True)
class Entry:
    """One network. library: who builds it. millions: of parameters, about (with its own classifier). needs: the
    package that must be installed. build: makes it, with random weights. inputs: makes `count` random inputs, as the
    arguments of one call; another seed gives others.
    """

    name: str
    library: str
    millions: float
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Any]

    @property
    def missing(self) -> str:
        """Why it cannot be built here ('' if it can)."""
        return "" if importlib.util.find_spec(self.library) else f"{self.library} is not installed"


def images(side: int) -> Callable[[int, int], tuple[Tensor]]:
    """Random images, each with a contrast and a brightness of its own, smooth enough that pixels know each other."""

    def make(count: int, seed: int) -> tuple[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.randn(count, 3, max(2, side // 8), max(2, side // 8), generator=generator)
        fine = torch.randn(count, 3, side, side, generator=generator)
        smooth = nn.functional.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=False)
        return (smooth + 0.3 * fine,)

    return make


def entries() -> dict[str, Entry]:
    """By name, cheapest first."""
    found = [*_classifiers(), *_detection(), *_segmentation(), *_of_timm(), *_of_transformers()]
    return {entry.name: entry for entry in sorted(found, key=lambda entry: entry.millions)}


def _classifiers() -> Iterable[Entry]:
    from torchvision import models

    for name in models.list_models(module=models):
        vit = name.startswith("vit_")
        side = _VIT_PIXELS if vit else _SIDES.get(name, PIXELS)
        options = {"num_classes": CLASSES, **_OPTIONS.get(name, {})}
        if vit:
            options["image_size"] = side
        yield Entry(
            f"torchvision:{name}", "torchvision", _millions(name), _maker(models.get_model, name, options), images(side)
        )


def _detection() -> Iterable[Entry]:
    from torchvision import models

    for name in _BACKBONES:
        build = _maker(models.get_model, name, {"weights_backbone": None}, part="backbone")
        side = _SIDES.get(name, PIXELS)
        yield Entry(f"torchvision:{name}.backbone", "torchvision", _millions(name), build, images(side))


def _segmentation() -> Iterable[Entry]:
    from torchvision import models

    for name in models.list_models(module=models.segmentation):
        build = _maker(models.get_model, name, {"weights_backbone": None, "num_classes": CLASSES})
        yield Entry(f"torchvision:{name}", "torchvision", _millions(name), build, images(PIXELS))


def _of_timm() -> Iterable[Entry]:
    for name, millions in _TIMM.items():
        options: dict[str, Any] = {"num_classes": CLASSES}
        if name.startswith(_TIMM_SIZED):
            options["img_size"] = PIXELS
        yield Entry(f"timm:{name}", "timm", millions, _timm_maker(name, options), images(PIXELS))


def _of_transformers() -> Iterable[Entry]:
    for text in TEXTS:
        yield Entry(f"transformers:{text.name}", "transformers", text.millions, text.build, text.inputs)


def _millions(name: str) -> float:
    from torchvision import models

    return models.get_model_weights(name)["DEFAULT"].meta["num_params"] / 1e6


def _maker(get: Callable, name: str, options: dict[str, Any], part: str = "") -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = get(name, weights=None, **options)
        return getattr(model, part) if part else model

    return build


def _timm_maker(name: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, **options)

    return build
