"""A copy of a network that will be changed, or compared with."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn


def copy_of(model: nn.Module) -> nn.Module:
    """A network with tensors of its own that computes the same.

    One that holds something that cannot be copied (a lock, an open file, a tensor that was computed) shares that with
    its copy: only modules, their parameters and buffers and the containers that hold them are new.
    """
    try:
        return copy.deepcopy(model)
    except Exception:  # whatever a foreign object raises
        memo: dict[int, Any] = {}
        return _twin(model, memo)


def _twin(value: Any, memo: dict[int, Any]) -> Any:
    """A module or tensor is copied, a plain container gets what its contents are copied to, anything else is shared."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, nn.Parameter):
        made: Any = nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad)
    elif isinstance(value, Tensor):
        made = value.detach().clone()
    elif isinstance(value, nn.Module):
        made = object.__new__(type(value))
        memo[id(value)] = made
        made.__dict__.update({key: _twin(part, memo) for key, part in value.__dict__.items()})
        return made
    elif type(value) is dict or (isinstance(value, dict) and type(value).__module__ == "collections"):
        made = copy.copy(value)
        memo[id(value)] = made
        made.update({key: _twin(part, memo) for key, part in value.items()})
        return made
    elif type(value) in (list, tuple, set):
        made = type(value)(_twin(part, memo) for part in value)
    elif callable(value) and isinstance(getattr(value, "__self__", None), nn.Module):  # a bound method
        made = getattr(_twin(value.__self__, memo), value.__name__, value)
    else:
        return value
    memo[id(value)] = made
    return made
