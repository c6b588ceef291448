"""Calls of a forward pass: what one may be repeated on, what it depends on, what it writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

CHANNELWISE = {
    F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu6, F.hardtanh, F.leaky_relu, F.elu,
    F.gelu, F.silu, F.mish, F.hardswish, F.hardsigmoid, F.sigmoid, F.tanh, torch.sigmoid, torch.tanh, Tensor.sigmoid,
    Tensor.tanh, F.softplus, F.selu, F.celu, torch.clamp, Tensor.clamp, F.dropout, F.dropout1d, F.dropout2d,
    F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d,
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.adaptive_max_pool2d,
    torch.mean, Tensor.mean, Tensor.contiguous,
}  # fmt: skip
RESHAPES = {torch.flatten, Tensor.flatten, torch.reshape, Tensor.reshape, Tensor.view}
_POINTWISE_NAMES = ("relu", "gelu", "silu", "mish", "hard", "sigmoid", "tanh", "elu", "softplus", "clamp", "dropout")


@dataclass(frozen=True)
class Call:
    """One recorded call whose first argument was a tensor: func(tensor, *args, **kwargs)."""

    func: Callable
    args: tuple
    kwargs: dict

    def __call__(self, value: Tensor) -> Tensor:
        """The same call on another value. (A dropout that stays on in eval mode is what it is on average.)"""
        if "dropout" in self.func.__name__:
            return value
        return self.func(value, *self.args, **self.kwargs)

    @property
    def flattens(self) -> bool:
        """Does it put channels and their positions into one axis?"""
        return self.func is torch.flatten

    @property
    def block(self) -> int | None:
        """Side of the window of inputs that one output depends on: 1 pointwise, s for an s x s pool, None for all."""
        name = self.func.__name__
        if any(part in name for part in _POINTWISE_NAMES) or name == "contiguous":
            return 1
        if name in ("max_pool2d", "avg_pool2d") or name == "boolean_dispatch" or "pool2d" in name:
            return _pool_window(self.args, self.kwargs) if "adaptive" not in name else None
        return None


_ADAPTIVE = {
    "adaptive_avg_pool1d": F.avg_pool1d, "adaptive_avg_pool2d": F.avg_pool2d, "adaptive_avg_pool3d": F.avg_pool3d,
    "adaptive_max_pool2d": F.max_pool2d,
}  # fmt: skip


def as_windows(func: Callable, before: Tensor, out: Tensor) -> tuple[Callable, int] | None:
    """The pool with windows of one size, and that size, that an adaptive pool is; None if it is another's."""
    pool = _ADAPTIVE.get(name_of(func))
    if pool is None or before.dim() != out.dim() or before.dim() < 3:
        return None
    sides = {
        (size // max(1, fewer), size % max(1, fewer))
        for size, fewer in zip(before.shape[2:], out.shape[2:], strict=True)
    }
    return (pool, sides.pop()[0]) if len(sides) == 1 and next(iter(sides))[1] == 0 else None


def _pool_window(args: tuple, kwargs: dict) -> int | None:
    """The side of a pool whose windows do not overlap and are not padded; None for others."""
    kernel = args[0] if args else kwargs.get("kernel_size")
    stride = args[1] if len(args) > 1 else kwargs.get("stride")
    padding = args[2] if len(args) > 2 else kwargs.get("padding", 0)
    side = kernel[0] if isinstance(kernel, (tuple, list)) and len(set(kernel)) == 1 else kernel
    stride = side if stride in (None, [], ()) else stride
    stride = stride[0] if isinstance(stride, (tuple, list)) and len(set(stride)) == 1 else stride
    return side if isinstance(side, int) and side == stride and padding in (0, (0, 0)) else None


def overwrites(func: Callable, kwargs: dict) -> bool:
    """Does a call change its first argument in place?"""
    name = getattr(func, "__name__", "")
    return bool(kwargs.get("inplace")) or name in ("__iadd__", "__imul__") or (name.endswith("_") and name[-2:] != "__")


def name_of(func: Callable) -> str:
    """The name of a function, or of the attribute that is looked up."""
    name = getattr(func, "__name__", "")
    return getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else name
