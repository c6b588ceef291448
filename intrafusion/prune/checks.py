"""Questions asked before anything is changed, so that the answer to bad input is a sentence and not a wrong network."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from intrafusion.groups.layout import is_finite
from intrafusion.groups.reach import channels_of
from intrafusion.groups.table import GroupTable
from intrafusion.methods.method import Method
from intrafusion.prune import refusals
from intrafusion.prune.fusion import Fusion
from intrafusion.running import input_batches

ALLOCATIONS = ("equal", "measured", "measured-parameters")


def check_arguments(arguments: dict[str, Any]) -> None:
    """Refuse a wrapped model and ratios that mean nothing. Raises TypeError or ValueError with what to do."""
    _check_model(arguments["model"])
    refusals.check_layers(arguments["model"])
    if not callable(arguments.get("importance")):
        raise TypeError("importance must be callable: a torch_pruning.importance object or a function of a group")
    steps = arguments.get("iterative_steps", 1)
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"iterative_steps is {steps!r}: it must be a whole number of at least 1")
    for name in ("pruning_ratio", "head_pruning_ratio", "ch_sparsity"):
        if arguments.get(name) is not None:
            _check_ratio(name, arguments[name], steps)
    for name in ("pruning_ratio_dict", "head_pruning_ratio_dict", "ch_sparsity_dict"):
        for ratio in (arguments.get(name) or {}).values():
            _check_ratio(f"a value of {name}", ratio, steps)
    if arguments.get("isomorphic") and not arguments.get("global_pruning"):
        raise ValueError(
            "isomorphic=True needs global_pruning=True: without it torch-pruning cuts all layers at the same indices"
        )


def calibration_batches(calibration: Any, method: Method, name: str) -> list:
    """The batches of inputs, as a list. Raises ValueError if they are missing, empty, or given for nothing."""
    if method.inputs != "calibration":
        if calibration is not None:
            raise ValueError(
                f"calibration inputs are given, but {name} looks at none of yours: use fusion='calibrated'"
            )
        return []
    if calibration is None:
        raise ValueError(f"{name} needs calibration=<iterable of input batches, no labels>")
    return input_batches(calibration)


def memory_limit(value: Any) -> float | None:
    """GiB, as given. Raises ValueError for what is no positive number."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (number and value > 0):
        raise ValueError(f"memory_limit is {value!r}: it must be a number of GiB above 0, or None")
    return value


def after_cut(value: Any) -> Callable | None:
    """As given. Raises TypeError for what cannot be called."""
    if value is not None and not callable(value):
        raise TypeError(f"after_cut is {value!r}: give a function of the network and the group that was cut")
    return value


def allocation(value: Any, fusion: Fusion, arguments: dict[str, Any]) -> str:
    """As given. Raises ValueError for what does not exist, or cannot be measured."""
    if value not in ALLOCATIONS:
        raise ValueError(f"allocation is {value!r}: it must be one of {', '.join(map(repr, ALLOCATIONS))}")
    if value != "equal" and fusion.is_discard:
        raise ValueError(
            f"allocation={value!r} measures what a fusion leaves, and fusion='discard' fuses nothing: for the same "
            "widths, give its pruning_ratio_dict the ratios of another pruner's report.allocation"
        )
    if value != "equal" and arguments.get("global_pruning"):
        raise ValueError(f"allocation={value!r} decides about the widths of groups, and so does global_pruning=True")
    return value


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TypeError(f"model is wrapped in {type(model).__name__}: prune model.module, then wrap the result again")
    if hasattr(model, "_orig_mod"):
        raise TypeError("model is compiled: prune model._orig_mod (the network itself), then call torch.compile again")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model is a TorchScript module: prune the original nn.Module and script the result")


def _check_ratio(name: str, ratio: Any, steps: int) -> None:
    """[0, 1); 1.0 also, with iterative steps: the common way of pruning until some target is met."""
    number = isinstance(ratio, (int, float)) and not isinstance(ratio, bool)
    if not number or not (0 <= ratio < 1 or (ratio == 1 and steps > 1)):
        raise ValueError(f"{name} is {ratio!r}: it must be in [0, 1) (1.0 only with iterative_steps > 1)")


def warn_if_nothing_prunable(pruner: Any) -> None:
    """A frozen network has no autograd graph, and torch-pruning then finds nothing, silently."""
    if next(pruner.all_groups(), None) is None:
        frozen = not any(parameter.requires_grad for parameter in pruner.model.parameters())
        why = (
            "all parameters are frozen (requires_grad=False), so it cannot be traced"
            if frozen
            else "check ignored_layers"
        )
        warnings.warn(f"torch-pruning found no group that it may prune in this network: {why}", stacklevel=4)


def refusal(pruner: Any, groups: Iterable[Any]) -> str:
    """Why a network's groups cannot be cut, by the names of the layers that stand in the way; '' if they can."""
    to_cut = [group for group in groups if not _stays(pruner, group)]
    return refusals.refusal(pruner.DG, to_cut, pruner.is_attention)


def _stays(pruner: Any, group: Any) -> bool:
    """Is a group's own ratio 0, or is it one of attention heads that torch-pruning passes over?"""
    if pruner.is_attention(group):
        if not (pruner.prune_head_dims or pruner.prune_num_heads):
            return True
        if pruner._downstream_node_as_root_if_attention(group) is None:
            return True
        if pruner.prune_num_heads:
            return False
    ratios = pruner.pruning_ratio_dict.get(group[0].dep.target.module, pruner.per_step_pruning_ratio)
    return not pruner.global_pruning and not any(ratios)


def check_finite(model: nn.Module) -> None:
    """Raises ValueError naming the tensors of a network that hold NaN or infinity."""
    named = [*model.named_parameters(), *model.named_buffers()]
    bad = [name for name, tensor in named if tensor.is_floating_point() and not is_finite(tensor)]
    if bad:
        shown = ", ".join(map(repr, bad[:5])) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise ValueError(f"the network holds NaN or infinite values in {shown}: nothing was pruned")


def importance_problem(score: Any, n: int) -> str:
    """What is wrong with a metric's score for n channels ('' if nothing is)."""
    if not isinstance(score, Tensor):
        return f"the importance is a {type(score).__name__}, not a tensor"
    if score.dim() != 1 or len(score) != n:
        return f"the importance has shape {tuple(score.shape)}, expected ({n},)"
    bad = (~torch.isfinite(score)).nonzero().flatten()
    if len(bad):
        return f"the importance of channel {bad[0].item()} is {score[bad[0]].item()}"
    return ""


def mismatch(group: Any, table: GroupTable, kept: Tensor) -> str:
    """Why the channels that torch-pruning will cut are not those that the group couples ('' if they are)."""
    removed = torch.ones(table.n, dtype=torch.bool)
    removed[kept.cpu()] = False
    item: Any
    for item in group:
        if not hasattr(item, "dep"):
            return "torch-pruning leaves part of the group alone (grouped-query attention)"
        coupled = table.coupled(item.dep.target.module, item.dep.handler, removed)
        if coupled is None:
            return "torch-pruning cuts a layer that the group does not reach"
        if coupled != {int(i) for i in item.idxs}:
            return (
                f"torch-pruning cuts other channels of {item.dep.target.name.split(' ')[0]} than those coupled with it"
            )
    return ""


def uneven_chunks(table: GroupTable, kept: Tensor) -> str:
    """Torch-Pruning cuts every chunk of a grouped layer at the first chunk's offsets: say so if that would be wrong."""
    for slot in table.slots:
        if not slot.reads or slot.chunks == 1:
            continue
        width = slot.size // slot.chunks
        covered = set(slot.local[slot.local >= 0].tolist())
        local = slot.local[kept]
        alive = torch.zeros(slot.size, dtype=torch.bool)
        alive[local[local >= 0]] = True
        alive[[i for i in range(slot.size) if i not in covered]] = True
        by_chunk = alive.reshape(slot.chunks, width)
        if not (by_chunk == by_chunk[0]).all():
            return f"the kept channels of {slot.name!r} differ between its {slot.chunks} groups"
    return ""


def width(graph: tp.DependencyGraph, layer: Any, handler: Callable) -> int:
    """Number of channels that `handler` prunes from `layer`. Raises ValueError if the layer is not in the graph."""
    if layer not in graph.module2node:
        raise ValueError(f"{type(layer).__name__} is not a layer of the traced network")
    return channels_of(graph, layer, handler)
