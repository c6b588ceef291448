"""What flows into and out of one layer of a network, and which calls lie between it and the layers before.

A forward pass under a tape remembers, for every tensor, the call that made it. From a layer's input one can then walk
back over activations and poolings to the pre-activation they were computed from, and compute the same calls again for
other values: no list of known architectures is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from intrafusion.correct.memo import Memo, Room

_ADDITIONS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
_CHANNELWISE = {
    F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu6, F.hardtanh, F.leaky_relu, F.elu,
    F.gelu, F.silu, F.mish, F.hardswish, F.hardsigmoid, F.sigmoid, F.tanh, torch.sigmoid, torch.tanh, Tensor.sigmoid,
    Tensor.tanh, F.softplus, F.selu, F.celu, torch.clamp, Tensor.clamp, F.dropout, F.dropout1d, F.dropout2d,
    F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d,
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.adaptive_max_pool2d,
    torch.flatten, Tensor.flatten, torch.mean, Tensor.mean, Tensor.contiguous,
}  # fmt: skip
_POINTWISE_NAMES = ("relu", "gelu", "silu", "mish", "hard", "sigmoid", "tanh", "elu", "softplus", "clamp", "dropout")


@dataclass(frozen=True)
class Call:
    """One recorded call whose first argument was a tensor: func(tensor, *args, **kwargs)."""

    func: Callable
    args: tuple
    kwargs: dict

    def __call__(self, value: Tensor) -> Tensor:
        return self.func(value, *self.args, **self.kwargs)

    @property
    def block(self) -> int | None:
        """Side of the window of inputs that one output depends on: 1 pointwise, s for an s x s pool, None for all."""
        name = self.func.__name__
        if any(part in name for part in _POINTWISE_NAMES) or name == "contiguous":
            return 1
        if name in ("max_pool2d", "avg_pool2d") or name == "boolean_dispatch" or "pool2d" in name:
            return _pool_window(self.args, self.kwargs) if "adaptive" not in name else None
        return None


def _pool_window(args: tuple, kwargs: dict) -> int | None:
    """The side of a pool whose windows do not overlap and are not padded; None for others."""
    kernel = args[0] if args else kwargs.get("kernel_size")
    stride = args[1] if len(args) > 1 else kwargs.get("stride")
    padding = args[2] if len(args) > 2 else kwargs.get("padding", 0)
    side = kernel[0] if isinstance(kernel, (tuple, list)) and len(set(kernel)) == 1 else kernel
    stride = side if stride in (None, [], ()) else stride
    stride = stride[0] if isinstance(stride, (tuple, list)) and len(set(stride)) == 1 else stride
    return side if isinstance(side, int) and side == stride and padding in (0, (0, 0)) else None


@dataclass(frozen=True)
class Sight:
    """One layer in one forward pass.

    inputs: what the layer read. before: the tensor that the channelwise calls `chain` made the input from. output: what
    the layer (with the batch-norm that belongs to it) gave. other: what was then added to the output, if anything.
    """

    inputs: Tensor
    before: Tensor
    chain: tuple[Call, ...]
    output: Tensor
    other: Tensor | None


class _Enough(Exception):
    """The forward pass has shown what was asked for."""


class _Tape(TorchFunctionMode):
    """Remembers the call that made each tensor; tensors that are overwritten in place are remembered as they were."""

    def __init__(self, memo: Memo) -> None:
        super().__init__()
        self._memo = memo
        self._copying = False
        self.origin: dict[int, tuple[Tensor, Callable, tuple, dict]] = {}
        self.watched: Tensor | None = None
        self.other: Tensor | None = None
        self._alive: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if self._copying:
            return func(*args, **kwargs)
        first = args[0] if args and isinstance(args[0], Tensor) else None
        watched = self.watched
        if watched is not None and func in _ADDITIONS and len(args) == 2:
            others = [a for a in args if a is not watched]
            if len(others) == 1 and isinstance(others[0], Tensor) and others[0].shape == watched.shape:
                self.other = others[0].clone()
                raise _Enough
        before = first
        if first is not None and _overwrites(func, kwargs):
            before = first.clone()
            self._memo.spare(first)
            if id(first) in self.origin:
                self.origin[id(before)] = self.origin[id(first)]
        out = self._memo.call(func, args, kwargs)
        if out is first and before is first:  # a dropout in eval mode, a tensor that is contiguous already
            return out
        if isinstance(out, Tensor) and before is not None and not any(isinstance(a, Tensor) for a in args[1:]):
            if "inplace" in kwargs:
                kwargs["inplace"] = False
            self.origin[id(out)] = (before, func, args[1:], kwargs)
            self._alive.append(out)
        elif isinstance(out, Tensor):
            self.origin.pop(id(out), None)
            self._alive.append(out)
        return out

    def copy(self, value: Tensor) -> Tensor:
        """A copy that is no part of the pass."""
        self._copying = True
        try:
            return value.clone()
        finally:
            self._copying = False

    def trace_back(self, value: Tensor) -> tuple[Tensor, tuple[Call, ...]]:
        """The first tensor that `value` was made from by channelwise calls alone, and those calls in order."""
        chain: list[Call] = []
        while id(value) in self.origin:
            before, func, args, kwargs = self.origin[id(value)]
            if func not in _CHANNELWISE and func.__name__ != "boolean_dispatch":
                break
            chain.insert(0, Call(func, args, kwargs))
            value = before
        return value, tuple(chain)


def _overwrites(func: Callable, kwargs: dict) -> bool:
    name = getattr(func, "__name__", "")
    return bool(kwargs.get("inplace")) or name in ("__iadd__", "__imul__") or (name.endswith("_") and name[-2:] != "__")


def look(
    forward: Callable[[], Any],
    layer: nn.Module,
    partner: nn.Module | None,
    *,
    add: bool = True,
    memo: Memo | None = None,
) -> Sight:
    """Run a network until a layer has been seen.

    forward: runs the network (in eval mode, without gradients). partner: the layer's batch-norm. add: go on until
    something is added to the output (or the pass ends), to see it. memo: of the network on these inputs.

    Raises ValueError if the layer is not reached with a tensor.
    """
    memo = Memo(Room(0)) if memo is None else memo
    tape = _Tape(memo)
    seen: dict[str, Any] = {}

    def before(module, args):
        if "inputs" not in seen:
            seen["before"], seen["chain"] = tape.trace_back(args[0])
            seen["inputs"] = tape.copy(args[0])

    def after(module, args, output):
        if "output" not in seen:
            seen["output"] = tape.copy(output)
            tape.watched = output
            if not add:
                raise _Enough

    with ExitStack() as stack:
        stack.callback(layer.register_forward_pre_hook(before).remove)
        stack.callback((partner or layer).register_forward_hook(after).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(memo.running())
        try:
            with tape:
                forward()
        except _Enough:
            pass
    if "output" not in seen:
        raise ValueError(f"the forward pass does not reach {type(layer).__name__}")
    return Sight(seen["inputs"], seen["before"], seen["chain"], seen["output"], tape.other)
