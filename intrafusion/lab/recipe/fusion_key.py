"""The key ``fusion`` of a recipe: a preset's name, or fields of :class:`Fusion` over a preset."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any, get_type_hints

from intrafusion.lab.recipe.nodes import Node
from intrafusion.lab.recipe.reader import FAILED, Reader, unknown
from intrafusion.lab.recipe.schema import Rule, type_schema
from intrafusion.prune.fusion import FEATURES, PRESETS, Fusion

_NAMED = re.compile(r"[\w.]+:\w+")
"""A merge rule that is imported by name: `Fusion` says whether it can be."""


def read_fusion(reader: Reader, node: Node, path: str) -> Any:
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
        base = read_fusion(reader, replace(preset, value=str(preset.value)), f"{path}.preset")
    known = {item.name: item for item in fields(Fusion)}
    allowed = {"preset": None, **known}
    for key in [key for key in settings if key not in known]:
        base = reader.report(settings[key].where, f"{path}.{key}", unknown("key", key, allowed))
        del settings[key]
    values = reader.entries(Fusion, replace(node, value=settings), path, known)
    for name, choices in Fusion.choices().items():
        if name == "merge" and _NAMED.fullmatch(str(values.get(name))):
            continue
        if name in values and values[name] is not FAILED and values[name] not in choices:
            message = unknown("value", values[name], choices)
            values[name] = reader.report(settings[name].where, f"{path}.{name}", message)
    if values.get("features", FAILED) is not FAILED:
        values["features"] = _checked_features(reader, values["features"], f"{path}.features")
    if base is FAILED or FAILED in values.values():
        return FAILED
    try:
        return replace(base, **values)
    except (ValueError, TypeError) as error:
        return reader.report(node.where, path, str(error))


def _checked_features(reader: Reader, names: tuple[str, ...], path: str) -> Any:
    """Each entry that is no feature is a problem at its own place; what only shows together, at the whole key."""
    bad = [i for i, name in enumerate(names) if name not in FEATURES]
    for i in bad:
        reader.report(reader.places[f"{path}[{i}]"], f"{path}[{i}]", unknown("value", names[i], FEATURES))
    return FAILED if bad else names


def fusion_schema() -> dict[str, Any]:
    """The JSON schema of the key."""
    preset, choices, kinds = {"enum": list(PRESETS)}, Fusion.choices(), get_type_hints(Fusion)
    settings = {
        item.name: {"enum": list(choices[item.name])}
        if item.name in choices
        else type_schema(kinds[item.name], Rule(""))
        for item in fields(Fusion)
    }
    settings["merge"] = {"anyOf": [settings["merge"], {"type": "string", "pattern": f"^{_NAMED.pattern}$"}]}
    settings["features"] = {"type": "array", "items": {"enum": list(FEATURES)}, "minItems": 1, "uniqueItems": True}
    section = {
        "type": "object",
        "properties": {"preset": preset, **settings},
        "required": [],
        "additionalProperties": False,
    }
    return {"anyOf": [preset, section]}
