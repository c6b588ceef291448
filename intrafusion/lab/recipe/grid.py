"""The grid of a sweep: which keys of a recipe take which values, and every combination of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from intrafusion.lab.errors import Problem, RecipeError
from intrafusion.lab.recipe.nodes import Node, parse_assignment
from intrafusion.lab.recipe.reader import FAILED, Reader, plain

GRID_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "additionalProperties": {"type": "array", "items": {}, "minItems": 1},
}
_FIXED = ("output", "sweep", "threads")
"""Keys that are the whole sweep's: where it goes, what it is, and on how many threads its numbers depend."""
_WANTED = "expected keys with lists of values, as in {prune.importance: [l1, l2]}"

Grid = dict[str, list[Node]]


def read_grids(reader: Reader, node: Node, path: str) -> Any:
    """One mapping of keys to lists of values, or a list of such mappings; the combinations of each are run.

    Returns a tuple of plain mappings, ``None`` for null, or the mark of failure.
    """
    if node.value is None:
        return None
    if node.value == []:
        return reader.report(node.where, path, _WANTED)
    before = len(reader.problems)
    found = []
    for number, entry in enumerate(_entries(node)):
        here = f"{path}[{number}]" if isinstance(node.value, list) else path
        if not isinstance(entry.value, dict) or not entry.value:
            reader.report(entry.where, here, _WANTED)
            continue
        for key, values in entry.value.items():
            problem = _problem(key, values)
            if problem:
                reader.report(values.where, f"{here}.{key}", problem)
        found.append({key: plain(values) for key, values in entry.value.items()})
    return tuple(found) if len(reader.problems) == before else FAILED


def grids_of(node: Node | None) -> list[Grid]:
    """The grids of a section that :func:`read_grids` has accepted; none for a recipe without the section."""
    if node is None or node.value is None:
        return []
    return [{key: values.value for key, values in entry.value.items()} for entry in _entries(node)]


def parse_grid(arguments: Sequence[str]) -> list[Grid]:
    """``["a.b=1,2", "c=x,y"]``, as on a command line, as one grid; a value with commas stands in brackets.

    Raises:
        RecipeError: with every argument that is no grid.
    """
    grid: Grid = {}
    problems: list[Problem] = []
    for argument in arguments:
        where = f"--grid {argument}"
        key, equals, values = argument.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            problems.append(Problem(where, "", "expected --grid section.key=value,value"))
            continue
        try:
            _, node = parse_assignment(f"{key}=[{values}]", where)
        except RecipeError as error:
            problems += error.problems
            continue
        problem = "given twice" if key in grid else _problem(key, node)
        if problem:
            problems.append(Problem(where, key, problem))
        else:
            grid[key] = node.value
    if problems:
        raise RecipeError(problems)
    return [grid] if grid else []


def combinations(grids: Sequence[Grid]) -> Iterator[dict[str, Node]]:
    """Every combination of every grid in order, each once."""
    seen = set()
    for grid in grids:
        for values in itertools.product(*grid.values()):
            point = dict(zip(grid, values, strict=True))
            text = str({key: plain(value) for key, value in sorted(point.items())})
            if text not in seen:
                seen.add(text)
                yield point


def value_text(node: Node) -> str:
    """A value as it is written on one line of YAML."""
    text = yaml.safe_dump(plain(node), default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...").strip()


def _entries(node: Node) -> list[Node]:
    return node.value if isinstance(node.value, list) else [node]


def _problem(key: str, values: Node) -> str:
    first = key.split(".")[0]
    if first in _FIXED:
        return f"'{first}' belongs to the whole sweep and cannot be a part of its grid"
    if not isinstance(values.value, list):
        return "expected a list of values"
    if not values.value:
        return "expected at least 1 value, got an empty list"
    texts = [value_text(value) for value in values.value]
    twice = next((text for text in texts if texts.count(text) > 1), None)
    return f"the value {twice} is given twice" if twice else ""
