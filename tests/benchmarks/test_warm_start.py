"""The benchmark of warm optimizers runs, and the two starts differ."""

from __future__ import annotations

import math

from benchmarks import warm_start


def test_both_ways_train_on_after_the_step(monkeypatch):
    monkeypatch.setattr(warm_start, "BEFORE", 1)
    carried, new = (warm_start.losses_after(warm_start.OPTIMIZERS["AdamW"], 0, 0.3, carry) for carry in (True, False))
    assert all(math.isfinite(loss) for loss in [*carried, *new])
    assert carried != new
    assert carried[-1] < carried[0]
