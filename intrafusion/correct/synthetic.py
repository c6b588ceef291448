"""Inputs for a network that came without any: what batch-norm remembers of the data, painted onto random images.

A dead-leaves image (occluding shapes with radii distributed as r^-3; Lee, Mumford & Huang 2001) has the second-order
and edge statistics of natural images. A few gradient steps on the pixels then bring the mean and the spread of every
batch-norm's input to the stored ones (as in Yin et al. 2020, DeepInversion, without labels). Networks without
batch-norm get the images as they are; inputs that are not images get white noise. Both come in the units of the example
(`units`), and a language model writes its own text (`sequences`). Inputs of which this says too little are not guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning import ops
from tqdm import tqdm

from intrafusion.correct.images import dead_leaves
from intrafusion.correct.sequences import count_beside, sequence_count, sequences, token_ids, why_not
from intrafusion.correct.units import Units
from intrafusion.running import copy_of, described, evaluating, leaves, map_tensors

_STEPS, _RATES, _BETAS = 12, (0.15, 0.05), (0.8, 0.99)
"""Of Adam on the pixels; its rate begins with the first of these and falls linearly to 0. (20 steps at a rate of 0.05
leave half of the gap that is left here on CIFAR networks, take 5/3 of the time, and give pruned networks of the same
accuracy on training images.) On deep networks it is too fast: the second one leaves less there.
"""
_MATCHED = 0.03
"""A batch-norm whose input is so near to what it remembers is matched (CIFAR networks: 0.004 to 0.006 in the mean).
Where the first batch is not, and the gap fell faster as the rate went down, the slower rate is tried on it, and the
better one is used for all.
"""
_FEWEST, _MOST = 48, 500
_SMALL, _FEWER = 32 * 32, 1.25
"""`_MOST` images of `_SMALL` pixels; larger ones have more places to see: their number falls by this power of it."""
_PIXELS = _MOST * _SMALL
_ENOUGH = 1000
"""From so many inputs of the user's own, or as many pixels as that many of 32 x 32, synthetic ones are not added."""
_BATCH, _SMALLEST_BATCH = 125, 16
"""Images that are matched together: as many as fit into `_PIXELS` / 4, between these two."""


class NoSyntheticInputs(ValueError):
    """What a network reads cannot be drawn at random; the message says why."""


def synthetic_count(model: nn.Module, example: Any, batches: Sequence = ()) -> int:
    """How many synthetic inputs a correction of the network should be run on, beside the user's own batches.

    Few real images say less about a layer with many inputs than many synthetic ones; together they say most. So they
    are filled up, but only where synthetic inputs can be trusted: images, for a network with batch-norms to match, and
    what a language model writes itself.
    """
    ids = token_ids(example)
    if ids is not None:
        return count_beside(model, ids, batches) if batches else sequence_count(ids)
    image = next(filter(_is_input, _tensors(example)), None)
    count = 0
    if image is not None:
        image = image[None] if _images_in_a_list(example) else image
        larger = image[0].numel() / _channels(image) / _SMALL
        count = min(_MOST, max(_FEWEST, round(_MOST / max(1.0, larger) ** _FEWER)))
    if not batches:
        return max(1, count)
    own = sum(map(_size, batches))
    if image is None or image.dim() != 4 or not _norms(model) or own * image[0, 0].numel() >= _ENOUGH * 32 * 32:
        return 0
    return max(0, min(count, _ENOUGH - own)) if not _unknown(model, example) else 0


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

    example: the example inputs, as the network takes them. run: calls the network on such inputs. count: how many
    (default: `synthetic_count`). Deterministic for a seed.

    Raises NoSyntheticInputs for what cannot be drawn: integers that are no language model's tokens, several inputs that
    no batch-norm speaks for.
    """
    generator = torch.Generator().manual_seed(seed)
    count = synthetic_count(model, example) if count is None else count
    ids = token_ids(example)
    reason = why_not(model, example, ids, run) if ids is not None else _unknown(model, example)
    if reason:
        raise NoSyntheticInputs(f"the network reads {described(example)}, and {reason}")
    if ids is not None:
        return sequences(model, example, ids, run, count=count, generator=generator, progress=progress)
    return _drawn(model, _Drawing(example), run, count, generator, progress)


def _drawn(
    model: nn.Module, drawing: _Drawing, run: Callable, count: int, generator: torch.Generator, progress: bool
) -> list[Any]:
    first = drawing.tensors[0]
    numbers = first.numel() if drawing.listed else first[0].numel()
    each = min(_BATCH, max(_SMALLEST_BATCH, _PIXELS // 4 * drawing.channels // max(1, numbers)))
    starts = range(0, count, each)
    if first.dtype in (torch.float16, torch.bfloat16):  # pixels move by less than half precision resolves
        model = copy_of(model).float()
    norms, batches = _norms(model), []
    total, hidden = len(starts) * (_STEPS if norms else 1), None if progress else True
    bar = tqdm(total=total, desc="synthetic inputs", delay=2, leave=False, disable=hidden)
    rate = _RATES[0]
    with bar, evaluating(model):
        for start in starts:
            pixels = drawing.start(min(each, count - start), generator)
            if norms and start == 0:
                drawing.choose_units_(lambda batch: _gap(model, norms, batch, run), pixels)
            if norms and start == 0:
                rate = _match_best_(model, norms, pixels, drawing.shown, run, bar)
            elif norms:
                _match_statistics_(model, norms, pixels, drawing.shown, run, bar, rate)
            else:
                bar.update()
            batches.append(drawing.finished(pixels))
    return batches


class _Drawing:
    """Inputs like an example's: standard pixels for each of its tensors, and what the network is shown of them.

    listed: is it a list of single images? Then all of them are one tensor of pixels.
    """

    def __init__(self, example: Any) -> None:
        self._example, self.listed = example, _images_in_a_list(example)
        self.tensors = _tensors(example)[:1] if self.listed else _tensors(example)
        batches = [torch.stack(_tensors(example))] if self._alike else self.tensors
        self._units = [Units.of(batch[None] if self.listed and not self._alike else batch) for batch in batches]

    @property
    def _alike(self) -> bool:
        """Have the images of a list one size?"""
        return self.listed and len({image.shape for image in _tensors(self._example)}) == 1

    @property
    def channels(self) -> int:
        return self.tensors[0].shape[0] if self.listed else _channels(self.tensors[0])

    def start(self, size: int, generator: torch.Generator) -> list[Tensor]:
        """[size, ...] random images for every tensor that holds such, white noise for others."""
        found = []
        for value in self.tensors:
            shape = value.shape if self.listed else value.shape[1:]
            if len(shape) == 3:
                drawn = dead_leaves(size, *shape, generator=generator)
            else:
                drawn = torch.randn(size, *shape, generator=generator)
            found.append(drawn.to(value.device, torch.promote_types(value.dtype, torch.float32)))
        return found

    def choose_units_(self, gap: Callable[[Any], float], pixels: list[Tensor]) -> None:
        """The example's units or standard ones, whichever agree better with the batch-norms."""
        if all(units.are_standard or not units.dtype.is_floating_point for units in self._units):
            return
        theirs, standard = self._units, [Units(units.dtype) for units in self._units]
        told = gap(self.shown(pixels))
        self._units = standard
        if not gap(self.shown(pixels)) < told:
            self._units = theirs

    def shown(self, pixels: list[Tensor]) -> Any:
        """What the network is run on; a gradient goes through."""
        return self._batch([units.apply(value) for units, value in zip(self._units, pixels, strict=True)])

    def finished(self, pixels: list[Tensor]) -> Any:
        """The same in the dtypes of the example."""
        return self._batch([units.finished(value) for units, value in zip(self._units, pixels, strict=True)])

    def _batch(self, values: list[Tensor]) -> Any:
        if self.listed:
            return _with_images(self._example, list(values[0]))
        remaining = iter(values)
        return map_tensors(self._example, lambda _: next(remaining))


def _unknown(model: nn.Module, example: Any) -> str:
    """Why inputs cannot be drawn at random; '' if they can."""
    tensors = _tensors(example)
    if not tensors:
        return "there is no tensor among them"
    if not all(map(_is_input, tensors)):
        return "integers cannot be drawn at random"
    if len(tensors) == 1 or _images_in_a_list(example):
        return ""
    if min(value.dim() for value in tensors) < 2 or len({len(value) for value in tensors}) > 1:
        return "it is not known how several inputs belong together"
    return "" if _norms(model) else "there is no batch-norm that knows how several inputs belong together"


def _gap(model: nn.Module, norms: list, batch: Any, run: Callable) -> float:
    """How far a batch's statistics are from those that the batch-norms remember; infinite if it does not run."""
    gaps: list[Tensor] = []
    hooks = _watched(norms, gaps)
    try:
        with torch.no_grad():
            run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    total = torch.stack(gaps).sum().item() if gaps else 0.0
    return total if total == total else float("inf")


def _watched(norms: list, gaps: list[Tensor]) -> list:
    def measure(bn: Any, args: tuple) -> None:
        gaps.append(_Gap.apply(args[0], bn.running_mean, bn.running_var, bn.eps))  # type: ignore[arg-type]

    return [bn.register_forward_pre_hook(measure) for bn in norms]


def _match_best_(
    model: nn.Module, norms: list, pixels: list[Tensor], shown: Callable, run: Callable, bar: tqdm
) -> float:
    """Match the first batch at the first rate, or at the slower one if that is too fast here. Returns the rate."""
    first = [value.clone() for value in pixels]
    gaps = _match_statistics_(model, norms, pixels, shown, run, bar, _RATES[0])
    if not gaps or not gaps[-1] > _MATCHED * len(norms) or not _was_too_fast(gaps):
        return _RATES[0]
    bar.total += _STEPS
    slower = _match_statistics_(model, norms, first, shown, run, bar, _RATES[1])
    if not slower[-1] < gaps[-1]:
        return _RATES[0]
    for value, better in zip(pixels, first, strict=True):
        value.copy_(better)
    return _RATES[1]


def _was_too_fast(gaps: Sequence[float]) -> bool:
    """Has some step, at a lower rate, closed more of the gap than the one before it?"""
    falls = [before - after for before, after in pairwise(gaps)]
    return any(after > before for before, after in pairwise(falls))


@torch.enable_grad()
def _match_statistics_(
    model: nn.Module, norms: list, pixels: list[Tensor], shown: Callable, run: Callable, bar: tqdm, rate: float
) -> list[float]:
    """Move the pixels until every batch-norm's input has the stored mean and variance. Returns the gap at each step."""
    found: list[float] = []
    for value in pixels:
        value.requires_grad_(True)
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    gaps: list[Tensor] = []
    hooks = _watched(norms, gaps)
    try:
        for parameter, _ in frozen:
            parameter.requires_grad_(False)
        optimiser = torch.optim.Adam(pixels, lr=rate, betas=_BETAS)
        falling = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, _STEPS)
        for _ in range(_STEPS):
            gaps.clear()
            run(model, shown(pixels))
            if not gaps:
                break
            optimiser.zero_grad()
            gap = torch.stack(gaps).sum()
            gap.backward()
            found.append(float(gap.detach()))
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
    return found


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


def _is_input(value: Tensor) -> bool:
    """Is it something that numbers or pixels can be drawn for?"""
    return value.is_floating_point() or (value.dtype == torch.uint8 and value.dim() >= 3)


def _channels(value: Tensor) -> int:
    return value.shape[1] if value.dim() == 4 else 1


def _tensors(inputs: Any) -> list[Tensor]:
    return [leaf for leaf in leaves(inputs) if isinstance(leaf, Tensor)]


def _size(batch: Any) -> int:
    """How many inputs a batch holds."""
    tensors = _tensors(batch)
    return len(tensors) if _images_in_a_list(batch) else len(tensors[0])


def _images_in_a_list(inputs: Any) -> bool:
    """Is the only argument a list of single images [C, H, W], as torchvision's detectors take them?"""
    values = list(inputs.values()) if isinstance(inputs, Mapping) else list(inputs)
    listed = len(values) == 1 and isinstance(values[0], (list, tuple)) and len(values[0]) > 0
    return listed and all(isinstance(image, Tensor) and image.dim() == 3 and _is_input(image) for image in values[0])


def _with_images(inputs: Any, images: list[Tensor]) -> Any:
    if isinstance(inputs, Mapping):
        return dict.fromkeys(inputs, images)
    return type(inputs)([images])
