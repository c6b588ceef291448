"""What a step computes on a GPU is as precise as its numbers, and the user's settings are what they were."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter

import pytest
import torch

from intrafusion.running import full_precision

OWNERS = ("cuda.matmul", "cudnn.conv", "cudnn.rnn")
if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
    pytest.skip("before torch 2.9 there is one switch", allow_module_level=True)
SETTINGS = [attrgetter(name)(torch.backends) for name in OWNERS]


@pytest.fixture(autouse=True)
def as_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The settings are there without one; nobody would read them."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    before = [setting.fp32_precision for setting in SETTINGS]
    yield
    for setting, value in zip(SETTINGS, before, strict=True):
        setting.fp32_precision = value
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("chosen", ["nothing", "medium", "high", "tf32"])
def test_it_lasts_as_long_as_it_is_asked_for(chosen: str) -> None:
    if chosen in ("medium", "high"):
        torch.set_float32_matmul_precision(chosen)
    if chosen == "tf32":
        torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "tf32"
    before = [setting.fp32_precision for setting in SETTINGS]
    with full_precision():
        assert [setting.fp32_precision for setting in SETTINGS] == ["ieee"] * 3
    assert [setting.fp32_precision for setting in SETTINGS] == before
    if chosen in ("medium", "high"):
        assert torch.get_float32_matmul_precision() == chosen
