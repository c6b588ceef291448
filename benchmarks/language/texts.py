"""Texts: the standard library's documentation, which every Python carries, and WikiText-2 of the shared data."""

from __future__ import annotations

import ast
import os
import sysconfig
import zlib
from functools import cache
from pathlib import Path

TEXTS = ("documentation", "wikitext2")
_SHARES = {"test": range(5), "valid": range(5, 10), "train": range(10, 100)}
"""Of a hundred modules."""
_LEFT_OUT = {"site-packages", "test", "tests", "idlelib"}


def text(name: str, part: str) -> str:
    """One part ("train", "valid", "test") of a text. Raises FileNotFoundError if it is not on this machine."""
    return _documentation(part) if name == "documentation" else _wikitext(part)


@cache
def _documentation(part: str) -> str:
    """The docstrings of the standard library's modules; which part a module is in depends on its name alone."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in root.rglob("*.py") if _LEFT_OUT.isdisjoint(path.parts))
    found = []
    for path in files:
        if zlib.crc32(str(path.relative_to(root)).encode()) % 100 not in _SHARES[part]:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found += [doc for node in ast.walk(tree) if isinstance(node, kinds) and (doc := ast.get_docstring(node))]
    return "\n\n".join(found)


def _wikitext(part: str) -> str:
    folder = Path(os.environ.get("INTRAFUSION_DATA", "")) / "wikitext2"
    path = folder / f"{'test' if part == 'test' else 'valid'}.txt"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: set INTRAFUSION_DATA to the folder that has wikitext2 in it")
    return path.read_text(encoding="utf-8")
