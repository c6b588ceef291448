"""Networks that torch-pruning cannot cut, told by the name of the layer and with the way out, before anything is done.

Torch-Pruning takes whatever it does not know for an operation that leaves the channels as they are. Where that is
wrong, its indices point beyond a layer's channels, or at others than those that belong together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch_pruning as tp
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize, prune
from torch_pruning.dependency.group import Group

from intrafusion.groups.reach import Endless, channels_of, may_be_endless, reach
from intrafusion.groups.table import GroupTable, module_name

_RECURRENT = (nn.RNNBase, nn.RNNCellBase)
_UNSEEN = "it does not see shuffles of channels, pixel_shuffle, glu, or chunks that are read in another order"


@dataclass(frozen=True)
class _Problem:
    """layer: what stands in the way, by name. why: what goes on after the name. way_out: what can be ignored."""

    layer: str
    why: str
    way_out: str


def check_layers(model: nn.Module) -> None:
    """Raises ValueError naming the layers that have no weights yet."""
    lazy = [_called(name, module) for name, module in model.named_modules() if any(map(is_lazy, _own_tensors(module)))]
    if lazy:
        raise ValueError(f"{', '.join(lazy)} has no weights yet: run the network once on an input, then prune it")


def refusal(graph: tp.DependencyGraph, groups: Iterable[Group], heads: Callable[[Group], bool]) -> str:
    """Which layers stand in the way of cutting the groups, full ones, and what to do about it; '' if none do.

    heads: is a group one of attention heads? What is wrong with one is not mended by a parameter's being ignored.
    """
    problems = [problem for group in groups for problem in _problems(graph, group, heads(group))]
    if not problems:
        return ""
    said = "; ".join(dict.fromkeys(f"{problem.layer} {problem.why}" for problem in problems))
    return f"this network cannot be pruned as it is: {said}. {_leave_out(problem.way_out for problem in problems)}"


def endless(graph: tp.DependencyGraph, ignored: Collection[Any], roots: Collection[type]) -> str:
    """Which layers torch-pruning would follow for ever, and what to do about it; '' if there are none.

    ignored, roots: what `DependencyGraph.get_all_groups` is called with. It follows a layer before it asks whether
    others of its group are ignored, so each of them has to be.
    """
    if not may_be_endless(graph):
        return ""
    found: dict[Any, Any] = {}
    seen: set[Any] = set()
    for root in list(graph.module2node):
        if root in seen or root in ignored or not isinstance(root, tuple(roots)):
            continue
        pruner = graph.get_pruner_of_module(root)
        if pruner is None or (n := pruner.get_out_channels(root)) is None:
            continue
        try:
            items = reach(graph, root, pruner.prune_out_channels, n, mapped=True)
        except Endless as error:
            found[root] = error.layer
        except Exception:  # whatever else is wrong here is said when torch-pruning comes to it
            continue
        else:
            seen.update(item.owner for item in items if graph.is_out_channel_pruning_fn(item.handler))
    if not found:
        return ""
    names = [module_name(graph, root) for root in found]
    layers = dict.fromkeys(module_name(graph, layer) for layer in found.values() if layer in graph._module2name)
    where = f", counting on at {', '.join(map(repr, layers))}" if layers else ""
    return (
        f"torch-pruning would follow the channels of {', '.join(map(repr, names))} without end{where}: it takes an "
        f"operation between them for another one. {_leave_out(map(expression, names))}"
    )


def explained(error: Exception, model: nn.Module) -> str:
    """What to say when torch-pruning cannot even follow a network; '' if the error is not torch-pruning's own."""
    if not _is_foreign(error):
        return ""
    root = _root_in(error, model)
    recurrent = [_called(name, module) for name, module in model.named_modules() if isinstance(module, _RECURRENT)]
    what = f"torch-pruning cannot follow {'this network' if root is None else f'the channels of {root!r}'}"
    why = f"{type(error).__name__}: {error}"
    slopes = [
        name for name, module in model.named_modules() if isinstance(module, nn.PReLU) and module.num_parameters == 1
    ]
    if recurrent:
        why += f"; it does not know recurrent layers, and there is {', '.join(recurrent)}"
    elif slopes and isinstance(error, TypeError):
        why += f"; it loses the channels behind an nn.PReLU of one slope, and there is {', '.join(map(repr, slopes))}"
        return f"{what} ({why}): give it a slope for each channel, as nn.PReLU(num_parameters=channels)"
    else:
        why += f"; {_UNSEEN}"
    out = "prune a part of the network that has none of them, as a module of its own"
    if root is not None:
        out = f"leave them out with ignored_layers=[{expression(root)}]"
    return f"{what} ({why}): {out}"


def uncut(error: Exception, name: str) -> str:
    """What to say when a group was not cut: the error, and the way out if it is torch-pruning's own."""
    if not _is_foreign(error):
        return str(error)
    return f"torch-pruning fails to cut it ({type(error).__name__}: {error}). {_leave_out([expression(name)])}"


def unscored(error: Exception, name: str) -> str:
    """What to say when a group was not scored: the error, if it is torch-pruning's own, and the way out."""
    if not _is_foreign(error):
        return ""
    return f"torch-pruning fails to score it ({type(error).__name__}: {error}). {_leave_out([expression(name)])}"


def root_of(graph: tp.DependencyGraph, group: Group) -> str:
    """The name of a layer that makes channels of a group, and to ignore which leaves the group out: often its root."""
    item: Any
    for item in group:
        if graph.is_out_channel_pruning_fn(item.dep.handler) and item.dep.target.module in graph._module2name:
            return module_name(graph, item.dep.target.module)
    return module_name(graph, group[0].dep.target.module)


def undivided(chunks: int, name: str) -> str:
    """What to say when torch-pruning wants to cut each of several chunks of a group alike, and they are not."""
    return (
        f"torch-pruning takes them for {chunks} chunks of equal size (heads, or a convolution in groups), which they "
        f"cannot be: it did not see how they are laid out. {_leave_out([expression(name)])}"
    )


def _is_foreign(error: Exception) -> bool:
    """Has torch-pruning's own code failed?"""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and "torch_pruning" in trace.tb_frame.f_code.co_filename


def misread(layer: str, roots: Iterable[str]) -> str:
    """What to say when a layer does not get the channels that it was cut for. roots: of the groups that were cut."""
    named = ", ".join(map(repr, dict.fromkeys(roots)))
    return (
        f"torch-pruning did not see how the channels of {named} come to {layer!r}. "
        f"{_leave_out(expression(root) for root in dict.fromkeys(roots))}"
    )


def disordered(graph: tp.DependencyGraph, tables: Iterable[GroupTable], broken: Collection[str]) -> str:
    """Why some groups, whose channels are not where torch-pruning's index map has them, must not be cut.

    '' where what moves them is not known: torch-pruning's own cut may still be right.
    """
    found = [(table, why) for table in tables if table.name in broken and (why := _moved(graph, table))]
    if not found:
        return ""
    said = "; ".join(f"the channels of {table.name!r} {why}" for table, why in found)
    return f"{said}, which torch-pruning does not see. {_leave_out(expression(table.name) for table, _ in found)}"


def _leave_out(layers: Iterable[str]) -> str:
    return f"To leave it out: ignored_layers=[{', '.join(dict.fromkeys(layers))}]"


def expression(name: str) -> str:
    """How a layer is written in Python: 'features.0.conv' is model.features[0].conv."""
    return "model" + "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in name.split(".") if part)


def _problems(graph: tp.DependencyGraph, group: Group, whole: bool) -> list[_Problem]:
    root = module_name(graph, group[0].dep.target.module)
    found = []
    for item in group:
        owner: Any = item.dep.target.module
        if isinstance(owner, nn.Parameter):
            size = owner.shape[item.dep.target.pruning_dim] if owner.dim() else 1
            if item.idxs and max(item.idxs) >= size:
                name = module_name(graph, owner)
                why = f"has {size} values where {root!r} has {len(group[0].idxs)} channels (is it indexed in forward?)"
                found.append(_Problem(f"the parameter {name!r}", why, expression(root if whole else name)))
            continue
        name = graph._module2name.get(owner)
        if isinstance(owner, nn.Module) and name is not None and (why := _why_not(graph, owner, name, item)):
            found.append(_Problem(_called(name, owner), why, expression(root)))
    return found


def _why_not(graph: tp.DependencyGraph, layer: nn.Module, name: str, item: Any) -> str:
    if isinstance(layer, _RECURRENT):
        return "is a recurrent layer, which torch-pruning cannot cut"
    if isinstance(layer, nn.modules.instancenorm._InstanceNorm) and layer.track_running_stats:
        return "has running statistics, which torch-pruning does not cut: give it track_running_stats=False"
    if isinstance(layer, nn.modules.conv._ConvNd) and (why := _ungrouped(layer)):
        return why
    if way_back := computed(layer, expression(name)):
        return f"has a parametrised weight: call {way_back} first"
    try:
        size = channels_of(graph, layer, item.dep.handler)
    except (AttributeError, TypeError):  # a pruner of the user's that does not say
        return ""
    if size and item.idxs and max(item.idxs) >= size:
        return f"has {size} channels where torch-pruning would cut number {max(item.idxs)} ({_UNSEEN})"
    return ""


def _ungrouped(layer: Any) -> str:
    """Why torch-pruning would cut other channels of a grouped convolution than those it counts ('' if it would not)."""
    if layer.groups == 1 or layer.groups == layer.out_channels == layer.in_channels:
        return ""
    if layer.transposed:
        return "is a transposed convolution in groups, which torch-pruning cannot cut"
    if layer.groups == layer.out_channels:
        return "makes each channel of several others, which torch-pruning takes for a depthwise convolution"
    return ""


def computed(layer: nn.Module, called: str = "layer") -> str:
    """What to call to have plain parameters again of those that the forward pass computes; '' if there are none.

    called: the layer, in Python.
    """
    if parametrize.is_parametrized(layer):
        (name, *_) = layer.parametrizations  # type: ignore[attr-defined]
        return f"torch.nn.utils.parametrize.remove_parametrizations({called}, {name!r})"
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod):
            return f"torch.nn.utils.prune.remove({called}, {getattr(hook, '_tensor_name', 'weight')!r})"
        undo = _UNDO.get(type(hook).__name__)
        if undo is not None:
            return f"torch.nn.utils.{undo}({called})"
    return ""


_UNDO = {"WeightNorm": "remove_weight_norm", "SpectralNorm": "remove_spectral_norm"}
"""By the class of the hook that computes the weight."""


def _moved(graph: tp.DependencyGraph, table: GroupTable) -> str:
    for owner, _ in table.reach:
        node = graph.module2node[owner]
        name = str(getattr(owner, "_grad_fn", ""))
        if "CopySlices" in name:
            return "are partly written in place (as in x[:, :k] = ...)"
        if "ChannelShuffle" in name or _shuffles(node.grad_fn):
            return "are shuffled"
    return ""


def _shuffles(grad_fn: Any) -> bool:
    """Are the first two axes behind the batch exchanged that a reshape made of the channels?"""
    name = type(grad_fn).__name__
    if name.startswith("Transpose"):
        exchanged = {int(grad_fn._saved_dim0), int(grad_fn._saved_dim1)} == {1, 2}
    elif name.startswith("Permute"):
        exchanged = tuple(grad_fn._saved_dims)[:3] == (0, 2, 1)
    else:
        return False
    before = grad_fn.next_functions[0][0] if grad_fn.next_functions else None
    if not exchanged or "View" not in type(before).__name__:
        return False
    return len(getattr(before, "_saved_self_sym_sizes", ())) == 4


def _root_in(error: BaseException, model: nn.Module) -> str | None:
    """The layer whose group torch-pruning was following when it failed."""
    names = {id(module): name for name, module in model.named_modules()}
    trace, found = error.__traceback__, None
    while trace is not None:
        if trace.tb_frame.f_code.co_name == "get_all_groups":
            found = names.get(id(trace.tb_frame.f_locals.get("m")), found)
        trace = trace.tb_next
    return found


def _own_tensors(module: nn.Module) -> Iterator[Any]:
    yield from module._parameters.values()
    yield from module._buffers.values()


def _called(name: str, module: nn.Module) -> str:
    return f"{name!r} ({type(module).__name__})"
