"""Results are tied to the code they depend on."""

from __future__ import annotations

from pathlib import Path

import pytest

import intrafusion
from intrafusion.lab.code_digest import PRUNING_CODE, TRAINING_CODE, code_digest
from intrafusion.lab.split import run, training
from tests.test_architecture import MAY_IMPORT

PACKAGE = Path(intrafusion.__file__).parent


def test_every_room_of_the_pruner_is_in_the_digest_of_pruning() -> None:
    assert {name.removesuffix(".py") for name in PRUNING_CODE} >= MAY_IMPORT["prune"]


@pytest.mark.parametrize("names", [PRUNING_CODE, TRAINING_CODE, run._FUSE_CODE, run._ON_THE_WAY_CODE, training._CODE])
def test_what_a_digest_is_of_exists(names: tuple[str, ...]) -> None:
    assert [name for name in names if not (PACKAGE / name).exists()] == []
    assert len({code_digest(names), *(code_digest([name]) for name in names)}) == len(names) + 1
