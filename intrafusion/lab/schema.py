"""From a tree of nodes to frozen dataclasses, driven by their fields alone.

A section is a keyword-only frozen dataclass whose fields are made with :func:`option`. Types say what is accepted;
the metadata says the range and the documentation. A new key is a new field: nothing here changes.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from intrafusion.lab.errors import Problem
from intrafusion.lab.nodes import Node

FAILED: Any = object()
_WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false"}
_JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
Parser = Callable[["Reader", Node, str], Any]


@runtime_checkable
class Checked(Protocol):
    """A section with rules between its keys: ``check`` yields ``(key, what is wrong)``.

    It may be called on a draft that has the fields but not the methods, with ``None`` for required keys that failed.
    """

    def check(self) -> Iterator[tuple[str, str]]: ...


@runtime_checkable
class Located(Protocol):
    """A section that needs something of this machine: ``check_here`` is ``check`` for files, folders, packages."""

    def check_here(self) -> Iterator[tuple[str, str]]: ...


@dataclass(frozen=True)
class Rule:
    """What a field's metadata says: its documentation, its range, its name in the file, a parser of its own.

    ``min_length`` bounds the number of entries of a list; the range then holds for each of them. ``schema`` is the JSON
    schema of what ``parse`` accepts, where the type does not say it.
    """

    doc: str
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    min_length: int = 0
    key: str | None = None
    parse: Parser | None = None
    schema: Mapping[str, Any] | None = None

    def range_text(self) -> str:
        """The range in words: ``at least 0 and below 1``; empty if there is none."""
        words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
        parts = [f"{word} {getattr(self, name):g}" for name, word in words.items() if getattr(self, name) is not None]
        return " and ".join(parts)

    def allows(self, value: float) -> bool:
        """Whether a number is inside the range; nan never is."""
        return (
            value == value
            and (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )


def option(default: Any = MISSING, doc: str = "", **rule: Any) -> Any:
    """A dataclass field of a section; without ``default`` the key is required. See :class:`Rule` for the rest."""
    metadata = {"rule": Rule(doc, **rule)}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def options(cls: type) -> list[Field[Any]]:
    """The fields of a section that a recipe may set."""
    return [item for item in fields(cls) if "rule" in item.metadata]


def rule_of(item: Field[Any]) -> Rule:
    """The rule of a field; a field of a foreign dataclass has an empty one."""
    return item.metadata.get("rule", Rule(""))


def key_of(item: Field[Any]) -> str:
    """The field's name in a recipe: ``global_pruning`` is written ``global``."""
    return rule_of(item).key or item.name


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
        for key in [key for key in absent if _is_required(known[key]) and key not in misspelt]:
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
        return self.report(node.where, path, f"expected {_choices(allowed)}, got {_shown(node)}")

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


def type_text(kind: Any, rule: Rule | None = None) -> str:
    """A type and a range in the words of a recipe: ``list of numbers above 0, or null``."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_text(a, rule) if a is not type(None) else "null" for a in arguments)
    if origin is Literal:
        return _choices(arguments)
    if origin is tuple:
        item = "texts" if arguments[0] is str else f"{_WORDS.get(arguments[0], 'value')}s"
        text = f"list of {item}"
    elif origin is Mapping:
        text = f"mapping of names to {_WORDS[arguments[1]]}s"
    else:
        text = _WORDS.get(kind, "section" if is_dataclass(kind) else getattr(kind, "__name__", str(kind)))
    return f"{text} {rule.range_text()}" if rule and rule.range_text() else text


def describe(cls: type, item: Field[Any]) -> str:
    """Type, range and default of a key in one line, as it stands above the key in the shipped recipes."""
    text = type_text(typing.get_type_hints(cls)[item.name], rule_of(item))
    return f"{text}, required" if _is_required(item) else f"{text}, default {_default_text(item.default)}"


def json_schema(cls: type) -> dict[str, Any]:
    """The JSON schema of a section, for editors: what :class:`Reader` accepts, but for rules between keys."""
    known, hints = {key_of(item): item for item in options(cls)}, typing.get_type_hints(cls)
    return {
        "type": "object",
        "description": (cls.__doc__ or "").splitlines()[0],
        "properties": {key: _property_schema(hints[item.name], item) for key, item in known.items()},
        "required": [key for key, item in known.items() if _is_required(item)],
        "additionalProperties": False,
    }


def _property_schema(kind: Any, item: Field[Any]) -> dict[str, Any]:
    rule = rule_of(item)
    schema = {"description": rule.doc} | (dict(rule.schema) if rule.schema else type_schema(kind, rule))
    if not _is_required(item) and not is_dataclass(item.default):
        schema["default"] = list(item.default) if isinstance(item.default, tuple) else item.default
    return schema


def type_schema(kind: Any, rule: Rule) -> dict[str, Any]:
    """The JSON schema of one type within the range of ``rule``."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [type_schema(argument, rule) for argument in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        return {"type": "array", "items": type_schema(arguments[0], rule), "minItems": rule.min_length}
    if origin is Mapping:
        return {"type": "object", "additionalProperties": type_schema(arguments[1], rule)}
    if is_dataclass(kind):
        return json_schema(typing.cast(type, kind))
    bounds = {word: getattr(rule, name) for name, word in _BOUNDS.items()} if kind in (int, float) else {}
    return {"type": _JSON_TYPES[kind]} | {word: bound for word, bound in bounds.items() if bound is not None}


def _default_text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(_default_text, value))}]"
    return str(value)


def _is_required(item: Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _is_within(key: str, section: str) -> bool:
    return key == section or key.startswith((f"{section}.", f"{section}["))


def _choices(allowed: tuple[Any, ...]) -> str:
    return " | ".join(str(choice) for choice in allowed)


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
