"""Prune a copy of a network along with it: an average of its weights (EMA, SWA)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from intrafusion.correct.correction import Correction
from intrafusion.groups.packed import part_alike_
from intrafusion.groups.snapshot import Snapshot
from intrafusion.groups.streams import untie_
from intrafusion.history.replay import replay_
from intrafusion.methods.view import View
from intrafusion.prune import attention, configs
from intrafusion.prune.fused_group import FusionError
from intrafusion.prune.pruner import FusionMixin


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
    the step (which the pruner must have been told to keep, by `keep_inputs`): a twin that is equal to the network stays
    equal to it, bit for bit. buffers: batch-norm statistics by
    name, to give to the twin first (for averages that leave them out).

    Raises FusionError if it fails; the twin is then as it was.
    """
    step = pruner.last_step
    if step is None or not step.cuts:
        return
    modes = [(module, module.training) for module in twin.modules()]
    part_alike_(twin, pruner.tracing.packed)
    _untie_as_(twin, pruner.model)
    graph = pruner.tracing.trace(twin, pruner.example_inputs)
    snapshot = Snapshot(graph, twin.modules())
    try:
        for name, value in (buffers or {}).items():
            path, _, last = name.rpartition(".")
            setattr(twin.get_submodule(path), last, value.detach().clone())
        correction = None
        if step.method.repairs and step.inputs:
            method = pruner.fusion.method()
            view = View(graph, pruner.run, pruner.example_inputs, step.inputs, seed=pruner.fusion.seed)
            correction = Correction(
                graph, pruner.run, step.inputs, (), lambda layer: method.repair_(layer, view),
                openings=step.openings, sensitivity=method.sensitivity, unbiased=pruner.unbiased,
                after_cut=method.after_cut, survey=False, progress=False,
            )  # fmt: skip
        replay_(graph, step.cuts, correction)
        configs.follow(twin, attention.numbers(pruner))
    except Exception as error:
        snapshot.restore()
        raise FusionError(f"while pruning the averaged network as the network was: {error}") from error
    finally:
        for module, training in modes:
            module.training = training


def _untie_as_(twin: nn.Module, model: nn.Module) -> None:
    """Layers of the network that have come to own their weights own them in the average, too."""
    weights = {name: layer._parameters.get("weight") for name, layer in model.named_modules()}
    uses = Counter(id(weight) for weight in weights.values() if weight is not None)
    untie_(
        twin,
        {twin.get_submodule(name) for name, weight in weights.items() if weight is not None and uses[id(weight)] == 1},
    )
