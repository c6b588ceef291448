"""How a network was traced, so that another of the same architecture can be traced alike."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch_pruning as tp
from torch import nn

from intrafusion.groups.conv1d import as_linear_
from intrafusion.groups.head_graph import know_heads
from intrafusion.groups.heads import blocks_of, opaque
from intrafusion.groups.multihead import weights_unseen
from intrafusion.groups.packed import Kind, Packed, part_alike_, parted
from intrafusion.running import evaluating, trainable


@dataclass(frozen=True)
class Tracing:
    """What a dependency graph was told, with parameters by name.

    Attributes:
        unwrapped: parameters outside of layers, with the dimension that is cut.
        ignored: parameters that are left alone.
        options: the other arguments of ``build_dependency``.
        packed: layers that were parted, by name.
    """

    unwrapped: tuple[tuple[str, int], ...]
    ignored: tuple[str, ...]
    options: Mapping[str, Any]
    packed: Mapping[str, tuple[Packed, Kind]]

    @classmethod
    def of(cls, graph: tp.DependencyGraph, arguments: Mapping[str, Any]) -> Tracing:
        """That of a pruner's graph; ``arguments`` are those that the pruner was made with."""
        names = {parameter: name for name, parameter in graph.model.named_parameters()}
        return cls(
            tuple((graph._param_to_name[p], dim) for p, dim in graph.unwrapped_parameters),
            tuple(names[p] for p in graph.ignored_params),
            {k: arguments.get(k) for k in ("forward_fn", "output_transform", "customized_pruners")},
            parted(graph.model),
        )

    def trace(self, model: nn.Module, example_inputs: Any) -> tp.DependencyGraph:
        """The dependency graph of ``model``."""
        free: Any = [(model.get_parameter(name), dim) for name, dim in self.unwrapped]
        ignored = [model.get_parameter(name) for name in self.ignored]
        as_linear_(model)
        part_alike_(model, self.packed)
        blocks = blocks_of(model)
        # torch-pruning follows gradients, and averaged weights often want none
        hidden = weights_unseen(model)
        with evaluating(model), trainable(model.parameters()), opaque(blocks), hidden, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
            graph = tp.DependencyGraph().build_dependency(
                model, example_inputs, unwrapped_parameters=free, ignored_params=ignored, **self.options
            )
        know_heads(graph, blocks)
        return graph
