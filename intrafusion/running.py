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
    if any(training for _, training in modes):  # a walk comes here at every layer
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


def merged(batches: list, most: int = 16) -> list:
    """The same inputs in about `most` batches, where they are more and can be put together.

    Each batch is walked through on its own: thousands of single inputs would be thousands of passes. Only batches that
    differ in nothing but what lies along the first axis, which all their tensors share, are put together.
    """
    if len(batches) <= most or len({_shape(batch) for batch in batches}) > 1 or _shape(batches[0]) is None:
        return batches
    each = -(-len(batches) // most)
    return [_joined(batches[start : start + each]) for start in range(0, len(batches), each)]


def _shape(batch: Any) -> tuple | None:
    """What two batches must have in common to be put together; None for one that cannot be."""
    items = list(batch.items()) if isinstance(batch, dict) else list(enumerate(batch))
    tensors = [value for _, value in items if isinstance(value, Tensor)]
    sizes = {value.shape[0] if value.dim() else None for value in tensors}
    if len(sizes) != 1 or None in sizes:
        return None
    try:
        return tuple(
            (key, value.shape[1:], value.dtype, value.device)
            if isinstance(value, Tensor)
            else (key, hash(value), value)
            for key, value in items
        )
    except TypeError:  # something that cannot be compared
        return None


def _joined(batches: list) -> Any:
    def join(key: Any) -> Any:
        values = [batch[key] for batch in batches]
        return torch.cat(values) if isinstance(values[0], Tensor) else values[0]

    if isinstance(batches[0], dict):
        return {key: join(key) for key in batches[0]}
    return tuple(join(number) for number in range(len(batches[0])))


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch of inputs with its tensors on `device`."""

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, dict):
        return {key: move(value) for key, value in batch.items()}
    return tuple(move(value) for value in batch)
