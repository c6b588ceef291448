"""A table as text for the terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned to the right with spaces, a rule below the header."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], sides: str) -> str:
    """``sides`` says for each column whether it is aligned to the left, ``l``, or to the right, ``r``."""
    rules = ["---:" if side == "r" else "---" for side in sides]
    lines = [header, rules, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def to_csv(rows: Sequence[Mapping[str, object]]) -> str:
    """Lines with plain values under the keys of the first row; empty where one is ``None``."""
    target = io.StringIO()
    writer = csv.DictWriter(target, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return target.getvalue()
