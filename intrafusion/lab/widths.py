"""Widths that hardware may handle badly: what a dry run and a report say about them."""

from __future__ import annotations

from collections.abc import Iterable

MULTIPLE = 8
"""Channels in multiples of which NVIDIA's tensor cores take fp16 and bf16; docs/deploy.md has what we measured."""
_NAMED = 6


def odd_widths(groups: Iterable[tuple[str, int, int]]) -> tuple[str, ...]:
    """The groups, given as name and width before and after, that pruning leaves with a width that is no multiple."""
    return tuple(f"{name} {after}" for name, before, after in groups if after != before and after % MULTIPLE)


def width_note(odd: tuple[str, ...]) -> str:
    """Which widths are no multiples of 8, and who cares; empty for none."""
    if not odd:
        return ""
    more = f" and {len(odd) - _NAMED} more" if len(odd) > _NAMED else ""
    return (
        f"Widths that are no multiples of {MULTIPLE}: {', '.join(odd[:_NAMED])}{more}. NVIDIA's tensor cores want "
        f"multiples of {MULTIPLE} in fp16 and bf16; on a CPU measure before you round (docs/deploy.md)."
    )
