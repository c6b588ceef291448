"""Is a tensor still a mixture when the layers that it comes from are mixed?

Where a group's rows are mixed by R, what a reader reads should be what R makes of it, up to functions of one channel.
That ends where two of the group's layers meet in a product (a gate, attention), or in a call that nobody knows.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from intrafusion.correct.calls import CHANNELWISE, name_of
from intrafusion.running import leaves

_SUMS = {"add", "add_", "sub", "sub_", "rsub", "iadd", "isub", "radd", "cat", "concat", "concatenate", "stack", "lerp"}
"""Names without underscores around them: what gives a sum, or puts side by side, what it is given."""
_ROUTES = {
    "flatten", "unflatten", "reshape", "reshape_as", "view", "view_as", "permute", "transpose", "swapaxes", "movedim",
    "moveaxis", "squeeze", "unsqueeze", "expand", "expand_as", "repeat", "repeat_interleave", "tile", "contiguous",
    "clone", "detach", "to", "type", "type_as", "float", "half", "double", "bfloat16", "getitem", "narrow", "select",
    "index_select", "chunk", "split", "tensor_split", "unbind", "pad", "interpolate", "upsample", "roll", "flip", "t",
    "T", "mT", "mean", "sum", "neg", "positive", "mul", "mul_", "imul", "rmul", "div", "div_", "truediv", "itruediv",
    "true_divide", "dropout", "alpha_dropout", "feature_dropout", "pixel_shuffle", "pixel_unshuffle", "unfold",
    "fold", "batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "data", "masked_fill",
    "channel_shuffle", "prelu", "boolean_dispatch", "threshold", "hardshrink", "softshrink", "logsigmoid", "rrelu",
    "amax", "where", "real", "feature_alpha_dropout", "max_pool1d", "max_pool2d", "max_pool3d",
} | {name_of(func) for func in CHANNELWISE}  # fmt: skip
"""What passes the mixtures of one tensor on: linear maps, and functions of one channel. (Norms by our experience.)"""

Product = tuple[frozenset[str], ...]
"""What meets in a call: for each tensor, the layers that it comes from."""


@dataclass(frozen=True)
class _Past:
    sources: frozenset[str] = frozenset()
    products: frozenset[Product] = frozenset()


_NOTHING = _Past()


class Mixtures:
    """Which layers every tensor of one forward pass comes from, and which of them have met on the way."""

    def __init__(self) -> None:
        self._pasts: dict[int, tuple[Callable[[], Tensor | None], _Past]] = {}

    def made(self, output: Any, layer: str) -> None:
        """A layer has given this."""
        self._set(output, _Past(frozenset((layer,))))

    def called(self, func: Callable, arguments: Any, output: Any) -> None:
        """Something else has been computed."""
        pasts = [self._of(value) for value in leaves(arguments) if isinstance(value, Tensor)]
        operands = [past.sources for past in pasts if past.sources]
        if not operands:
            return
        name = name_of(func).strip("_") if name_of(func).startswith("__") else name_of(func)
        products = frozenset[Product]().union(*(past.products for past in pasts))
        if len(operands) > 1 and name not in _SUMS:
            products |= {tuple(operands)}
        elif len(operands) == 1 and name not in _ROUTES and name not in _SUMS:
            products |= {(operands[0], operands[0])}
        past = _Past(frozenset[str]().union(*operands), products)
        for value in leaves(output):
            self._set(value, past)

    def keeps(self, value: Tensor, layers: Iterable[str]) -> bool:
        """Is a tensor mixed as the outputs of `layers` are, if all of these are mixed alike?"""
        mixed = frozenset(layers)
        return not any(_meet(product, mixed) for product in self._of(value).products)

    def _of(self, value: Tensor) -> _Past:
        made, past = self._pasts.get(id(value), (None, _NOTHING))
        return past if made is not None and made() is value else _NOTHING

    def _set(self, value: Any, past: _Past) -> None:
        if isinstance(value, Tensor):
            key = id(value)
            self._pasts[key] = weakref.ref(value, lambda _, key=key: self._pasts.pop(key, None)), past


def _meet(product: Sequence[frozenset[str]], layers: frozenset[str]) -> bool:
    return sum(not operand.isdisjoint(layers) for operand in product) > 1
