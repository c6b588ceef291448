"""Networks that draw random numbers in eval mode too: samples of a latent, dropout that stays on, added noise."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from intrafusion.running.inputs import tensors_in


@dataclass(frozen=True)
class RandomState:
    """Where all generators stand that a forward pass may draw from without being given one."""

    cpu: Tensor
    cuda: list[Tensor]
    python: Any
    numpy: Any

    @classmethod
    def now(cls) -> RandomState:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(torch.get_rng_state(), cuda, random.getstate(), np.random.get_state())

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for number, state in enumerate(self.cuda):
            torch.cuda.set_rng_state(state, number)
        random.setstate(self.python)
        np.random.set_state(self.numpy)


@contextmanager
def repeatable(inputs: Any) -> Iterator[None]:
    """The same random numbers every time for the same inputs, and others for other inputs; nobody else's change."""
    before, seed = RandomState.now(), _seed(inputs)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed queues a call for devices that are not there
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        before.restore()


def _seed(inputs: Any) -> int:
    """Of the first few numbers of every tensor."""
    seed = 0
    for tensor in tensors_in(inputs):
        if tensor.device.type != "meta":
            few = tensor.detach().flatten()[:16].to("cpu", torch.float64).nan_to_num()
            seed = zlib.crc32(few.numpy().tobytes(), seed)
    return seed


class Levelled(TorchFunctionMode):
    """While it lasts, all random numbers are the same one: 1 if normal, 1/2 if uniform, and dropout drops nothing.

    Such a network treats all channels alike, which one that adds its noise to them, number by number, does not: a
    permutation of the channels then leaves the output as it is, as without noise, and the noise's scale still counts.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if name == "scaled_dot_product_attention":
            if len(args) > _SDPA_DROPOUT:
                args = (*args[:_SDPA_DROPOUT], 0.0, *args[_SDPA_DROPOUT + 1 :])
            else:
                kwargs["dropout_p"] = 0.0
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        level = _LEVELS.get(name)
        if level is None or not isinstance(out, Tensor) or not out.is_floating_point():
            return out
        return out.copy_(torch.as_tensor(level(args, kwargs), dtype=out.dtype, device=out.device))


_DROPOUTS = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "dropout_"}
_SDPA_DROPOUT = 4
"""Where scaled_dot_product_attention has its dropout."""


def _argument(args: tuple, kwargs: dict, at: int, name: str, default: Any) -> Any:
    return args[at] if len(args) > at else kwargs.get(name, default)


def _normal(args: tuple, kwargs: dict) -> Any:
    return _argument(args, kwargs, 0, "mean", 0.0) + _argument(args, kwargs, 1, "std", 1.0)


def _normal_(args: tuple, kwargs: dict) -> Any:
    return _argument(args, kwargs, 1, "mean", 0.0) + _argument(args, kwargs, 2, "std", 1.0)


def _uniform_(args: tuple, kwargs: dict) -> Any:
    return 0.5 * (_argument(args, kwargs, 1, "from", 0.0) + _argument(args, kwargs, 2, "to", 1.0))


def _probability(args: tuple, kwargs: dict) -> Any:
    """Of bernoulli(p), bernoulli(x, p=...), x.bernoulli_(p): a number, or a tensor of probabilities."""
    p = _argument(args, kwargs, 1, "p", None)
    return args[0] if p is None and args else 0.5 if p is None else p


_LEVELS: dict[str, Callable[[tuple, dict], Any]] = {
    "randn": lambda args, kwargs: 1.0,
    "randn_like": lambda args, kwargs: 1.0,
    "normal": _normal,
    "normal_": _normal_,
    "rand": lambda args, kwargs: 0.5,
    "rand_like": lambda args, kwargs: 0.5,
    "uniform_": _uniform_,
    "bernoulli": _probability,
    "bernoulli_": lambda args, kwargs: 0.5 if len(args) < 2 and "p" not in kwargs else _probability(args, kwargs),
}
