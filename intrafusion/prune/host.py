"""What a step asks of the pruner that it belongs to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.dependency.group import Group

from intrafusion.groups.heads import Heads
from intrafusion.groups.table import GroupTable
from intrafusion.history.lineage import Lineage
from intrafusion.prune.fusion import Fusion
from intrafusion.prune.report import GroupReport, Report
from intrafusion.prune.twin import Comparison


class Host(Protocol):
    """A fusing pruner, seen from a step. See `FusionMixin` for what its attributes are."""

    model: nn.Module
    current_step: int
    fusion: Fusion
    calibration: list
    example_inputs: Any
    run: Callable[[nn.Module, Any], Any]
    lineage: Lineage
    progress: bool
    keep_inputs: bool
    is_trying: bool
    inputs: Any  # an `inputs.Inputs` that the step has to run on, or None
    memory_limit: float | None
    num_heads: dict
    unbiased: frozenset[str]
    heads: list[Heads]
    after_cut: Callable[[nn.Module, Group], Any] | None
    report: Report

    @property
    def DG(self) -> tp.DependencyGraph: ...

    def table(self, group: Group) -> GroupTable: ...

    def channel_groups_of(self, group: Group) -> int: ...

    def is_attention(self, group: Group) -> bool: ...

    def score_of(self, table: GroupTable) -> Tensor | None: ...

    def as_it_is(self, group: Group) -> Group: ...

    def inconsistent_groups(self) -> frozenset[str]: ...

    def reported(self, entry: GroupReport) -> None: ...

    def compared(self, comparison: Comparison) -> None: ...
