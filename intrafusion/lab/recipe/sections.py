# ruff: noqa: RUF009 - option() returns a dataclass field, as dataclasses.field does
"""The sections of a recipe: which keys there are, what they may be, and the rules between keys of one section."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from intrafusion.lab.recipe.nodes import Node
from intrafusion.lab.recipe.reader import Reader
from intrafusion.lab.recipe.schema import Rule, option

ImportanceName = Literal[
    "l1", "l2", "taylor", "lamp", "bn_scale", "random", "fpgm", "chip", "reconstruction", "reconstruction_backward",
    "reconstruction_data_free", "flap", "wanda",
]  # fmt: skip

Width = Literal["feed_forward", "heads", "head_dim", "stream", "channels"]
"""As `intrafusion.prune.widths.KINDS`."""
Images = Literal["digits", "cifar10", "cifar100", "imagenet", "image_folder", "image_halves", "fake"]
_ONLY_FOR = {
    "size": ("imagenet", "image_folder", "image_halves", "fake"),
    "resize": ("imagenet", "image_folder", "image_halves"),
    "train_images": ("cifar10", "cifar100", "imagenet", "image_folder", "image_halves", "fake", "one's own"),
    "download": ("cifar10", "cifar100"),
}


def pretrained_name(weights: str | None) -> str | None:
    """``pretrained`` is ``""``, ``pretrained:NAME`` is ``NAME``, a file is ``None``."""
    word, _, name = (weights or "").partition(":")
    return name if word == "pretrained" else None


def _read_path(reader: Reader, node: Node, path: str) -> Any:
    """Text or null, with ``~`` replaced by the home folder."""
    value = reader.value(str | None, node, path, Rule(""))
    return os.path.expanduser(value) if isinstance(value, str) else value


def _read_images(reader: Reader, node: Node, path: str) -> Any:
    """The name of a data set, or ``package.module:function``."""
    if isinstance(node.value, str) and re.fullmatch(r"[\w.]+:\w+", node.value):
        return node.value
    return reader.value(Images, node, path, Rule(""))


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """Which network, with which weights."""

    name: str = option(doc="name of the network, torchvision:NAME, timm:NAME or package.module:factory")
    weights: str | None = option(
        None,
        "safetensors file; a relative path is looked for in the folder of data.root, then in the current one; or "
        "pretrained, for the default weights of torchvision or timm; or pretrained:NAME, for others of theirs",
        parse=_read_path,
    )
    download: bool = option(False, "fetch pretrained weights that are not in the library's cache")
    num_classes: int = option(10, "width of the output", ge=2)

    @property
    def pretrained(self) -> str | None:
        """The name of the library's weights, empty for its default ones; ``None`` if others are asked for."""
        return pretrained_name(self.weights)

    def check(self) -> Iterator[tuple[str, str]]:
        """A download needs something to fetch."""
        if self.download and pretrained_name(self.weights) is None:
            yield "download", "needs weights: pretrained"


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Which images, and how they are split and scaled."""

    name: Images | str = option(
        doc="digits of scikit-learn, CIFAR, ImageNet, any folder of images, generated ones to try things out, or "
        "package.module:function of one's own",
        parse=_read_images,
        schema={"anyOf": [{"enum": list(get_args(Images))}, {"type": "string", "pattern": "^[\\w.]+:\\w+$"}]},
    )
    title: str | None = option(None, "what reports call the images; null for the name")
    root: str | None = option(
        None,
        "image_folder: folder with train/<class>/*.jpg and test/<class>/*.jpg, or a tar archive of it, or the folder "
        "it lies in; image_halves: folder with <class>/*.jpg or a tar archive of it, every second image the test; "
        "imagenet: folder with train/<wnid>/ and val/<wnid>/; cifar10 and cifar100: folder with the "
        "archive or its content, null for one in the cache; one's own function is given it",
        parse=_read_path,
    )
    download: bool = option(False, "fetch cifar10 or cifar100 if they are not in root")
    mean: tuple[float, ...] | None = option(
        None, "per channel, of pixels in [0, 1]; null for the data set's own (image_folder: ImageNet's)", min_length=1
    )
    std: tuple[float, ...] | None = option(None, "per channel, of pixels in [0, 1]", gt=0, min_length=1)
    batch_size: int = option(500, "images per evaluation step", ge=1)
    validation: float = option(0.1, "share of the training images held out", gt=0, lt=1)
    size: int | None = option(
        None,
        "side of the square that every image becomes, in pixels; null for 224 (imagenet), 32 (fake), as they are "
        "(image_folder)",
        ge=1,
    )
    resize: int | None = option(
        None, "length of the shorter side before that square is cut out; null for 8/7 of size", ge=1
    )
    train_images: int | None = option(
        None, "read only N training images of a fixed shuffle; null for all (fake: 1000)", ge=1
    )
    test_images: int | None = option(None, "evaluate on the first N of a fixed shuffle; null for all (fake: 500)", ge=1)
    seed: int = option(0, "which images are held out", ge=0)
    on_corrupt: Literal["error", "skip"] = option("error", "what to do with an unreadable image")
    workers: int | None = option(None, "threads that decode images; null for one per processor", ge=1)

    @property
    def shown(self) -> str:
        """What reports call the images; generated ones are never called by the name of real ones."""
        return self.name if self.title is None or self.name == "fake" else self.title

    def check(self) -> Iterator[tuple[str, str]]:
        """Folders need a root; digits and CIFAR are as they are."""
        if self.name in ("image_folder", "image_halves") and self.root is None:
            yield "root", "missing; set it with --set data.root=FOLDER (or the path of an archive)"
        if self.name == "imagenet" and self.root is None:
            yield "root", "missing; set it with --set data.root=FOLDER, which holds train/<wnid>/ and val/<wnid>/"
        kind = "one's own" if ":" in (self.name or "") else self.name
        for key, names in _ONLY_FOR.items():
            if kind is not None and kind not in names and getattr(self, key) not in (None, False):
                yield key, f"not for {self.name}; only for {', '.join(names)}"
        size = self.size or (224 if self.name == "imagenet" else None)
        if self.resize is not None and size is None:
            yield "resize", "needs size"
        elif self.resize is not None and size is not None and self.resize < size:
            yield "resize", f"expected at least the size, {size}, got {self.resize}"

    def check_here(self) -> Iterator[tuple[str, str]]:
        """The root exists, unless it is downloaded."""
        if self.root is not None and not self.download and not Path(self.root).exists():
            yield "root", f"'{self.root}' does not exist"


@dataclass(frozen=True, kw_only=True)
class OptimisationSection:
    """What training and fine-tuning share; see :class:`intrafusion.Training`."""

    epochs: int = option(10, "passes over the training images", ge=1)
    lr: float = option(0.05, "largest learning rate of the schedule", gt=0)
    optimizer: Literal["sgd", "adam", "adamw"] = option("sgd", "SGD (with Nesterov momentum), Adam or AdamW")
    momentum: float = option(0.9, "of SGD", ge=0, lt=1)
    weight_decay: float = option(0.0005, "of the optimizer, on every parameter", ge=0)
    schedule: Literal["cosine", "linear", "step", "constant"] = option(
        "cosine", "how the learning rate falls: to zero, or to a tenth and a hundredth after 1/2 and 3/4 of the steps"
    )
    warmup_epochs: float = option(0.0, "the learning rate rises for so long before it falls", ge=0)
    batch_size: int = option(64, "images per training step", ge=2)
    accumulate: int = option(1, "batches whose gradients make one update", ge=1)
    augmentation: Literal["none", "flip", "crop_flip", "randaugment"] = option(
        "none", "random changes of the images: mirrored; also shifted by up to 1/8; also torchvision's RandAugment"
    )
    label_smoothing: float = option(0.0, "share of the label that is spread over all classes", ge=0, lt=1)
    amp: Literal["none", "bf16", "fp16"] = option("none", "mixed precision; fp16 on a GPU only")
    clip_norm: float | None = option(None, "the gradient's norm is cut to this", gt=0)
    ema: float | None = option(None, "decay of a moving average of the weights, which is the result", gt=0, lt=1)
    channels_last: bool = option(False, "keep images and weights in this memory format while training")

    def check(self) -> Iterator[tuple[str, str]]:
        """Warming up ends before training does."""
        if None not in (self.warmup_epochs, self.epochs) and self.warmup_epochs >= self.epochs:
            yield "warmup_epochs", f"must be below epochs ({self.epochs})"


@dataclass(frozen=True, kw_only=True)
class TrainSection(OptimisationSection):
    """How the dense network is trained when no weights are given."""

    seed: int = option(0, "of the first weights, the order of the images and their augmentation", ge=0)


@dataclass(frozen=True, kw_only=True)
class FinetuneSection(OptimisationSection):
    """How both networks of every pair are trained after pruning, alike."""

    lr: float = option(0.01, "largest learning rate of the schedule", gt=0)
    teacher: bool = option(False, "learn from the dense network's logits too")
    temperature: float = option(4.0, "with teacher: what logits are divided by", gt=0)
    alpha: float = option(0.9, "with teacher: its weight in the loss; the labels have the rest", ge=0, le=1)
    recenter: bool = option(False, "first give batch-norms the statistics of training images; eval outputs stay")
    at: tuple[int, ...] = option((), "epochs after which the test accuracy is reported, chosen in advance", ge=1)
    seeds: tuple[int, ...] = option(
        (0,), "one run each: of the order of the images and their augmentation", ge=0, min_length=1
    )

    def check(self) -> Iterator[tuple[str, str]]:
        """Also: epochs that are reported exist, and no seed is given twice."""
        yield from OptimisationSection.check(self)
        late = [epoch for epoch in self.at or () if epoch > (self.epochs or epoch)]
        if late:
            yield "at", f"{late[0]} is after the last epoch ({self.epochs})"
        for key in ("at", "seeds"):
            values = getattr(self, key) or ()
            if len(set(values)) < len(values):
                yield key, "the same number is given twice"


@dataclass(frozen=True, kw_only=True)
class SplitSection:
    """Networks are trained on parts of the training images at the same time, and become one pruned network."""

    parts: int = option(2, "how many parts, each with every class in proportion", ge=2)
    overlap: float = option(0.0, "share of the other parts' images that each part has too", ge=0, le=1)
    init: tuple[Literal["same", "different"], ...] = option(
        ("same",), "whether the networks of the parts start from the same weights", min_length=1
    )
    schedules: tuple[Literal["paf", "fap", "whole"], ...] = option(
        ("paf", "fap", "whole"),
        "prune each part's network, then fuse; fuse, then prune; or train one network on all images as long as all "
        "parts together, then prune",
        min_length=1,
    )
    by: Literal["matching", "weights", "activations"] = option("matching", "how channels are aligned")
    repair: Literal["refit", "statistics", "none"] = option(
        "refit",
        "what is put right in an average of networks: every layer, to give what theirs give on average; the batch-norm "
        "statistics alone; nothing",
    )
    images: int = option(
        1000, "unlabelled training images behind repair and activations; 0 for a repair without images", ge=0
    )
    budgets: tuple[int, ...] = option(
        (0,), "epochs of fine-tuning on all images, one run each; they replace finetune.epochs", ge=0, min_length=1
    )
    prune_until: float = option(
        0.0, "share of the fine-tuning over which fap and whole make prune.iterative_steps; 0 for before it", ge=0, lt=1
    )
    seeds: tuple[int, ...] = option(
        (0,), "one run each: of the parts, the first weights and the order of the images", ge=0, min_length=1
    )

    def check(self) -> Iterator[tuple[str, str]]:
        """Nothing is given twice; activations need images."""
        for key in ("init", "schedules", "budgets", "seeds"):
            values = getattr(self, key) or ()
            if len(set(values)) < len(values):
                yield key, "the same value is given twice"
        if self.prune_until and not any(self.budgets or (1,)):
            yield "prune_until", "needs budgets above 0: it is a share of the fine-tuning"
        if self.by == "activations" and self.images == 0:
            yield "images", "0, in conflict with by: activations, which takes images"


@dataclass(frozen=True, kw_only=True)
class TargetSection:
    """How much of the network is left; the ratio is searched for."""

    macs: float | None = option(None, "share of the multiply-accumulates that is left", gt=0, lt=1)
    parameters: float | None = option(None, "share of the parameters that is left", gt=0, lt=1)
    latency: float | None = option(None, "share of the measured latency that is left, on this machine", gt=0, lt=1)
    batch: int = option(64, "images per pass whose latency is meant", ge=1)

    def check(self) -> Iterator[tuple[str, str]]:
        """One of the three."""
        if sum(share is not None for share in (self.macs, self.parameters, self.latency)) != 1:
            yield "macs", "give one of macs, parameters and latency"

    @property
    def goal(self) -> tuple[str, float]:
        """The quantity by its key, and the share of it that is left."""
        shares = {name: getattr(self, name) for name in ("macs", "parameters", "latency")}
        return next((name, share) for name, share in shares.items() if share is not None)


@dataclass(frozen=True, kw_only=True)
class PruneSection:
    """What torch-pruning removes."""

    ratios: tuple[float, ...] | None = option(
        None, "share of the channels that go; null with a target", ge=0, lt=1, min_length=1
    )
    target: TargetSection | None = option(
        None, "macs, parameters or latency: the share that is left, met within 2 %, instead of ratios"
    )
    overrides: Mapping[str, float] | None = option(
        None, "layer-name patterns with a ratio of their own; with global, outside the ranking", ge=0, lt=1
    )
    widths: tuple[Width, ...] | None = option(
        None,
        "kinds of width that are cut, each by the ratio: of transformers, hidden units, whole heads, channels inside "
        "heads, the residual stream; null for every group of torch-pruning's",
        min_length=1,
    )
    importance: ImportanceName = option("l1", "torch-pruning importance")
    ignored: tuple[str, ...] = option((), "layer names that are left alone; * stands for anything")
    groups: Literal["all", "each"] = option("all", "all groups at once, or each group alone")
    global_pruning: bool = option(False, "rank the channels of all groups together", key="global")
    isomorphic: bool = option(False, "with global: rank only groups of the same structure together")
    iterative_steps: int = option(1, "reach the ratio in this many equal steps", ge=1)
    round_to: int | None = option(None, "channel counts become multiples of this", ge=1)
    images: int = option(500, "training images behind taylor, chip, reconstruction and calibrated", ge=1)
    seed: int = option(0, "of random importance, and of the choice of those images", ge=0)

    def check(self) -> Iterator[tuple[str, str]]:
        """Ratios or a target, and nothing that contradicts another key."""
        ratios = self.ratios or ()
        if len(set(ratios)) < len(ratios):
            yield "ratios", "the same ratio is given twice"
        if self.ratios is None and self.target is None:
            yield "ratios", "missing; give a list of numbers at least 0 and below 1, or a target"
        if self.ratios is not None and self.target is not None:
            yield "target", "in conflict with ratios; leave out one of them (--set prune.ratios=null)"
        if self.target is not None and self.groups == "each":
            yield "target", "of the whole network, in conflict with groups: each"
        if self.target is not None and self.global_pruning and self.iterative_steps > 1:
            yield "target", "in conflict with global and iterative_steps: what later steps rank depends on the fusion"
        if self.overrides and self.groups == "each":
            yield "overrides", "in conflict with groups: each, where every group has the ratios"
        if self.isomorphic and not self.global_pruning:
            yield "isomorphic", "needs global: true"
        if self.widths is not None:
            yield from _check_widths(self, self.widths)


def _check_widths(section: PruneSection, widths: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if len(set(widths)) < len(widths):
        yield "widths", "the same kind is given twice"
    if section.groups == "each":
        yield "widths", "in conflict with groups: each"
    if (section.iterative_steps or 1) > 1:
        yield "widths", "in conflict with iterative_steps: heads are cut in one step here"
