"""What is the same for every data set: which images are held out, how pixels are scaled, what classes are called."""

from __future__ import annotations

from intrafusion.lab.data.dataset import Split
from intrafusion.lab.errors import LabError
from intrafusion.schedule import stratified

Values = tuple[float, ...] | None
"""Of a key of a recipe: one per channel, or ``None`` for the data set's own."""


def hold_out(split: Split, name: str, share: float, seed: int) -> Split:
    """The ``train`` or ``validation`` part of all training images, every class in proportion.

    Raises:
        LabError: no image is left for it.
    """
    rest, held = stratified(split.labels, share, seed=seed)
    chosen = held if name == "validation" else rest
    if len(chosen) == 0:
        raise LabError(
            f"a validation share of {share} leaves no {name} images of the {len(split)} training images; "
            "change data.validation"
        )
    return split.take(chosen)


def statistics_or(
    mean: Values, std: Values, default: tuple[tuple[float, ...], tuple[float, ...]], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixels in [0, 1]: those of the recipe, or ``default`` where it gives none.

    Raises:
        LabError: neither one value nor one per channel.
    """
    chosen = (mean or default[0], std or default[1])
    for name, values in zip(("mean", "std"), chosen, strict=True):
        if len(values) not in (1, channels):
            raise LabError(f"data.{name} has {len(values)} values; the images have {channels} channels")
    return chosen[0], chosen[1]


def numbered(count: int) -> tuple[str, ...]:
    """Names of classes that have only numbers."""
    return tuple(str(number) for number in range(count))
