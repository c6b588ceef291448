"""Random states: those of an epoch, and those that a measurement leaves as they were."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def seeded(seed: int, epoch: int, device: torch.device) -> Iterator[None]:
    """Torch's generators as a seed and the number of an epoch decide, and afterwards as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed * 100_003 + epoch)
        yield


@contextmanager
def as_before(batches: Iterable[Any], seed: int, device: torch.device) -> Iterator[None]:
    """Going through batches leaves every random state as it was: torch's, Python's, NumPy's and the batches' own."""
    generator = getattr(batches, "generator", None)
    own, plain, arrays = generator and generator.get_state(), random.getstate(), np.random.get_state()
    try:
        with seeded(seed, 0, device):
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(arrays)
        if generator is not None:
            generator.set_state(own)
