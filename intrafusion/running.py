"""Running a network: its modes, its inputs, the order of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode for as long as it lasts; every module then gets its own mode back."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def call_order(forward: Callable[[], Any], model: nn.Module, kinds: tuple[type, ...]) -> list[str]:
    """Names of the layers of the given kinds in the order in which a forward pass first calls them."""
    order: dict[str, None] = {}
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, kinds):
                hook = module.register_forward_pre_hook(lambda _module, _args, name=name: order.setdefault(name))
                stack.callback(hook.remove)
        with torch.no_grad():
            forward()
    return list(order)


def run_model(model: nn.Module, inputs: Any, forward_fn: Callable | None) -> list[Tensor]:
    """The tensors that the traced network returns for its example inputs."""
    if forward_fn is not None:
        out = forward_fn(model, inputs)
    else:
        out = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return [value for value in tp.utils.flatten_as_list(out) if isinstance(value, Tensor)]


def input_batches(batches: Iterable) -> list:
    """Unlabelled input batches as a list. Raises ValueError or TypeError if there are none, or for what is no input."""
    batches = [(batch,) if isinstance(batch, Tensor) else batch for batch in batches]
    if not batches:
        raise ValueError("the calibration iterable is empty: give at least one batch of inputs")
    for number, batch in enumerate(batches):
        values = list(batch.values()) if isinstance(batch, dict) else batch
        if not isinstance(batch, (tuple, list, dict)) or not any(isinstance(value, Tensor) for value in values):
            raise TypeError(
                f"calibration batch {number} is a {type(batch).__name__}: give tensors, tuples or dictionaries"
            )
        for value in values:
            if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
                raise ValueError(f"calibration batch {number} holds NaN or infinite values")
    return batches


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch of inputs with its tensors on `device`."""

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, dict):
        return {key: move(value) for key, value in batch.items()}
    return tuple(move(value) for value in batch)
