# ruff: noqa: RUF009 - option() returns a dataclass field, as dataclasses.field does
"""The recipe of a run: what a YAML file may say, its defaults, and the check of all of it at once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
import yaml

from intrafusion.fusion import PRESETS, Fusion
from intrafusion.lab.errors import LabError, Problem, RecipeError, UsageError
from intrafusion.lab.models import build_model, find_layers
from intrafusion.lab.nodes import Node, override, parse, parse_assignment
from intrafusion.lab.schema import (
    FAILED,
    Reader,
    Rule,
    json_schema,
    key_of,
    option,
    options,
    type_schema,
    unknown,
)

ImportanceName = Literal[
    "l1", "l2", "taylor", "lamp", "bn_scale", "random", "fpgm", "chip", "reconstruction", "reconstruction_data_free"
]


def _read_path(reader: Reader, node: Node, path: str) -> Any:
    """Text or null, with ``~`` replaced by the home folder."""
    value = reader.value(str | None, node, path, Rule(""))
    return os.path.expanduser(value) if isinstance(value, str) else value


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """Which network, with which weights."""

    name: str = option(doc="name of the network, torchvision:NAME, timm:NAME or package.module:factory")
    weights: str | None = option(
        None,
        "safetensors file; a relative path is looked for in the folder of data.root, then in the current one",
        parse=_read_path,
    )
    num_classes: int = option(10, "width of the output", ge=2)


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Which images, and how they are split and scaled."""

    name: Literal["digits", "image_folder"] = option(doc="digits of scikit-learn, or a folder of images")
    title: str | None = option(None, "what reports call the images; null for the name")
    root: str | None = option(
        None,
        "folder with train/<class>/*.jpg and test/<class>/*.jpg, or a tar archive of it, or the folder it lies in",
        parse=_read_path,
    )
    mean: tuple[float, ...] | None = option(
        None, "per channel, of pixels in [0, 1]; null for the data set's own (folders: ImageNet's)", min_length=1
    )
    std: tuple[float, ...] | None = option(None, "per channel, of pixels in [0, 1]", gt=0, min_length=1)
    batch_size: int = option(500, "images per evaluation step", ge=1)
    validation: float = option(0.1, "share of the training images held out", gt=0, lt=1)
    size: int | None = option(
        None, "side of the square that every image of a folder becomes, in pixels; null for as they are", ge=1
    )
    train_images: int | None = option(
        None, "read only N training images of a folder, of a fixed shuffle; null for all", ge=1
    )
    test_images: int | None = option(None, "evaluate on the first N of a fixed shuffle; null for all", ge=1)
    seed: int = option(0, "which images are held out", ge=0)
    on_corrupt: Literal["error", "skip"] = option("error", "what to do with an unreadable image")

    def check(self) -> Iterator[tuple[str, str]]:
        """An image folder needs a root that exists; digits are as they are."""
        if self.name == "image_folder" and self.root is None:
            yield "root", "missing; set it with --set data.root=FOLDER (or the path of an archive)"
        for key in ("size", "train_images"):
            if self.name == "digits" and getattr(self, key) is not None:
                yield key, "only for image_folder"
        if self.root is not None and not Path(self.root).exists():
            yield "root", f"'{self.root}' does not exist"


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    """How the dense network is trained when no weights are given."""

    epochs: int = option(10, "passes over the training images", ge=1)
    lr: float = option(0.05, "largest learning rate of the cosine schedule", gt=0)
    momentum: float = option(0.9, "of SGD", ge=0, lt=1)
    weight_decay: float = option(0.0005, "of SGD", ge=0)
    batch_size: int = option(64, "images per training step", ge=2)
    seed: int = option(0, "of the first weights and of the order of the images", ge=0)


@dataclass(frozen=True, kw_only=True)
class TargetSection:
    """How much of the network is left; the ratio is searched for."""

    macs: float | None = option(None, "share of the multiply-accumulates that is left", gt=0, lt=1)
    parameters: float | None = option(None, "share of the parameters that is left", gt=0, lt=1)

    def check(self) -> Iterator[tuple[str, str]]:
        """One of the two."""
        if (self.macs is None) == (self.parameters is None):
            yield "macs", "give either macs or parameters"

    @property
    def goal(self) -> tuple[str, float]:
        """The quantity by its key, and the share of it that is left."""
        return next((name, share) for name, share in vars(self).items() if share is not None)


@dataclass(frozen=True, kw_only=True)
class PruneSection:
    """What torch-pruning removes."""

    ratios: tuple[float, ...] | None = option(
        None, "share of the channels that go; null with a target", ge=0, lt=1, min_length=1
    )
    target: TargetSection | None = option(
        None, "macs or parameters: the share that is left, met within 2 %, instead of ratios"
    )
    overrides: Mapping[str, float] | None = option(
        None, "layer-name patterns with a ratio of their own; with global, outside the ranking", ge=0, lt=1
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


def _read_fusion(reader: Reader, node: Node, path: str) -> Any:
    """A preset name, or a mapping of ``preset`` and any fields of :class:`Fusion`."""
    if not isinstance(node.value, dict):
        name = node.value
        if isinstance(name, str) and name in PRESETS:
            return Fusion.preset(name)
        if isinstance(name, str):
            return reader.report(node.where, path, unknown("preset", name, PRESETS))
        return reader.report(node.where, path, f"expected a preset ({', '.join(PRESETS)}) or a section")
    settings = dict(node.value)
    preset = settings.pop("preset", None)
    base: Any = Fusion()
    if preset is not None:
        reader.places[f"{path}.preset"] = preset.where
        base = _read_fusion(reader, replace(preset, value=str(preset.value)), f"{path}.preset")
    known = {item.name: item for item in fields(Fusion)}
    allowed = {"preset": None, **known}
    for key in [key for key in settings if key not in known]:
        base = reader.report(settings[key].where, f"{path}.{key}", unknown("key", key, allowed))
        del settings[key]
    values = reader.entries(Fusion, replace(node, value=settings), path, known)
    for name, choices in Fusion.choices().items():
        if name in values and values[name] is not FAILED and values[name] not in choices:
            message = unknown("value", values[name], choices)
            values[name] = reader.report(settings[name].where, f"{path}.{name}", message)
    if base is FAILED or FAILED in values.values():
        return FAILED
    try:
        return replace(base, **values)
    except (ValueError, TypeError) as error:
        return reader.report(node.where, path, str(error))


def _fusion_schema() -> dict[str, Any]:
    preset, choices, kinds = {"enum": list(PRESETS)}, Fusion.choices(), get_type_hints(Fusion)
    settings = {
        item.name: {"enum": list(choices[item.name])}
        if item.name in choices
        else type_schema(kinds[item.name], Rule(""))
        for item in fields(Fusion)
    }
    section = {
        "type": "object",
        "properties": {"preset": preset, **settings},
        "required": [],
        "additionalProperties": False,
    }
    return {"anyOf": [preset, section]}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run, checked.

    Attributes:
        places: where each key was written, for messages that can only be given later.
        source: the file, as it was named.
    """

    model: ModelSection = option(doc="the network")
    data: DataSection = option(doc="the images")
    train: TrainSection | None = option(None, "how to train the network when there are no weights")
    prune: PruneSection = option(doc="what is removed")
    fusion: Fusion = option(
        PRESETS["data-free"],
        "preset name, or fields of Fusion over a preset",
        parse=_read_fusion,
        schema=_fusion_schema(),
    )
    output: str = option(doc="folder of the run")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where the network runs; auto takes a GPU if there is one")
    threads: int | None = option(
        None, "processor threads of torch; null for torch's choice; 1 gives the same numbers on every machine", ge=1
    )
    places: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    source: str = field(default="", repr=False, compare=False)

    def check(self) -> Iterator[tuple[str, str]]:
        """There is a network with the layers that are named, and the weights exist."""
        if self.model is None:
            return
        if self.model.name is not None:
            yield from _layer_problems(self.model, self.prune)
        if self.model.weights is None and self.train is None:
            yield "model.weights", "missing; give a safetensors file, or add a section 'train'"
        if self.model.weights is not None:
            tried = weight_places(self.model.weights, self.data.root if self.data else None)
            if not any(path.is_file() for path in tried):
                yield "model.weights", f"no such file: {' or '.join(map(str, tried))}"

    @property
    def title(self) -> str:
        """What was pruned, in a few words."""
        return f"{self.model.name} on {self.data.title or self.data.name}"

    def fusion_text(self) -> str:
        """The fusion by its preset name where it has one."""
        names = [name for name, preset in PRESETS.items() if preset == self.fusion]
        return names[0] if names else str(self.fusion)

    def error(self, key: str, message: str) -> RecipeError:
        """A problem that showed only once the network or the images were there."""
        return RecipeError([Problem(self.places.get(key, self.source), key, message)])

    def weights_path(self) -> Path | None:
        """The weights file, or ``None`` if the network is trained."""
        if self.model.weights is None:
            return None
        tried = weight_places(self.model.weights, self.data.root)
        return next((path for path in tried if path.is_file()), tried[0])


def _layer_problems(model: ModelSection, prune: PruneSection | None) -> Iterator[tuple[str, str]]:
    """The network cannot be built, or a pattern matches none of its layers."""
    try:
        with torch.random.fork_rng(devices=[]):
            network = build_model(model.name, model.num_classes)
    except LabError as error:
        yield "model.name", str(error)
        return
    patterns = {f"prune.ignored[{i}]": pattern for i, pattern in enumerate((prune and prune.ignored) or ())}
    patterns |= {f"prune.overrides.{pattern}": pattern for pattern in (prune and prune.overrides) or ()}
    for key, pattern in patterns.items():
        try:
            find_layers(network, pattern)
        except LabError as error:
            yield key, str(error)


def weight_places(weights: str, root: str | None) -> list[Path]:
    """Where a weights file is looked for: beside the images first, then in the current folder."""
    path = Path(weights)
    if path.is_absolute() or root is None:
        return [path]
    folder = Path(root) if not Path(root).is_file() else Path(root).parent
    return [folder / path, path]


def load_recipe(path: Path | str, assignments: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: the YAML file.
        assignments: ``section.key=value`` overrides, checked like the file.

    Raises:
        RecipeError: with every problem: file and line, key, what is wrong, what is allowed.
        UsageError: the file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the recipe {path}: {error}") from None
    return read_recipe(text, str(path), assignments)


def read_recipe(text: str, source: str = "recipe", assignments: Sequence[str] = ()) -> Recipe:
    """:func:`load_recipe` on text."""
    tree = parse(text, source)
    reader = Reader()
    for assignment in assignments:
        try:
            tree = override(tree, *parse_assignment(assignment), {"fusion": "preset"})
        except RecipeError as error:
            reader.problems += error.problems
    recipe = reader.section(Recipe, tree, "")
    if reader.problems:
        raise RecipeError(reader.problems)
    return replace(recipe, places=reader.places, source=source)


def to_mapping(section: Any) -> dict[str, Any]:
    """A section as plain values under the names of the recipe; what a resolved recipe is written from."""
    result: dict[str, Any] = {}
    for item in options(section):
        value = getattr(section, item.name)
        if isinstance(value, Fusion):
            value = asdict(value)
        elif hasattr(value, "__dataclass_fields__"):
            value = to_mapping(value)
        result[key_of(item)] = list(value) if isinstance(value, tuple) else value
    return result


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "intrafusion recipe",
        **json_schema(Recipe),
    }


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe: every key with its value, paths absolute; reading it gives an equal recipe."""
    weights = recipe.weights_path()
    resolved = replace(
        recipe,
        model=replace(recipe.model, weights=None if weights is None else str(weights.resolve())),
        data=replace(recipe.data, root=recipe.data.root and str(Path(recipe.data.root).resolve())),
    )
    return yaml.safe_dump(to_mapping(resolved), sort_keys=False, allow_unicode=True)
