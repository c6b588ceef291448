"""What is made of a pruner's arguments before torch-pruning sees them, and what is recognised in the network."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from intrafusion.groups.conv1d import as_linear_
from intrafusion.groups.kinds.base import torch_pruners
from intrafusion.groups.kinds.frozen import recognise
from intrafusion.groups.kinds.normalisation import recognise_norms
from intrafusion.prune.widths import output_layers


def prepare_(arguments: dict[str, Any]) -> None:
    """Put right, in place, what torch-pruning would do to a pruner's arguments; recognise the network's layers."""
    _complete_(arguments)
    model = arguments["model"]
    recognise(model)
    recognise_norms(model)
    as_linear_(model)
    arguments["ignored_layers"] = [*(arguments.get("ignored_layers") or ()), *output_layers(model)]
    arguments["customized_pruners"] = {**torch_pruners(), **(arguments.get("customized_pruners") or {})}


def _complete_(arguments: dict[str, Any]) -> None:
    for name in ("in_channel_groups", "out_channel_groups", "num_heads", "channel_groups"):
        arguments.setdefault(name, {})  # its defaults are shared between all pruners
    if isinstance(arguments["example_inputs"], Tensor) and arguments.get("forward_fn") is None:
        arguments["example_inputs"] = (arguments["example_inputs"],)  # or its batch axis is stripped
    if arguments.get("unwrapped_parameters") is not None:
        arguments["unwrapped_parameters"] = list(arguments["unwrapped_parameters"])
    if arguments.get("ignored_layers") is not None:
        arguments["ignored_layers"] = _expand_types(arguments["model"], arguments["ignored_layers"])


def _expand_types(model: nn.Module, ignored: Any) -> list:
    """`ignored_layers` with every module class replaced by the model's layers of that class.

    Torch-Pruning's documentation allows classes, its code skips them. Raises TypeError for anything else.
    """
    layers: list = []
    for entry in ignored:
        if isinstance(entry, type) and issubclass(entry, nn.Module):
            layers.extend(module for module in model.modules() if isinstance(module, entry))
        elif isinstance(entry, (nn.Module, nn.Parameter)):
            layers.append(entry)
        else:
            raise TypeError(f"ignored_layers holds {entry!r}: give modules, parameters or module classes")
    return layers
