"""Running statistics of batch-norms that are not refitted with a layer: those behind a concat, or in front of a layer.

In eval mode such a batch-norm is an affine map like any other, whatever its running statistics are; in training mode it
takes the statistics of what it reads. Both are the same function where the running statistics are those of its input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from intrafusion.correct.refit import set_tensor_
from intrafusion.groups.batchnorm import read
from intrafusion.groups.layout import by_channel
from intrafusion.ot.regression import Moments
from intrafusion.running import evaluating

_Sums = dict[str, Moments]


@torch.no_grad()
def track_statistics_(
    model: nn.Module, dense: nn.Module, run: Callable[[nn.Module, Any], Any], batches: Sequence, norms: Iterable[str]
) -> None:
    """Give each batch-norm of `norms` that reads other values than in `dense` the mean and variance of what it reads.

    What the network computes in eval mode stays as it is.
    """
    tracked = [name for name in norms if _is_tracked(model.get_submodule(name))]
    if not tracked:
        return
    before = _sums(dense, run, batches[:1], tracked)
    now = _sums(model, run, batches[:1], tracked)
    changed = [name for name in now if name in before and not _same(before[name], now[name])]
    for name, sums in _sums(model, run, batches, changed).items() if changed else ():
        _set_statistics_(model.get_submodule(name), sums)


def _is_tracked(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine and module.running_mean is not None


def _set_statistics_(bn: Any, sums: Moments) -> None:
    old = read(bn)
    mean, var = sums.y / sums.n, sums.centred()[2] / sums.n
    scale = (var + bn.eps).sqrt()
    new = {"weight": old.scale * scale, "bias": old.beta + old.scale * (mean - old.mean)}
    for name, value in (new | {"running_mean": mean, "running_var": var}).items():
        set_tensor_(bn, name, value)


def _sums(network: nn.Module, run: Callable, batches: Sequence, names: Iterable[str]) -> _Sums:
    """Moments of what each batch-norm reads, per channel, over all its calls."""
    found: _Sums = {}

    def see(name: str, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        sample = by_channel(args[0] if args else kwargs["input"], 1)
        more = Moments.of(sample[:, :0], sample.to(torch.promote_types(sample.dtype, torch.float32)))
        found[name] = found[name] + more if name in found else more

    with ExitStack() as stack, evaluating(network):
        for name in names:
            hook = network.get_submodule(name).register_forward_pre_hook(partial(see, name), with_kwargs=True)
            stack.callback(hook.remove)
        for batch in batches:
            run(network, batch)
    return found


def _same(first: Moments, second: Moments) -> bool:
    return first.y.shape == second.y.shape and torch.equal(first.y, second.y) and torch.equal(first.yy, second.yy)
