# ruff: noqa: RUF009 - option() returns a dataclass field, as dataclasses.field does
"""The recipe of a run: its sections together, how it is read and checked all at once, and how it is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from intrafusion.fusion import PRESETS, Fusion
from intrafusion.lab.errors import LabError, Problem, RecipeError, UsageError
from intrafusion.lab.fusion_key import fusion_schema, read_fusion
from intrafusion.lab.models import build_model, find_layers
from intrafusion.lab.nodes import override, parse, parse_assignment
from intrafusion.lab.schema import Reader, json_schema, key_of, option, options
from intrafusion.lab.sections import DataSection, FinetuneSection, ModelSection, PruneSection, TrainSection


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
