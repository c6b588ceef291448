"""Inputs for a network that came without any: what batch-norm remembers of the data, painted onto random images.

A dead-leaves image (occluding shapes with radii distributed as r^-3; Lee, Mumford & Huang 2001) has the second-order
and edge statistics of natural images. A few gradient steps on the pixels then bring the mean and the spread of every
batch-norm's input to the stored ones (as in Yin et al. 2020, DeepInversion, without labels). Networks without
batch-norm get the images as they are; inputs that are not images get white noise.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning import ops
from tqdm import tqdm

from intrafusion.running import evaluating

_LEAVES = 60
_STEPS, _RATE, _BETAS = 12, 0.15, (0.8, 0.99)
"""Of Adam on the pixels; its rate falls linearly to 0. (20 steps at a rate of 0.05 leave half of the gap that is left
here, take 5/3 of the time, and give pruned networks of the same accuracy on training images.)
"""
_PIXELS = 500 * 32 * 32
"""As many images as fit into this many pixels, but at least `_FEWEST`."""
_FEWEST, _MOST = 64, 500
_ENOUGH = 1000
"""From so many inputs of the user's own, or as many pixels as that many of 32 x 32, synthetic ones are not added."""
_BATCH, _SMALLEST_BATCH = 125, 16
"""Images that are matched together: as many as fit into `_PIXELS` / 4, between these two."""


def synthetic_count(model: nn.Module, example: Any, batches: Sequence = ()) -> int:
    """How many synthetic inputs a correction of the network should be run on, beside the user's own batches.

    Few real images say less about a layer with many inputs than many synthetic ones; together they say most. So they
    are filled up, but only where synthetic inputs can be trusted: images, for a network with batch-norms to match.
    """
    image = next(filter(_is_input, _values(example)), None)
    count = 0 if image is None else min(_MOST, max(_FEWEST, _PIXELS // max(1, image[0].numel() // _channels(image))))
    if not batches:
        return max(1, count)
    own = sum(len(next(v for v in _values(batch) if torch.is_tensor(v))) for batch in batches)
    if image is None or image.dim() != 4 or not _norms(model) or own * image[0, 0].numel() >= _ENOUGH * 32 * 32:
        return 0
    return max(0, min(count, _ENOUGH - own))


def synthetic_inputs(
    model: nn.Module,
    example: Any,
    run: Callable[[nn.Module, Any], Any],
    *,
    count: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[Any]:
    """Batches of inputs shaped like the example, on its device, for which every batch-norm sees what it remembers.

    example: the example inputs as a tuple or dictionary of tensors; integer tensors are repeated as they are.
    run: calls the network on such inputs. count: how many (default: `synthetic_count`). Deterministic for a seed.
    """
    generator = torch.Generator().manual_seed(seed)
    first = next(filter(_is_input, _values(example)), None)
    if first is None:
        return [example]
    count = synthetic_count(model, example) if count is None else count
    each = min(_BATCH, max(_SMALLEST_BATCH, _PIXELS // 4 * _channels(first) // max(1, first[0].numel())))
    starts = range(0, count, each)
    if first.dtype in (torch.float16, torch.bfloat16):  # pixels move by less than half precision resolves
        model = copy.deepcopy(model).float()
    norms, batches = _norms(model), []
    bar = tqdm(
        total=len(starts) * (_STEPS if norms else 1),
        desc="synthetic inputs",
        delay=2,
        leave=False,
        disable=None if progress else True,
    )
    with bar, evaluating(model):
        for start in starts:
            size = min(each, count - start)
            batch = _map(example, lambda value, size=size: _draw(value, size, generator))
            if norms:
                _match_statistics_(model, norms, batch, run, bar)
            else:
                bar.update()
            batches.append(_map(batch, lambda value: value.to(first.dtype) if _is_input(value) else value))
    return batches


def dead_leaves(count: int, channels: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """[count, channels, height, width] images of occluding shapes, with mean 0 and spread 1 over the batch."""
    side = max(height, width)
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    smallest = max(1.0, side / 16)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator)

    images = _colours(count, channels, generator).expand(count, channels, height, width)
    for _ in range(_LEAVES):
        radius = (1 / side**2 + uniform(1, 1) * (1 / smallest**2 - 1 / side**2)).rsqrt()
        down = rows - (uniform(1, 1) * (height + 2 * radius) - radius)
        right = columns - (uniform(1, 1) * (width + 2 * radius) - radius)
        angle, stretch = math.pi * uniform(1, 1), torch.exp(0.4 * torch.randn(count, 1, 1, generator=generator))
        along = (down * angle.sin() + right * angle.cos()) * stretch
        across = (down * angle.cos() - right * angle.sin()) / stretch
        square = uniform(1, 1) < 0.5
        distance = torch.where(square, torch.maximum(along.abs(), across.abs()), along.hypot(across))
        cover = (radius - distance + 0.5).clamp(0, 1)[:, None]
        slope = 0.3 * torch.randn(count, 2, 1, 1, 1, generator=generator) / side
        shade = slope[:, 0] * along[:, None] + slope[:, 1] * across[:, None]
        images = images * (1 - cover) + (_colours(count, channels, generator) + shade) * cover
    images = images + 0.1 * torch.randn(images.shape, generator=generator)
    return (images - images.mean()) / images.std().clamp(min=1e-6)


def _colours(count: int, channels: int, generator: torch.Generator) -> Tensor:
    """Correlated colours: natural ones are mostly a matter of brightness."""
    grey = torch.randn(count, 1, 1, 1, generator=generator)
    return math.sqrt(0.9) * grey + math.sqrt(0.1) * torch.randn(count, channels, 1, 1, generator=generator)


def _draw(value: Any, size: int, generator: torch.Generator) -> Any:
    if not torch.is_tensor(value) or value.dim() == 0:
        return value
    if not value.is_floating_point():
        return value[torch.arange(size) % len(value)]
    if value.dim() == 4:
        drawn = dead_leaves(size, *value.shape[1:], generator=generator)
    else:
        drawn = torch.randn(size, *value.shape[1:], generator=generator)
    return drawn.to(value.device, torch.promote_types(value.dtype, torch.float32))


@torch.enable_grad()
def _match_statistics_(model: nn.Module, norms: list, batch: Any, run: Callable, bar: tqdm) -> None:
    """Move the pixels until every batch-norm's input has the stored mean and variance."""
    pixels = [value.requires_grad_(True) for value in filter(_is_input, _values(batch))]
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    gaps: list[Tensor] = []

    def measure(bn: Any, args: tuple) -> None:
        gaps.append(_Gap.apply(args[0], bn.running_mean, bn.running_var, bn.eps))  # type: ignore[arg-type]

    hooks = [bn.register_forward_pre_hook(measure) for bn in norms]
    try:
        for parameter, _ in frozen:
            parameter.requires_grad_(False)
        optimiser = torch.optim.Adam(pixels, lr=_RATE, betas=_BETAS)
        falling = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, _STEPS)
        for _ in range(_STEPS):
            gaps.clear()
            run(model, batch)
            optimiser.zero_grad()
            torch.stack(gaps).sum().backward()
            optimiser.step()
            falling.step()
            bar.update()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, needed in frozen:
            parameter.requires_grad_(needed)
        for value in pixels:
            value.requires_grad_(False)
            value.grad = None


class _Gap(torch.autograd.Function):
    """How far mean m and deviation s of an input [N, C, ...] are from the stored ones, the gradient in closed form:

        mean_c ((m - mu)^2 / v) + mean_c ((s / sqrt(v) - 1)^2)

    Nothing is kept for the gradient but the input itself, which the batch-norm keeps anyway.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored_mean: Tensor, stored_var: Tensor, eps: float) -> Tensor:
        axes = [axis for axis in range(x.dim()) if axis != 1]
        mean = x.float().mean(dim=axes)
        square = torch.linalg.vector_norm(x.float(), dim=axes).square() / (x.numel() // x.shape[1])
        std = ((square - mean.square()).clamp(min=0) + eps).sqrt()
        spread = (stored_var + eps).float().sqrt()
        away, wider = (mean - stored_mean.float()) / spread, std / spread - 1
        ctx.save_for_backward(x, mean, away / spread, wider / (spread * std))
        return away.square().mean() + wider.square().mean()

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, shift, scale = ctx.saved_tensors
        shape = (1, -1, *[1] * (x.dim() - 2))
        factor = 2 * given[0] / x.numel()
        constant, slope = factor * (shift - scale * mean), factor * scale
        return (constant.reshape(shape) + slope.reshape(shape) * x).to(x.dtype), None, None, None


def _norms(model: nn.Module) -> list:
    return [m for m in model.modules() if isinstance(m, ops.TORCH_BATCHNORM) and m.running_mean is not None]


def _is_input(value: Any) -> bool:
    return torch.is_tensor(value) and value.is_floating_point()


def _channels(value: Tensor) -> int:
    return value.shape[1] if value.dim() == 4 else 1


def _values(inputs: Any) -> list:
    return list(inputs.values()) if isinstance(inputs, dict) else list(inputs)


def _map(inputs: Any, f: Callable) -> Any:
    if isinstance(inputs, dict):
        return {key: f(value) for key, value in inputs.items()}
    return tuple(f(value) for value in inputs)
