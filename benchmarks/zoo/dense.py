"""The dense network of a row: random weights under which every layer matters, and what is left alone of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from benchmarks.zoo.entries import Entry
from intrafusion.groups.permutation_check import is_output
from intrafusion.groups.table import tabulate
from intrafusion.prune import refusals

Run = Callable[[nn.Module, Any], list[Tensor]]
SETTLING, CALIBRATION, JUDGES = 1, 2, 3
"""Seeds of the inputs."""


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The tensors of floating point that a network returns."""
    out = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return [value for value in _tensors(out) if value.is_floating_point()]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for one in value for t in _tensors(one)] if isinstance(value, (list, tuple)) else []


def dense_network(entry: Entry, count: int = 64) -> nn.Module:
    """The network with the random weights of its library, in eval mode, but for two things.

    What an initialisation makes constant (gains of one, biases of nought, layer scales of 1e-6) is drawn too, so that
    no branch is switched off and no permutation goes unseen. The batch-norms' statistics, which mean nothing before
    training, are those of one forward pass over `count` random inputs.
    """
    torch.manual_seed(0)
    model = entry.build()
    _draw_constants_(model)
    settle_(model, entry.inputs(count, SETTLING))
    return model


def settle_(model: nn.Module, inputs: Any) -> None:
    """Give the batch-norms the statistics of what they read of some inputs; the network is in eval mode afterwards."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    model.eval()
    momenta = [(norm, norm.momentum) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches
        norm.train()
    with torch.no_grad():
        run(model, inputs)
    for norm, momentum in momenta:
        norm.momentum = momentum
    model.eval()


def in_double(inputs: Any) -> Any:
    """The same inputs with twice the digits."""
    if isinstance(inputs, dict):
        return {key: in_double(value) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(map(in_double, inputs))
    return inputs.double() if inputs.is_floating_point() else inputs


@torch.no_grad()
def _draw_constants_(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
            if name.endswith("bias") or (parameter.dim() > 1 and parameter.flatten()[0] == 0):
                parameter.normal_(0, 0.1)
            else:
                parameter.uniform_(0.5, 1.5)


def heads_of(model: nn.Module) -> dict[nn.Module, int]:
    """What a user of torch-pruning gives as `num_heads`: the layers that make queries, keys and values."""
    heads: dict[nn.Module, int] = {}
    config = getattr(model, "config", None)
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            heads[module] = module.num_heads
        number = getattr(module, "num_attention_heads", None) or getattr(module, "num_heads", None)
        number = number or getattr(config, "num_attention_heads", None)
        if not isinstance(number, int):
            continue
        if isinstance(getattr(module, "qkv", None), nn.Linear):
            heads[module.qkv] = number
        for names in (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin")):
            layers = [getattr(module, name, None) for name in names]
            if all(isinstance(layer, nn.Linear) for layer in layers):
                grouped = getattr(config, "num_key_value_heads", None) or number
                heads |= dict(zip(layers, (number, grouped, grouped), strict=True))
    return heads


def left_alone(model: nn.Module, example: Any) -> list[nn.Module]:
    """The layers that make the network's own output: its width is the user's. None where torch-pruning finds no end."""
    graph = tp.DependencyGraph().build_dependency(model, example)
    model.eval()
    if refusals.endless(graph, (), (nn.Linear, nn.modules.conv._ConvNd)):
        return []
    found = []
    for group in graph.get_all_groups():
        root = group[0].dep
        try:
            table = tabulate(graph, root.target.module, root.handler, 1)
        except Exception:  # a group that cannot be described is no output's: others are asked
            continue
        if is_output(graph, table):
            found.append(root.target.module)
    return found
