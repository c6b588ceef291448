"""YAML as a tree that remembers where every value was written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from intrafusion.lab.errors import Problem, RecipeError

_MAP, _SEQ = "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"
_SCALARS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "timestamp"))
_MAX_DEPTH = 20
_MAX_NODES = 10_000


@dataclass(frozen=True)
class Node:
    """A value with its place.

    Attributes:
        value: ``dict[str, Node]``, ``list[Node]`` or a scalar.
        where: ``file:line``, or the ``--set`` argument.
        raw: the text as it was typed, for scalars; lets ``--set name=007`` mean the text "007".
        typed: whether the value comes from the command line.
    """

    value: Any
    where: str
    raw: str | None = None
    typed: bool = False


def parse(text: str, file: str) -> Node:
    """Read YAML with the safe loader.

    Raises:
        RecipeError: the text is no YAML, is empty, repeats a key, refers to itself or carries a tag of its own.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}:{mark.line + 1}" if mark else file
        raise RecipeError([Problem(where, "", f"not valid YAML: {error.problem or error.context}")]) from None
    except yaml.YAMLError as error:
        raise RecipeError([Problem(file, "", f"not valid YAML: {error}")]) from None
    if root is None:
        raise RecipeError([Problem(file, "", "the recipe is empty")])
    builder = _Builder(file)
    tree = builder.build(root)
    if builder.problems:
        raise RecipeError(builder.problems)
    return tree


def parse_assignment(argument: str, where: str = "") -> tuple[list[str], Node]:
    """``a.b=c`` to ``(["a", "b"], c)`` where ``c`` is read as YAML, or as plain text where that fails.

    ``where`` is the place that the value remembers, the argument itself if not given.

    Raises:
        RecipeError: there is no ``=`` or an empty name in the path.
    """
    path, equals, value = argument.partition("=")
    keys = path.strip().split(".")
    where = where or f"--set {argument}"
    if not equals or not all(keys):
        raise RecipeError([Problem(where, "", "expected --set section.key=value")])
    try:
        node = parse(value, where)
    except RecipeError:
        node = Node(value, where)
    return keys, _typed(node, where, value)


def override(tree: Node, keys: Sequence[str], value: Node, shorthands: Mapping[str, str]) -> Node:
    """``tree`` with the value at ``keys`` replaced.

    ``shorthands`` names, per path, the key that a bare scalar stands for (``{"fusion": "preset"}``), so that
    ``--set fusion.p=2`` keeps the ``paper`` of ``fusion: paper``.
    """
    return _override(tree, keys, value, shorthands, ())


def _override(
    tree: Node, keys: Sequence[str], value: Node, shorthands: Mapping[str, str], path: tuple[str, ...]
) -> Node:
    if not keys:
        return value
    children: dict[str, Node] = {}
    if isinstance(tree.value, dict):
        children = dict(tree.value)
    elif tree.value is not None and ".".join(path) in shorthands:
        children = {shorthands[".".join(path)]: tree}
    elif tree.value is not None:
        shown = ".".join(path)
        raise RecipeError([Problem(value.where, shown, f"'{shown}' is a value, not a section")])
    here = (*path, keys[0])
    below = children.get(keys[0], Node(None, value.where, typed=True))
    children[keys[0]] = _override(below, keys[1:], value, shorthands, here)
    return Node(children, tree.where, typed=tree.typed)


def _typed(node: Node, where: str, raw: str | None = None) -> Node:
    value = node.value
    if isinstance(value, dict):
        return Node({key: _typed(child, where, child.raw) for key, child in value.items()}, where, None, True)
    if isinstance(value, list):
        return Node([_typed(child, where, child.raw) for child in value], where, None, True)
    return Node(value, where, raw, True)


class _Builder:
    """Turns composed YAML into nodes; the count stops aliases that multiply without end."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self.count = 0

    def place(self, node: yaml.Node) -> str:
        return self.file if self.file.startswith("--") else f"{self.file}:{node.start_mark.line + 1}"

    def build(self, node: yaml.Node, path: str = "", depth: int = 0) -> Node:
        where = self.place(node)
        self.count += 1
        if depth > _MAX_DEPTH:
            self.problems.append(Problem(where, path, "nested too deeply, or an alias that contains itself"))
        elif self.count > _MAX_NODES:
            raise RecipeError([Problem(where, path, f"more than {_MAX_NODES} values; too large for a recipe")])
        elif isinstance(node, yaml.MappingNode) and node.tag == _MAP:
            return Node(self.mapping(node, path, depth), where)
        elif isinstance(node, yaml.SequenceNode) and node.tag == _SEQ:
            items = [self.build(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(node.value)]
            return Node(items, where)
        elif isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
            return self.scalar(node, path, where)
        else:
            self.problems.append(Problem(where, path, f"the YAML tag {node.tag} is not allowed"))
        return Node(None, where)

    def scalar(self, node: yaml.ScalarNode, path: str, where: str) -> Node:
        try:
            return Node(yaml.SafeLoader("").construct_object(node), where, node.value)
        except (ValueError, yaml.YAMLError) as error:
            self.problems.append(Problem(where, path, f"cannot read {node.value!r}: {error}"))
            return Node(None, where)

    def mapping(self, node: yaml.MappingNode, path: str, depth: int) -> dict[str, Node]:
        children: dict[str, Node] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
            full = f"{path}.{key}" if path else key
            child = self.build(value_node, full, depth + 1)
            if key in children:
                self.problems.append(
                    Problem(self.place(key_node), full, f"given twice; first at {children[key].where}")
                )
                continue
            # a section's place is the line of its key, not of its first entry
            children[key] = Node(child.value, self.place(key_node), child.raw)
        return children
