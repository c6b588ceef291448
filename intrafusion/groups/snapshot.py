"""Put a network, and torch-pruning's book-keeping about it, back exactly as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    import torch_pruning as tp


class Snapshot:
    """References to everything that a fusion or a cut replaces; cheap, since neither writes into a tensor.

    modules: whose parameters, buffers and attributes are remembered. extra: dictionaries that are remembered too (a
    pruner's own state). The graph's operator nodes (concat, split sizes), names and history always are.
    """

    def __init__(self, graph: tp.DependencyGraph, modules: Iterable[nn.Module], extra: Iterable[dict] = ()) -> None:
        operators = [m for m in graph.module2node if isinstance(m, nn.Module) and graph._module2name.get(m) is None]
        self._modules = [(m, copy_state(m.__dict__)) for m in dict.fromkeys([*modules, *operators])]
        self._dicts = [(d, dict(d)) for d in (graph._param_to_name, graph.module2node, *extra)]
        self._history = (graph._pruning_history, list(graph._pruning_history))
        self._nodes = [(node, node.module) for node in graph.module2node.values()]
        parameters = {id(p): p for m, _ in self._modules for p in m._parameters.values() if p is not None}
        parameters.update({id(p): p for p in graph._param_to_name})
        self._parameters = [(p, p.data, p.grad, p.requires_grad) for p in parameters.values()]

    def restore(self) -> None:
        for module, state in self._modules:
            restore_state(module.__dict__, state)
        for target, content in self._dicts:
            target.clear()
            target.update(content)
        history, content = self._history
        history[:] = content
        for node, module in self._nodes:
            node.module = module
        for parameter, data, grad, requires_grad in self._parameters:
            parameter.data, parameter.grad = data, grad
            parameter.requires_grad_(requires_grad)


def copy_state(state: dict[str, Any]) -> dict[str, Any]:
    """A module's `__dict__`, one level deep: parameters and buffers live in dicts, operator sizes in lists."""
    return {k: (v, v.copy() if isinstance(v, (dict, list)) else None) for k, v in state.items()}


def restore_state(state: dict[str, Any], saved: dict[str, Any]) -> None:
    """Undo what happened to a module's `__dict__` since `copy_state`."""
    state.clear()
    for key, (value, content) in saved.items():
        if isinstance(value, dict):
            value.clear()
            value.update(content)
        elif isinstance(value, list):
            value[:] = content
        state[key] = value


def rebuilding(module: nn.Module) -> Callable[[], None]:
    """To be called before a module may become one of another class; what it returns puts it back."""
    kind, state = type(module), copy_state(vars(module))

    def back() -> None:
        module.__class__ = kind
        restore_state(vars(module), state)

    return back


def frozen_parameters(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str]]:
    """(module, name) of every parameter that does not want a gradient."""
    return [
        (module, name)
        for module in modules
        for name, parameter in module._parameters.items()
        if parameter is not None and not parameter.requires_grad
    ]
