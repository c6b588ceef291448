"""A smaller network with the same fault: lines of `forward` are left out for as long as it stays.

python -m tests.sweep --shrink 17 --presets calibrated
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import replace

import torch

from tests.sweep.checks import Row, check
from tests.sweep.generator import Drawn

_LINE = re.compile(r"^        (x\d+) = (.*)$")


def shrink(drawn: Drawn, preset: str, parts: Collection[str]) -> tuple[Drawn, Row]:
    """The smallest network found, and what it does. Raises ValueError if there is no fault."""
    row = check(drawn, preset, parts)
    wanted = _fault(row)
    if not wanted:
        raise ValueError(f"seed {drawn.seed} has no fault in {preset}")
    found = True
    while found:
        found = False
        for smaller in _smaller(drawn):
            if not _runs(smaller):
                continue
            tried = check(smaller, preset, parts)
            if _fault(tried) == wanted:
                drawn, row, found = smaller, tried, True
                break
    return drawn, row


def _fault(row: Row) -> tuple[str, ...]:
    """What must stay the same: the first kind, and where a crash comes from."""
    return (row.faults()[0], row.where, row.error[:25]) if row.faults() else ()


def _smaller(drawn: Drawn) -> Iterator[Drawn]:
    """The network without one line; then with one activation that is simpler."""
    lines = drawn.source.split("\n")
    for number in reversed(range(len(lines))):
        match = _LINE.match(lines[number])
        if match is None:
            continue
        for other in dict.fromkeys(re.findall(r"\bx\d*\b", match[2])):
            yield replace(drawn, source=_without(lines, number, match[1], other))
    for number, line in enumerate(lines):
        match = _LINE.match(line)
        inputs = set(re.findall(r"\bx\d*\b", match[2])) if match else set()
        if match is not None and len(inputs) == 1 and "self." not in line and "F.relu(" not in line and "(" in line:
            simple = [*lines[:number], f"        {match[1]} = F.relu({inputs.pop()})", *lines[number + 1 :]]
            yield replace(drawn, source="\n".join(simple))


def _without(lines: list[str], number: int, variable: str, other: str) -> str:
    """The source without a line, whose variable is another one's value; and without layers that nothing calls."""
    rest = [re.sub(rf"\b{variable}\b", other, line) for line in lines[:number] + lines[number + 1 :]]
    while dead := [i for i, line in enumerate(rest) if _is_dead(line, rest[i + 1 :])]:
        rest = [line for i, line in enumerate(rest) if i not in dead]
    forward = "\n".join(line for line in rest if "= nn." not in line and not _made(line))
    return "\n".join(line for line in rest if not (name := _made(line)) or re.search(rf"self\.{name}\b", forward))


def _is_dead(line: str, behind: list[str]) -> bool:
    match = _LINE.match(line)
    return match is not None and not any(re.search(rf"\b{match[1]}\b", later) for later in behind)


def _made(line: str) -> str:
    """The attribute that a line of `__init__` makes, '' for other lines."""
    match = re.match(r"^        self\.(\w+) = ", line)
    return match[1] if match else ""


def _runs(drawn: Drawn) -> bool:
    try:
        with torch.no_grad():
            drawn.model()(drawn.batch(2, part=2))
    except Exception:
        return False
    return True
