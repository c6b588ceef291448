"""A pytest plugin (`-p tests.hosted.swap`): whoever asks torch-pruning for a pruner is given ours, default preset."""

from __future__ import annotations

from typing import Any

import torch_pruning as tp

import intrafusion

OURS = {
    "BasePruner": intrafusion.IntraFusionPruner,
    "MetaPruner": intrafusion.IntraFusionPruner,
    "MagnitudePruner": intrafusion.IntraFusionPruner,
    "BNScalePruner": intrafusion.IntraFusionBNScalePruner,
    "GroupNormPruner": intrafusion.IntraFusionGroupNormPruner,
    "GrowingRegPruner": intrafusion.IntraFusionGrowingRegPruner,
}

made: list[str] = []


def pytest_configure(config: Any) -> None:
    """Put our classes where tests look for them; torch-pruning's own modules keep theirs."""
    for name, ours in OURS.items():
        counting = type(ours.__name__, (ours,), {"__init__": _counted(ours)})
        for home in (tp, tp.pruner):
            if hasattr(home, name):
                setattr(home, name, counting)


def _counted(ours: type) -> Any:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        made.append(ours.__name__)
        ours.__init__(self, *args, **kwargs)

    return __init__


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many of our pruners the tests made."""
    terminalreporter.write_line(f"intrafusion pruners made: {len(made)}")
