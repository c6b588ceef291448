"""What the lab raises when the person running it can put things right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class LabError(RuntimeError):
    """A mistake in the input or the surroundings; the message alone must be enough to correct it."""


class UsageError(LabError):
    """The command or the recipe is wrong; nothing was started."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a recipe: where it was written, which key, what is wrong and what is allowed."""

    where: str
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.key}: {self.message}" if self.key else f"{self.where}: {self.message}"


class RecipeError(UsageError):
    """Every problem of a recipe, reported at once."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        head = "1 problem in the recipe" if count == 1 else f"{count} problems in the recipe"
        super().__init__("\n  ".join([f"{head}:", *map(str, self.problems)]))

    def __reduce__(self) -> tuple[type[RecipeError], tuple[tuple[Problem, ...]]]:
        """So that it crosses from one process to another."""
        return RecipeError, (self.problems,)
