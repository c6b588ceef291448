"""Channels that are padded with zeros, as the parameter-free shortcuts of ResNets do (option A of He et al. 2016).

Torch-Pruning takes a padding for an elementwise operation and pairs channel i with channel i; padded by p, it is i + p.
"""

from __future__ import annotations

import torch_pruning as tp
from torch_pruning.dependency.index_mapping import _ConcatIndexMapping
from torch_pruning.dependency.shape_infer import infer_out_channels_recursively


def follow_channel_padding_(graph: tp.DependencyGraph) -> None:
    """Give every padding of the channels of an image its offset in the dependency graph.

    Only what autograd remembers is known: a padding of three axes or more of which the third from the end is an
    image's channels.
    """
    for node in list(graph.module2node.values()):
        pad = getattr(node.grad_fn, "_saved_pad", None)
        if pad is None or len(pad) != 6 or min(pad[4:]) < 0 or not any(pad[4:]):
            continue
        (source,) = node.inputs
        width = infer_out_channels_recursively(graph, source, [0])
        if width is None:
            continue
        offset = (pad[4], pad[4] + width)
        for dep in node.dependencies:
            if dep.target is source:
                dep.index_mapping[1] = _ConcatIndexMapping(offset=offset, reverse=True)
        for dep in source.dependencies:
            if dep.target is node:
                dep.index_mapping[1] = _ConcatIndexMapping(offset=offset, reverse=False)
