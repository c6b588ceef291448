"""One forward pass: modes, outputs, the order of the layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.running.inputs import tensors_in
from intrafusion.running.randomness import repeatable


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


@contextmanager
def trainable(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Parameters want gradients for as long as it lasts, frozen ones too; they are then as they were."""
    frozen = [p for p in parameters if not p.requires_grad and p.is_floating_point()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def full_precision() -> Iterator[None]:
    """On a GPU, products and convolutions of float32 are as precise as float32, and not as TF32, while it lasts.

    TF32 has a relative precision of 1e-3, about what is looked for. All settings are afterwards what they were.
    """
    with ExitStack() as stack:
        if torch.cuda.is_initialized():
            matmul: Any = torch.backends.cuda.matmul
            cudnn: Any = torch.backends.cudnn
            if hasattr(matmul, "fp32_precision"):  # since torch 2.9, where the older name may not be read any more
                owners, name, full = (matmul, cudnn.conv, cudnn.rnn), "fp32_precision", "ieee"
            else:
                owners, name, full = (matmul, cudnn), "allow_tf32", False
            for owner in owners:
                stack.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, full)
        yield


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


_TOLERANCE = {torch.float16: 0.1, torch.bfloat16: 0.2}


def same_outputs(after: Sequence[Tensor], before: Sequence[Tensor]) -> bool:
    """Are they what a network gave before, up to rounding? Integers, and what was not finite before, say nothing."""
    return all(_is_close(a, b) for a, b in zip(after, before, strict=True))


def _is_close(after: Tensor, before: Tensor) -> bool:
    if after.shape != before.shape:
        return False
    if not before.is_floating_point() or not torch.isfinite(before).all():
        return True
    if not before.numel():
        return True
    return bool((after - before).abs().max() <= _TOLERANCE.get(before.dtype, 1e-3) * before.abs().max())


def run_model(
    model: nn.Module, inputs: Any, forward_fn: Callable | None = None, output_transform: Callable | None = None
) -> list[Tensor]:
    """The tensors that a network gives for some inputs; always the same ones, also where it draws random numbers.

    forward_fn: forward_fn(model, inputs), if model(*inputs) or model(**inputs) is not how it is called.
    output_transform: what makes tensors of its output, where that is an object that holds them elsewhere.
    """
    with repeatable(inputs):
        if forward_fn is not None:
            out = forward_fn(model, inputs)
        else:
            out = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    return list(tensors_in(out if output_transform is None else output_transform(out)))
