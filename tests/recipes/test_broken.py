"""Every broken recipe beside this file gives exactly the message that is kept beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from intrafusion.lab.errors import RecipeError
from intrafusion.lab.recipe.loader import load_recipe

BROKEN = Path(__file__).parent / "broken"


def message(path: Path) -> str:
    """What loading a recipe says; its first lines may be ``# --set`` arguments."""
    lines = path.read_text().splitlines()
    given = [line.removeprefix("# --set ") for line in lines if line.startswith("# --set ")]
    with pytest.raises(RecipeError) as error:
        load_recipe(path.name, given)
    return f"{error.value}\n"


@pytest.mark.parametrize("path", sorted(BROKEN.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_broken_recipe_says_exactly_what_is_wrong(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(BROKEN)
    assert message(path) == path.with_suffix(".txt").read_text()


def test_every_recipe_has_its_message() -> None:
    names = [sorted(path.stem for path in BROKEN.glob(f"*.{suffix}")) for suffix in ("yaml", "txt")]
    assert names[0] == names[1]
    assert len(names[0]) >= 20
