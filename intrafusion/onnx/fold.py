"""Batch-norms folded into the layers before them, in a graph that torch.export made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from intrafusion.groups.layout import from_channels, to_channels

_ATEN = torch.ops.aten
_AXIS: dict[Any, int] = {
    _ATEN.linear.default: 0,
    _ATEN.conv1d.default: 0,
    _ATEN.conv2d.default: 0,
    _ATEN.conv3d.default: 0,
    _ATEN.conv1d.padding: 0,
    _ATEN.conv2d.padding: 0,
    _ATEN.conv3d.padding: 0,
    _ATEN.conv_transpose1d.default: 1,
    _ATEN.conv_transpose2d.input: 1,
    _ATEN.conv_transpose3d.input: 1,
}
"""Where the weight of a layer has its output channels."""


def fold_batchnorms_(graph: fx.GraphModule) -> int:
    """Fold every batch-norm that alone reads a convolution or a linear layer, in evaluation mode; how many there were.

    graph: of `torch.export.export(...).module()`. A layer that is called several times gets weights of its own for each
    call. Other batch-norms stay as they are.
    """
    count = 0
    for norm in list(graph.graph.nodes):
        if norm.target is not _ATEN.batch_norm.default or norm.args[5]:
            continue
        layer = norm.args[0]
        if _can_take_in(layer):
            _fold_(graph, layer, norm)
            count += 1
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return count


def _can_take_in(layer: Any) -> bool:
    if layer.target not in _AXIS or len(layer.users) > 1:
        return False
    constant = all(node is None or node.op == "get_attr" for node in layer.args[1:3])
    channels_last = layer.target is _ATEN.linear.default and layer.meta["val"].dim() != 2
    return constant and not channels_last and "bias" not in layer.kwargs


def _fold_(graph: fx.GraphModule, layer: Any, norm: Any) -> None:
    """y = a (W x + b - mean) + beta with a = gamma / sqrt(var + eps): weights a·W, bias a (b - mean) + beta."""
    _, gain, shift, mean_node, var_node, _, _, eps, *_ = norm.args
    mean, var = _tensor(graph, mean_node), _tensor(graph, var_node)
    scale = (1.0 if gain is None else _tensor(graph, gain)) / (var + eps).sqrt()
    beta = 0.0 if shift is None else _tensor(graph, shift)
    weight_node = layer.args[1]
    weight = _tensor(graph, weight_node)
    bias = 0.0 if len(layer.args) < 3 or layer.args[2] is None else _tensor(graph, layer.args[2])
    axis = _AXIS[layer.target]
    chunks = len(scale) // weight.shape[axis] if axis == 1 else 1
    folded = from_channels(scale[:, None] * to_channels(weight, axis, chunks), weight, axis, chunks)
    dtype = layer.meta["val"].dtype
    name = f"{weight_node.target.rpartition('.')[0].replace('.', '_')}_{layer.name}"
    with graph.graph.inserting_before(layer):
        new = [
            _constant(graph, f"{name}_{part}", value.to(dtype))
            for part, value in (("weight", folded), ("bias", scale * (bias - mean) + beta))
        ]
    layer.args = (layer.args[0], *new, *layer.args[3:])
    norm.replace_all_uses_with(layer)
    graph.graph.erase_node(norm)


def _constant(graph: fx.GraphModule, name: str, value: Tensor) -> fx.Node:
    graph.register_parameter(name, nn.Parameter(value, requires_grad=False))
    return graph.graph.get_attr(name)


def _tensor(graph: fx.GraphModule, node: Any) -> Tensor:
    """The float64 value of a `get_attr` node."""
    owner, _, name = node.target.rpartition(".")
    return getattr(graph.get_submodule(owner), name).detach().double()
