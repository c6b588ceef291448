# ruff: noqa: RUF009 - option() returns a dataclass field, as dataclasses.field does
"""The recipe of a run: its sections together, how it is read and checked all at once, and how it is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from intrafusion.lab.errors import LabError, Problem, RecipeError, UsageError
from intrafusion.lab.models import build_model, find_layers
from intrafusion.lab.pretrained import WrongClasses, find_pretrained
from intrafusion.lab.recipe.fusion_key import fusion_schema, read_fusion
from intrafusion.lab.recipe.grid import GRID_SCHEMA, Grid, combinations, grids_of, read_grids, value_text
from intrafusion.lab.recipe.nodes import Node, override, parse, parse_assignment
from intrafusion.lab.recipe.reader import Reader
from intrafusion.lab.recipe.schema import json_schema, key_of, option, options
from intrafusion.lab.recipe.sections import (
    DataSection,
    FinetuneSection,
    ModelSection,
    PruneSection,
    SplitSection,
    TrainSection,
    pretrained_name,
)
from intrafusion.prune.fusion import PRESETS, Fusion

_SHORTHANDS = {"fusion": "preset"}


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
        parse=read_fusion,
        schema=fusion_schema(),
    )
    finetune: FinetuneSection | None = option(None, "train both networks of every pair after pruning")
    split: SplitSection | None = option(None, "train on parts of the images, then prune and fuse into one network")
    sweep: tuple[Mapping[str, Any], ...] | None = option(
        None,
        "for `intrafusion sweep`: keys with lists of values, as in {prune.importance: [l1, l2]}, or a list of such",
        parse=read_grids,
        schema={"anyOf": [GRID_SCHEMA, {"type": "array", "items": GRID_SCHEMA, "minItems": 1}, {"type": "null"}]},
    )
    output: str = option(doc="folder of the run")
    keep: Literal["none", "fused", "all"] | None = option(
        None, "pruned networks that stay in the folder; null for fused, or none with groups: each"
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where the network runs; auto takes a GPU if there is one")
    threads: int | None = option(
        None, "processor threads of torch; null for torch's choice; 1 gives the same numbers on every machine", ge=1
    )
    places: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    source: str = field(default="", repr=False, compare=False)

    def check(self) -> Iterator[tuple[str, str]]:
        """The weights come from somewhere."""
        if self.model is not None and self.model.weights is None and self.train is None:
            yield "model.weights", "missing; give a safetensors file, or add a section 'train'"
        if self.split is not None:
            yield from _split_problems(self)

    def check_here(self) -> Iterator[tuple[str, str]]:
        """There is a network with the layers that are named, and the weights exist."""
        if self.model is None:
            return
        if self.model.name is not None:
            yield from _layer_problems(self.model, self.prune)
        if pretrained_name(self.model.weights) is not None:
            yield from _pretrained_problems(self.model)
        elif self.model.weights is not None:
            tried = weight_places(self.model.weights, self.data.root if self.data else None)
            if not any(path.is_file() for path in tried):
                hint = "; did you mean 'pretrained'?" if get_close_matches(self.model.weights, ["pretrained"]) else ""
                yield "model.weights", f"no such file: {' or '.join(map(str, tried))}{hint}"

    @property
    def title(self) -> str:
        """What was pruned, in a few words."""
        return f"{self.model.name} on {self.data.shown}"

    @property
    def kept_methods(self) -> tuple[str, ...]:
        """The methods whose networks are kept."""
        keep = self.keep or ("none" if self.prune.groups == "each" else "fused")
        return {"none": (), "fused": ("fused",), "all": ("fused", "discard")}[keep]

    def fusion_text(self) -> str:
        """The fusion by its preset name where it has one."""
        names = [name for name, preset in PRESETS.items() if preset == self.fusion]
        return names[0] if names else str(self.fusion)

    def error(self, key: str, message: str) -> RecipeError:
        """A problem that showed only once the network or the images were there."""
        return RecipeError([Problem(self.places.get(key, self.source), key, message)])

    def weights_path(self) -> Path | None:
        """The weights file, or ``None`` if the network is trained or a library has its weights."""
        if self.model.weights is None or self.model.pretrained is not None:
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


def _split_problems(recipe: Any) -> Iterator[tuple[str, str]]:
    """A split trains every network itself, and prunes all groups of it to ratios that are given."""
    split, model, prune, finetune = recipe.split, recipe.model, recipe.prune, recipe.finetune
    if model is not None and model.weights is not None:
        yield "model.weights", "in conflict with split, whose networks are trained; leave out one of them"
    if prune is not None and prune.target is not None:
        yield "prune.target", "in conflict with split, which takes prune.ratios"
    if prune is not None and prune.groups == "each":
        yield "prune.groups", "each, in conflict with split, which prunes all groups at once"
    if prune is not None and prune.importance == "taylor" and split.prune_until:
        yield "prune.importance", "taylor, in conflict with split.prune_until: its gradients are taken before training"
    budgets = [epochs for epochs in split.budgets or () if epochs]
    if not budgets:
        return
    if finetune is None:
        yield "split.budgets", f"{budgets[0]} epochs of fine-tuning need a section 'finetune'"
        return
    if finetune.teacher:
        yield "finetune.teacher", "in conflict with split, where no dense network is the teacher of all"
    if finetune.warmup_epochs is not None and finetune.warmup_epochs >= min(budgets):
        yield "finetune.warmup_epochs", f"must be below every budget ({min(budgets)})"


def _pretrained_problems(model: ModelSection) -> Iterator[tuple[str, str]]:
    """The library has no such weights, or they do not fit, or they would have to be downloaded."""
    if model.name is None:
        return
    try:
        found = find_pretrained(model.name, pretrained_name(model.weights) or "")
        if model.num_classes is not None:
            found.check(model.num_classes, model.download)
    except WrongClasses as error:
        yield "model.num_classes", str(error)
    except LabError as error:
        yield "model.weights", str(error)


def weight_places(weights: str, root: str | None) -> list[Path]:
    """Where a weights file is looked for: beside the images first, then in the current folder."""
    path = Path(weights)
    if path.is_absolute() or root is None:
        return [path]
    folder = Path(root) if not Path(root).is_file() else Path(root).parent
    return [folder / path, path]


@dataclass(frozen=True)
class Point:
    """One recipe of a sweep: the keys that make it differ from the others, as text, and the recipe itself."""

    settings: Mapping[str, str]
    recipe: Recipe


def load_recipe(path: Path | str, assignments: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: the YAML file.
        assignments: ``section.key=value`` overrides, checked like the file.

    Raises:
        RecipeError: with every problem: file and line, key, what is wrong, what is allowed.
        UsageError: the file cannot be read.
    """
    return read_recipe(read_text(path), str(path), assignments)


def read_recipe(text: str, source: str = "recipe", assignments: Sequence[str] = (), *, here: bool = True) -> Recipe:
    """:func:`load_recipe` on text; ``here`` off accepts files, folders and packages that this machine lacks."""
    tree, problems = _assigned(parse(text, source), assignments)
    recipe, more = _read(tree, source, here)
    if recipe is None or problems:
        raise RecipeError([*problems, *more])
    return recipe


def read_points(
    text: str, source: str = "recipe", assignments: Sequence[str] = (), grids: Sequence[Grid] = ()
) -> list[Point]:
    """The recipes of a sweep: one for each combination of ``grids``, or of the recipe's own section ``sweep``.

    Without either there is one point, the recipe itself, with no settings.

    Raises:
        RecipeError: with every problem of every point, each once.
    """
    tree, problems = _assigned(parse(text, source), assignments)
    own = tree.value.get("sweep") if isinstance(tree.value, dict) else None
    if own is not None:
        reader = Reader()
        read_grids(reader, own, "sweep")
        problems += reader.problems
        tree = replace(tree, value={key: child for key, child in tree.value.items() if key != "sweep"})
    if problems:
        raise RecipeError(problems)
    points = []
    for values in list(combinations(grids or grids_of(own))) or [{}]:
        changed = tree
        for key, node in values.items():
            changed = override(changed, key.split("."), node, _SHORTHANDS)
        recipe, more = _read(changed, source, here=True)
        problems += [problem for problem in more if problem not in problems]
        if recipe is not None:
            points.append(Point({key: value_text(node) for key, node in values.items()}, recipe))
    if problems:
        raise RecipeError(problems)
    return points


def read_text(path: Path | str) -> str:
    """The text of a recipe.

    Raises:
        UsageError: the file cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the recipe {path}: {error}") from None


def _assigned(tree: Node, assignments: Sequence[str]) -> tuple[Node, list[Problem]]:
    problems: list[Problem] = []
    for assignment in assignments:
        try:
            tree = override(tree, *parse_assignment(assignment), _SHORTHANDS)
        except RecipeError as error:
            problems += error.problems
    return tree, problems


def _read(tree: Node, source: str, here: bool) -> tuple[Recipe | None, list[Problem]]:
    reader = Reader(here)
    recipe = reader.section(Recipe, tree, "")
    if reader.problems:
        return None, reader.problems
    return replace(recipe, places=reader.places, source=source), []


def to_mapping(section: Any) -> dict[str, Any]:
    """A section as plain values under the names of the recipe; what a resolved recipe is written from."""
    result: dict[str, Any] = {}
    for item in options(section):
        value = getattr(section, item.name)
        if isinstance(value, Fusion):
            value = asdict(value) | {"features": list(value.features)}
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
        model=recipe.model if weights is None else replace(recipe.model, weights=str(weights.resolve())),
        data=replace(recipe.data, root=recipe.data.root and str(Path(recipe.data.root).resolve())),
    )
    return yaml.safe_dump(to_mapping(resolved), sort_keys=False, allow_unicode=True)
