"""Methods that a test registers."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest

from intrafusion.methods import METHODS


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    """What a test registers is gone when it is over."""
    with mock.patch.dict(METHODS):
        yield
