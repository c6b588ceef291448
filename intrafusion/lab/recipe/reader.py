"""From a tree of nodes to sections, driven by their fields alone."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, is_dataclass
from typing import Any, Literal

from intrafusion.lab.errors import Problem
from intrafusion.lab.recipe.nodes import Node
from intrafusion.lab.recipe.schema import (
    Checked,
    Located,
    Rule,
    choices,
    is_required,
    key_of,
    options,
    rule_of,
    type_text,
)

FAILED: Any = object()


class Reader:
    """Reads nodes as types and collects every problem instead of stopping at the first.

    ``here`` off leaves out what depends on this machine: a recipe is then read to be looked at, not to be run.

    Attributes:
        problems: what was wrong so far.
        places: where each key path was written.
    """

    def __init__(self, here: bool = True) -> None:
        self.here = here
        self.problems: list[Problem] = []
        self.places: dict[str, str] = {}
        self._drafts: dict[str, types.SimpleNamespace] = {}

    def report(self, where: str, key: str, message: str) -> Any:
        """Note a problem and return the mark of failure."""
        self.problems.append(Problem(where, key, message))
        return FAILED

    def section(self, cls: type, node: Node, path: str) -> Any:
        """Read a mapping as the dataclass ``cls``; unknown and missing keys are problems, one each.

        The rules between keys are checked even if some keys failed, with their defaults in place.
        """
        known = {key_of(item): item for item in options(cls)}
        if not isinstance(node.value, dict):
            self._draft(path, known, {})
            return self.report(node.where, path, f"expected a section with keys, got {_shown(node)}")
        values = self.entries(cls, node, path, known)
        strangers = [key for key in node.value if key not in known]
        absent = [key for key in known if key not in node.value]
        misspelt = {key for key in absent if difflib.get_close_matches(key, strangers, n=1)}  # one problem, not two
        for key in [key for key in absent if is_required(known[key]) and key not in misspelt]:
            wanted = type_text(typing.get_type_hints(cls)[known[key].name], rule_of(known[key]))
            values[key] = self.report(node.where, _join(path, key), f"missing; expected {wanted}")
        failed = FAILED in values.values()
        draft = self._draft(path, known, values)
        wrong = list(cls.check(draft)) if issubclass(cls, Checked) else []
        if self.here and issubclass(cls, Located):
            wrong += cls.check_here(draft)
        for key, message in wrong:
            full = _join(path, key)
            if key not in misspelt and not any(_is_within(problem.key, full) for problem in self.problems):
                self.report(self.places.get(full, node.where), full, message)
        if failed or wrong:
            return FAILED
        return cls(**{known[key].name: value for key, value in values.items()})

    def _draft(self, path: str, known: Mapping[str, Field[Any]], values: Mapping[str, Any]) -> Any:
        draft = types.SimpleNamespace()
        for key, item in known.items():
            value = values.get(key, item.default)
            if value is FAILED:
                value = self._drafts.get(_join(path, key), item.default)
            setattr(draft, item.name, None if value is MISSING else value)
        self._drafts[path] = draft
        return draft

    def entries(
        self, cls: type, node: Node, path: str, known: Mapping[str, Field[Any]]
    ) -> dict[str, Any]:  # fmt: skip
        """Read the keys of a mapping that ``known`` allows; values that failed are ``FAILED``."""
        hints = typing.get_type_hints(cls)
        values: dict[str, Any] = {}
        for key, child in node.value.items():
            full = _join(path, key)
            self.places[full] = child.where
            if key not in known:
                values[key] = self.report(child.where, full, unknown("key", key, known))
                continue
            rule = rule_of(known[key])
            if rule.parse is not None:
                values[key] = rule.parse(self, child, full)
            else:
                values[key] = self.value(hints[known[key].name], child, full, rule)
        return values

    def value(self, kind: Any, node: Node, path: str, rule: Rule) -> Any:
        """Read one value as the type ``kind``, within the range of ``rule``."""
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if kind is Any:
            return plain(node)
        if origin in (typing.Union, types.UnionType):
            return self._union(kind, arguments, node, path, rule)
        if origin is Literal:
            return self._literal(arguments, node, path)
        if origin is tuple:
            return self._tuple(kind, arguments[0], node, path, rule)
        if origin is Mapping:
            return self._mapping(kind, arguments[1], node, path, rule)
        if isinstance(kind, type) and is_dataclass(kind):
            return self.section(kind, node, path)
        return self._scalar(kind, node, path, rule)

    def _union(self, kind: Any, arguments: tuple[Any, ...], node: Node, path: str, rule: Rule) -> Any:
        if node.value is None:
            return None if type(None) in arguments else self._wrong(kind, node, path, rule)
        choices = [argument for argument in arguments if argument is not type(None)]
        if len(choices) == 1:
            return self.value(choices[0], node, path, rule)
        for choice in choices:
            attempt = Reader(self.here)
            value = attempt.value(choice, node, path, rule)
            if value is not FAILED:
                return value
        return self._wrong(kind, node, path, rule)

    def _literal(self, allowed: tuple[Any, ...], node: Node, path: str) -> Any:
        candidates = (node.value, node.raw) if node.typed else (node.value,)
        for candidate in candidates:
            for choice in allowed:
                if type(choice) is type(candidate) and choice == candidate:
                    return choice
        if isinstance(node.value, str):
            return self.report(node.where, path, unknown("value", node.value, [str(choice) for choice in allowed]))
        return self.report(node.where, path, f"expected {choices(allowed)}, got {_shown(node)}")

    def _tuple(self, kind: Any, item: Any, node: Node, path: str, rule: Rule) -> Any:
        children = node.value
        if node.typed and not isinstance(children, list | dict | None):
            parts = (node.raw or "").split(",")
            children = [Node(_retyped(part.strip()), node.where, part.strip(), True) for part in parts]
        if not isinstance(children, list):
            return self._wrong(kind, node, path, rule)
        if len(children) < rule.min_length:
            return self.report(node.where, path, f"expected at least {rule.min_length} entry, got an empty list")
        self.places |= {f"{path}[{i}]": child.where for i, child in enumerate(children)}
        values = [self.value(item, child, f"{path}[{i}]", rule) for i, child in enumerate(children)]
        return FAILED if FAILED in values else tuple(values)

    def _mapping(self, kind: Any, item: Any, node: Node, path: str, rule: Rule) -> Any:
        if not isinstance(node.value, dict):
            return self._wrong(kind, node, path, rule)
        self.places |= {_join(path, key): child.where for key, child in node.value.items()}
        values = {key: self.value(item, child, _join(path, key), rule) for key, child in node.value.items()}
        return FAILED if FAILED in values.values() else values

    def _scalar(self, kind: Any, node: Node, path: str, rule: Rule) -> Any:
        value: Any = node.value
        if kind is str:
            text = node.raw if node.typed and value is not None else value
            return text if isinstance(text, str) else self._wrong(kind, node, path, rule)
        if kind is bool:
            return value if isinstance(value, bool) else self._wrong(kind, node, path, rule)
        if kind is float and isinstance(value, str):
            value = _number(value)  # YAML 1.1 reads 1e-3 as text
        if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
            return self._wrong(kind, node, path, rule)
        if not rule.allows(value):
            return self.report(node.where, path, f"expected {type_text(kind, rule)}, got {value:g}")
        return kind(value)

    def _wrong(self, kind: Any, node: Node, path: str, rule: Rule) -> Any:
        return self.report(node.where, path, f"expected {type_text(kind, rule)}, got {_shown(node)}")


def unknown(what: str, given: str, allowed: Any) -> str:
    """``unknown key 'ratio'; did you mean 'ratios'? allowed: ...``"""
    names = [str(name) for name in allowed]
    close = difflib.get_close_matches(given, names, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ";"
    return f"unknown {what} '{given}'{hint} allowed: {', '.join(names)}"


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _is_within(key: str, section: str) -> bool:
    return key == section or key.startswith((f"{section}.", f"{section}["))


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _retyped(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def plain(node: Node) -> Any:
    """The value of a tree without its places."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    return [plain(child) for child in node.value] if isinstance(node.value, list) else node.value


def _shown(node: Node) -> str:
    if isinstance(node.value, dict):
        return "a section"
    if isinstance(node.value, list):
        return "a list"
    if node.value is None:
        return "nothing"
    return str(node.value).lower() if isinstance(node.value, bool) else repr(node.value)
