"""Channels that are padded with zeros, as the parameter-free shortcuts of ResNets do (option A of He et al. 2016).

Torch-Pruning takes a padding for an elementwise operation: it pairs channel i with channel i, which is i + p when p
zeros come first, and believes that there are as many channels behind it as before.
"""

from __future__ import annotations

from typing import Any

import torch_pruning as tp
from torch_pruning.dependency.index_mapping import _ConcatIndexMapping
from torch_pruning.dependency.node import Node
from torch_pruning.dependency.shape_infer import infer_out_channels_recursively


class PaddingGraph(tp.DependencyGraph):
    """A dependency graph that knows what a padding of an image's channels does.

    Only what autograd remembers is known: a padding of three axes of which the first is the channels.
    """

    def build_dependency(self, *args: Any, **kwargs: Any) -> tp.DependencyGraph:
        super().build_dependency(*args, **kwargs)
        for node in list(self.module2node.values()):
            if _channel_padding(node) is not None:
                self._offset_(node)
        return self

    def get_out_channels(self, module_or_node: Any) -> int | None:
        padding = _channel_padding(module_or_node)
        if padding is None:
            return super().get_out_channels(module_or_node)
        (source,) = module_or_node.inputs
        width = infer_out_channels_recursively(self, source, [0])
        return None if width is None else width + sum(padding)

    def _offset_(self, node: Any) -> None:
        before, after = _channel_padding(node) or (0, 0)
        (source,) = node.inputs
        width = self.get_out_channels(node)
        if width is None:
            return
        offset = (before, width - after)
        for dep in node.dependencies:
            if dep.target is source:
                dep.index_mapping[1] = _ConcatIndexMapping(offset=offset, reverse=True)
        for dep in source.dependencies:
            if dep.target is node:
                dep.index_mapping[1] = _ConcatIndexMapping(offset=offset, reverse=False)


def _channel_padding(node: Any) -> tuple[int, int] | None:
    """Zeros before and after the channels of what a node reads; None if there are none."""
    pad = getattr(node.grad_fn, "_saved_pad", None) if isinstance(node, Node) and len(node.inputs) == 1 else None
    if pad is None or len(pad) != 6 or min(pad[4:]) < 0 or not any(pad[4:]):
        return None
    return pad[4], pad[5]
