"""What a section of a recipe may say: fields with types, ranges and documentation, in words and as a JSON schema.

A section is a keyword-only frozen dataclass whose fields are made with :func:`option`. Types say what is accepted;
the metadata says the range and the documentation. A new key is a new field: nothing here changes.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from intrafusion.lab.recipe.nodes import Node

_WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false"}
_JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
Parser = Callable[[Any, Node, str], Any]
"""``(reader, node, key path) -> value``: see :class:`intrafusion.lab.recipe.reader.Reader`."""


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


def type_text(kind: Any, rule: Rule | None = None) -> str:
    """A type and a range in the words of a recipe: ``list of numbers above 0, or null``."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_text(a, rule) if a is not type(None) else "null" for a in arguments)
    if origin is Literal:
        return choices(arguments)
    if origin is tuple:
        if typing.get_origin(arguments[0]) is Literal:
            item = type_text(arguments[0])
        else:
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
    return f"{text}, required" if is_required(item) else f"{text}, default {_default_text(item.default)}"


def json_schema(cls: type) -> dict[str, Any]:
    """The JSON schema of a section, for editors: what :class:`Reader` accepts, but for rules between keys."""
    known, hints = {key_of(item): item for item in options(cls)}, typing.get_type_hints(cls)
    return {
        "type": "object",
        "description": (cls.__doc__ or "").splitlines()[0],
        "properties": {key: _property_schema(hints[item.name], item) for key, item in known.items()},
        "required": [key for key, item in known.items() if is_required(item)],
        "additionalProperties": False,
    }


def _property_schema(kind: Any, item: Field[Any]) -> dict[str, Any]:
    rule = rule_of(item)
    schema = {"description": rule.doc} | (dict(rule.schema) if rule.schema else type_schema(kind, rule))
    if not is_required(item) and not is_dataclass(item.default):
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


def is_required(item: Field[Any]) -> bool:
    """Whether a recipe must have the key."""
    return item.default is MISSING and item.default_factory is MISSING


def choices(allowed: tuple[Any, ...]) -> str:
    """``a | b | c``"""
    return " | ".join(str(choice) for choice in allowed)
