"""What a network consists of, as a checkpoint sees it: modules, their numbers, their tensors and who shares them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.checkpoint.manifest import CheckpointError, ModuleEntry, TensorEntry, listed

_LARGEST = 2**53


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        inner = model._modules.get("module" if _is_parallel(model) else "_orig_mod")
        if inner is None:
            return model
        model = inner


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, parents first, by the name it has without wrappers."""
    seen: set[nn.Module] = set()
    ahead = [("", model)]
    while ahead:
        name, module = ahead.pop()
        module = unwrap(module)
        if module in seen:
            continue
        seen.add(module)
        yield name, module
        children = [(join(name, key), child) for key, child in module._modules.items() if child is not None]
        ahead.extend(reversed(children))


def join(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def modules_of(model: nn.Module) -> dict[str, ModuleEntry]:
    """The class, mode and numbers of every module."""
    return {
        name: ModuleEntry(
            type=type(module).__name__,
            training=module.training,
            attributes={key: to_json(value) for key, value in numbers_of(module).items()},
        )
        for name, module in walk(model)
    }


def numbers_of(module: nn.Module) -> dict[str, Any]:
    """The public attributes of a module that are whole numbers, finite floats, or tuples or lists of whole numbers."""
    return {key: value for key, value in vars(module).items() if not key.startswith("_") and _is_number(value)}


def to_json(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, list)) else value


def tensors_of(model: nn.Module) -> dict[str, tuple[str, Tensor | None]]:
    """(kind, tensor) of every parameter and buffer by name, buffers that are not in the state dict too."""
    return {
        join(prefix, name): (kind, tensor)
        for prefix, module in walk(model)
        for kind, tensors in (("parameter", module._parameters), ("buffer", module._buffers))
        for name, tensor in tensors.items()
    }


def entry_of(kind: str, tensor: Tensor) -> TensorEntry:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorEntry(kind, dtype, tuple(tensor.shape), kind == "parameter" and tensor.requires_grad)


def shared(tensors: dict[str, tuple[str, Tensor | None]]) -> dict[str, str]:
    """Tied tensors: each further name of a tensor, and its first."""
    first: dict[int, str] = {}
    tied = {}
    for name, (_, tensor) in tensors.items():
        if tensor is not None and first.setdefault(id(tensor), name) != name:
            tied[name] = first[id(tensor)]
    return tied


def check_can_be_saved(model: nn.Module) -> None:
    """Raise CheckpointError for what a list of tensors and numbers does not describe."""
    if isinstance(model, torch.jit.ScriptModule):
        raise CheckpointError("a TorchScript module cannot be saved: save the nn.Module that it was made from")
    for name, module in walk(model):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(f"{name or 'the network'} has extra state (get_extra_state), which would be lost")
    lazy, unplain = [], []
    for name, (_, tensor) in tensors_of(model).items():
        if tensor is None:
            continue
        if nn.parameter.is_lazy(tensor):
            lazy.append(name)
        elif not _is_plain(tensor):
            unplain.append(f"{name} ({tensor.layout}, {tensor.device}, {type(tensor).__name__})")
    if lazy:
        raise CheckpointError(f"not initialised yet, run the network once: {listed(lazy)}")
    if unplain:
        raise CheckpointError(f"no plain dense tensors: {listed(unplain)}")


def _is_plain(tensor: Tensor) -> bool:
    ordinary = tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_quantized
    return ordinary and type(tensor.detach()) is Tensor


def _is_parallel(model: nn.Module) -> bool:
    return isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))


def _is_number(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return type(value) in (tuple, list, torch.Size) and all(_is_whole(number) for number in value)
    return _is_whole(value) or (type(value) is float and math.isfinite(value))


def _is_whole(value: Any) -> bool:
    return type(value) is int and abs(value) <= _LARGEST
