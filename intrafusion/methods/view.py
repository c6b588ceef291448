"""What a method may look at while a network is pruned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch_pruning as tp
from torch import Tensor, nn

from intrafusion.correct.correction import Correction, layers_of
from intrafusion.correct.survey import Run, visits, watch
from intrafusion.groups.features import channel_features, feature_parts
from intrafusion.groups.table import GroupTable
from intrafusion.ot.rows import Samples


class View:
    """One pruning step, seen by its method.

    graph: torch-pruning's dependency graph; model: the network, as it is by now; run: calls a network on one batch;
    example: the example inputs; batches: the inputs that the method asked for, the user's `own` and synthetic ones that
    were `drawn`, [] if none; seed: for what is drawn.
    """

    def __init__(
        self,
        graph: tp.DependencyGraph,
        run: Run,
        example: Any,
        own: Sequence = (),
        drawn: Sequence = (),
        *,
        importance: Callable[[GroupTable], Tensor | None] = lambda table: None,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        self.graph, self.model, self.run, self.example = graph, graph.model, run, example
        self.own, self.drawn, self.batches = own, drawn, [*own, *drawn]
        self.seed, self.progress = seed, progress
        self._importance = importance
        self._order: list[str] | None = None
        self.correction: Correction | None = None

    @property
    def order(self) -> list[str]:
        """Layers whose calls are given their weight as it stands, by name, in the order of the forward pass."""
        if self.correction is not None:
            return list(self.correction.layers)
        if self._order is None:
            self._order = list(visits(self.model, self.run, self.example, layers_of(self.graph)))
        return self._order

    @property
    def dense(self) -> nn.Module:
        """The network as it was before the step. Raises ValueError if the method looks at no inputs."""
        if self.correction is None:
            raise ValueError("only methods that look at inputs see the dense network; others see it in begin(view)")
        return self.correction.dense

    def importance(self, table: GroupTable) -> Tensor | None:
        """[n] the metric's score of every channel of a group, if it gave any."""
        return self._importance(table)

    def features(self, table: GroupTable, *parts: str) -> Tensor:
        """[n, d] float64: each channel's weights, batch-norm folded in. parts: of `filters`, `readers`, `biases`."""
        return channel_features(
            self.graph, table, rows="filters" in parts, columns="readers" in parts, bias="biases" in parts
        )

    def feature_parts(self, table: GroupTable, *parts: str) -> Sequence[Tensor]:
        """The same, layer by layer and in the network's precision: [n, d_i] each, to be read only."""
        return feature_parts(
            self.graph, table, rows="filters" in parts, columns="readers" in parts, bias="biases" in parts
        )

    def samples(self, table: GroupTable) -> list[Samples]:
        """What up to four readers of a group see, at places spread over all batches; needs `Method.samples`."""
        return [] if self.correction is None else self.correction.samples(table)

    def watch(self, readers: Mapping[str, Callable[[Tensor], None]]) -> None:
        """One pass over all batches: the inputs of every call of a named layer are given to its function."""
        layers = {name: norm for name, norm in layers_of(self.graph).items() if name in readers}
        watch(self.model, self.run, self.batches, layers, lambda tape, visit: readers[visit.name](visit.inputs))
