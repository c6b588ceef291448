"""Carry an optimizer over a pruning step, so that training goes on warm."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.history.cotangent import Cotangent
from intrafusion.history.lineage import Lineage, Link

KINDS: dict[str, str] = {
    "momentum_buffer": "gradient",
    "exp_avg": "gradient",
    "grad_avg": "gradient",
    "exp_avg_sq": "square",
    "max_exp_avg_sq": "square",
    "square_avg": "square",
    "sum": "square",
    "exp_inf": "magnitude",
}
"""What the state of torch's optimizers (SGD, Adam, AdamW, NAdam, RAdam, Adamax, RMSprop, Adagrad, Muon) is."""

_ALLOWED = ("gradient", "square", "magnitude", "drop")


def transfer_optimizer_state(
    optimizer: Any,
    pruner: Any,
    *,
    keep: Iterable[nn.Parameter] = (),
    kinds: Mapping[str, str] | None = None,
) -> None:
    """Let `optimizer` go on with the parameters that `pruner` has put in the place of those it holds, in place.

    optimizer: any torch optimizer over the pruner's network, or the wrapper of Accelerate or Lightning around one. Its
    groups, their order and their settings stay, and so do schedulers that refer to it. Call it after `pruner.step()`,
    before the next `optimizer.step()`; after several pruning steps once is enough, and where nothing was pruned it
    changes nothing.

    Momenta travel as gradients do, by the same (R, S) as the weights; second moments as `history/cotangent.py` says;
    step counts and other scalars are copied. A bias that a refit added joins the group of the network's other biases,
    or that of its layer's weight if they are in several, without a state.

    keep: parameters that belong to no part of the pruner's network (of a loss) and stay as they are.
    kinds: what further entries of the state are, by name: `gradient`, `square` (of gradients), `magnitude` (of
    gradients), or `drop` (start it anew).

    Raises ValueError, and changes nothing, if the optimizer holds a parameter that was never the network's, if an entry
    of its state is of an unknown kind, or if a layer was cut in a way that could not be followed.
    """
    optimizer = unwrapped(optimizer)
    known = {**KINDS, **(kinds or {})}
    for name, kind in known.items():
        if kind not in _ALLOWED:
            raise ValueError(f"kinds[{name!r}] is {kind!r}: choose one of {', '.join(map(repr, _ALLOWED))}")
    transfer = _Transfer(pruner.model, pruner.lineage, known, {id(p) for p in keep})
    transfer.prepare(optimizer)
    transfer.commit(optimizer)


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside Accelerate's or Lightning's wrapper. Raises ValueError for what cannot be carried."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"the optimizer is a {type(optimizer).__name__}: give a torch.optim.Optimizer")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("LBFGS keeps its history as one flat vector, which cannot be carried over: make a new one")
    return optimizer


class _Transfer:
    """The new content of an optimizer: computed first, then written."""

    def __init__(self, model: nn.Module, lineage: Lineage, kinds: Mapping[str, str], keep: set[int]) -> None:
        self.model, self.lineage, self.kinds, self.keep = model, lineage, kinds, keep
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.groups: list[tuple[list[nn.Parameter], list[str] | None]] = []
        self.states: dict[nn.Parameter, Any] = {}

    def prepare(self, optimizer: torch.optim.Optimizer) -> None:
        for number, group in enumerate(optimizer.param_groups):
            parameters, names = [], []
            old_names = group.get("param_names")
            for index, old in enumerate(group["params"]):
                where = f"parameter {index} of the optimizer's group {number} (shape {tuple(old.shape)})"
                for new, chain in self._successors(old, where):
                    parameters.append(new)
                    names.append(self.names.get(id(new), old_names[index] if old_names else ""))
                    if old in optimizer.state:
                        self.states[new] = self._state(optimizer.state[old], old, new, chain)
            self.groups.append((parameters, names if old_names else None))
        self._add_born()

    def commit(self, optimizer: torch.optim.Optimizer) -> None:
        for group, (parameters, names) in zip(optimizer.param_groups, self.groups, strict=True):
            group["params"] = parameters
            if names is not None:
                group["param_names"] = names
        others = {key: value for key, value in optimizer.state.items() if not isinstance(key, Tensor)}
        optimizer.state.clear()
        optimizer.state.update({**self.states, **others})

    def _successors(self, old: nn.Parameter, where: str) -> list[tuple[nn.Parameter, tuple[Link, ...]]]:
        if id(old) in self.keep:
            return [(old, ())]
        found = self.lineage.successors(old, set(self.names))
        if found is None:
            raise ValueError(
                f"{where} is not of the pruner's network and never was: make the optimizer from that network's "
                "parameters (not from copies of them) when the pruner has been made, which may part layers; prune with "
                "this pruner only, and name what is not the network's in keep="
            )
        return found

    def _state(self, state: Any, old: nn.Parameter, new: nn.Parameter, chain: tuple[Link, ...]) -> Any:
        if not chain:
            return state
        name, carried = self.names[id(new)], {}
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.dim() == 0 or value.numel() == 1 != old.numel():
                carried[key] = copy.deepcopy(value)
                continue
            kind = self.kinds.get(key)
            if kind is None or (kind != "drop" and value.shape != old.shape):
                raise ValueError(
                    f"the optimizer's state {key!r} {tuple(value.shape)} of {name!r} {tuple(old.shape)} is of no known "
                    f"kind: say what it is in kinds={{{key!r}: …}}, one of {', '.join(map(repr, _ALLOWED))}"
                )
            if kind == "drop":
                continue
            for link in chain:
                if link.map is None:
                    raise ValueError(f"the optimizer's state of {name!r} cannot be carried over: {link.problem}")
            carried[key] = _carry(key, kind, state, chain)
        return carried

    def _add_born(self) -> None:
        """Biases that did not exist before join a group, if their layer is trained by this optimizer."""
        held = {id(p): number for number, (parameters, _) in enumerate(self.groups) for p in parameters}
        biases = {held[i] for i, name in self.names.items() if i in held and name.rpartition(".")[2] == "bias"}
        for module in self.model.modules():
            for parameter in module._parameters.values():
                if parameter is None or id(parameter) in held or not self.lineage.is_born(parameter):
                    continue
                weight = held.get(id(module._parameters.get("weight")))
                if weight is None:
                    continue
                parameters, names = self.groups[next(iter(biases)) if len(biases) == 1 else weight]
                parameters.append(parameter)
                if names is not None:
                    names.append(self.names[id(parameter)])


def _carry(key: str, kind: str, state: Mapping[str, Any], chain: tuple[Link, ...]) -> Tensor:
    """One entry of a parameter's state through all the changes since."""
    value, maps = state[key], [link.map for link in chain if link.map is not None]
    if all(one.is_selection for one in maps):
        return _through(maps, value, 1)
    if kind == "magnitude":
        return _through(maps, value.square(), 2).sqrt()
    divisor = state.get("square_avg") if key == "momentum_buffer" else None
    if divisor is None:
        return _through(maps, value, 2 if kind == "square" else 1)
    # RMSprop smooths g / sqrt(E[g^2]): carried as the gradient that it came from
    gradient, root = _through(maps, value * divisor.sqrt(), 1), _through(maps, divisor, 2).sqrt()
    return torch.where(root > 0, gradient / root, 0.0)


def _through(maps: list[Cotangent], value: Tensor, power: int) -> Tensor:
    for one in maps:
        value = one(value, power)
    return value
