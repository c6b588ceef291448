"""Widths that hardware may handle badly: what a dry run and a report say about them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MULTIPLE = 8
ADVICE = (
    f"NVIDIA advises multiples of {MULTIPLE} for fp16 and bf16 on tensor cores; on a CPU, at equal size, {MULTIPLE} "
    "gains little in fp32 and 16 gains more, above all in bf16 (docs/deploy.md)."
)
_NAMED = 6


def odd_widths(groups: Iterable[tuple[str, int, int]]) -> tuple[str, ...]:
    """The groups, given as name and width before and after, that pruning leaves with a width that is no multiple."""
    return tuple(f"{name} {after}" for name, before, after in groups if after != before and after % MULTIPLE)


def odd_note(odd: Sequence[str]) -> str:
    """Names the first of them."""
    more = f" and {len(odd) - _NAMED} more" if len(odd) > _NAMED else ""
    return f"Widths that are no multiples of {MULTIPLE}: {', '.join(odd[:_NAMED])}{more}."
