"""Prune a copy of a network along with it: an average of its weights (EMA, SWA)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch_pruning as tp
from torch import Tensor, nn

from intrafusion.pruner import FusionError, FusionMixin
from intrafusion.surgery.replay import replay_
from intrafusion.surgery.sequential import Sequential
from intrafusion.surgery.snapshot import Snapshot


def check_twin(pruner: Any, twin: nn.Module) -> None:
    """Raises ValueError, naming the first tensor that differs, if `twin` is not shaped like the pruner's network."""
    want = {name: tuple(tensor.shape) for name, tensor in pruner.model.state_dict().items()}
    have = {name: tuple(tensor.shape) for name, tensor in twin.state_dict().items()}
    for name in [*want, *have]:
        if want.get(name) != have.get(name):
            raise ValueError(
                f"the averaged network is no copy of the pruner's: {name!r} has shape {have.get(name, 'none')} there "
                f"and {want.get(name, 'none')} in the network; make the copy before the first pruning step"
            )


def prune_twin_(pruner: FusionMixin, twin: nn.Module, buffers: Mapping[str, Tensor] | None = None) -> None:
    """Prune `twin` as the last step of `pruner` pruned its network: same channels, same (R, S).

    Where the step refits layers, those of `twin` are refitted too, each to what `twin` gave before, on the inputs of
    the step: a twin that is equal to the network stays equal to it, bit for bit. buffers: batch-norm statistics by
    name, to give to the twin first (for averages that leave them out).

    Raises FusionError if it fails; the twin is then as it was.
    """
    cuts = pruner._cuts
    if not cuts:
        return
    modes = [(module, module.training) for module in twin.modules()]
    graph = _trace(pruner, twin)
    snapshot = Snapshot(graph, twin.modules())
    try:
        for name, value in (buffers or {}).items():
            path, _, last = name.rpartition(".")
            setattr(twin.get_submodule(path), last, value.detach().clone())
        refits = isinstance(pruner._corrector, Sequential)
        corrector = Sequential(graph, pruner._run, pruner._corrector.batches) if refits else None  # type: ignore[union-attr]
        replay_(graph, cuts, corrector)
    except Exception as error:
        snapshot.restore()
        raise FusionError(f"while pruning the averaged network as the network was: {error}") from error
    finally:
        for module, training in modes:
            module.training = training


def _trace(pruner: Any, twin: nn.Module) -> tp.DependencyGraph:
    """The dependency graph of `twin`, traced as that of the pruner's network was."""
    tracing = dict(pruner._tracing)
    free: Any = [(twin.get_parameter(name), dim) for name, dim in tracing.pop("unwrapped")]
    ignored = [twin.get_parameter(name) for name in tracing.pop("ignored")]
    with _trainable(twin), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
        return tp.DependencyGraph().build_dependency(
            twin, pruner._example, unwrapped_parameters=free, ignored_params=ignored, **tracing
        )


@contextmanager
def _trainable(network: nn.Module) -> Iterator[None]:
    """Torch-pruning follows gradients, and averaged weights often want none."""
    frozen = [p for p in network.parameters() if not p.requires_grad and p.is_floating_point()]
    modes = [(module, module.training) for module in network.modules()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module, training in modes:
            module.training = training
