"""Prune and fuse while a network is being trained: one object that the user's own loop calls after every step."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.groups.packed import part_alike_
from intrafusion.groups.snapshot import Snapshot
from intrafusion.prune.report import Report
from intrafusion.training.averaged_weights import check_twin, prune_twin_
from intrafusion.training.distributed import broadcast_, check_unsharded, together
from intrafusion.training.optimizer_state import transfer_optimizer_state

_LOG = logging.getLogger(__name__)
_FORMAT = 1


class FusionSchedule:
    """Calls `pruner.step()` at the scheduled steps of a training loop, and takes optimizer and averages along.

    pruner: an `IntraFusionPruner` (or a sibling) of the network that is trained; with `iterative_steps=len(at)` and, as
    `iterative_pruning_ratio_scheduler`, one of torch-pruning's or of `intrafusion.training.ratios`.
    optimizer: over that network's parameters; it is changed in place, so a scheduler of the learning rate goes on with
    it. None: there is none yet.
    at: after which calls of `step()` to prune, increasing, counted from 1: call it after every `optimizer.step()` to
    count in steps, or at the end of every epoch to count in epochs.
    ema: an average of the network's weights that is pruned along, with the same channels mixed by the same maps:
    `torch.optim.swa_utils.AveragedModel`, timm's `ModelEma`, or a plain copy of the network.
    keep, kinds: for `transfer_optimizer_state`.

    >>> pruner = IntraFusionPruner(model, example, metric, iterative_steps=3, ignored_layers=[model.fc])
    >>> schedule = FusionSchedule(pruner, optimizer, at=[100, 200, 300])
    >>> for images, labels in loader:
    ...     loss(model(images), labels).backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    ...     schedule.step()

    Train and eval mode and `requires_grad` stay as they are. With several processes, every one makes the same calls:
    the network is first made equal on all (as on rank 0), and the result is compared. A wrapper that refers to
    parameters (DistributedDataParallel) must be made anew after a step that pruned.

    Raises ValueError for a schedule that does not fit the pruner, a sharded network, or an average of another network.
    """

    def __init__(
        self,
        pruner: Any,
        optimizer: Any = None,
        *,
        at: Sequence[int],
        ema: nn.Module | None = None,
        keep: Iterable[nn.Parameter] = (),
        kinds: Mapping[str, str] | None = None,
    ) -> None:
        self.at = [int(step) for step in at]
        if not self.at or self.at[0] < 1 or any(a >= b for a, b in pairwise(self.at)):
            raise ValueError(f"at={list(at)}: give the steps to prune at, increasing, counted from 1")
        left = pruner.iterative_steps - pruner.current_step
        if len(self.at) > left:
            raise ValueError(
                f"at= has {len(self.at)} steps, but the pruner has {left} left: make it with "
                f"iterative_steps={len(self.at)}"
            )
        check_unsharded(pruner.model)
        self.pruner, self.optimizer, self.ema = pruner, optimizer, ema
        self.calls, self.done = 0, 0
        self._keep, self._kinds = list(keep), dict(kinds or {})
        self._added: list[str] = []
        self._carry_over()  # nothing to carry yet: an optimizer or average that does not fit is told now
        if ema is not None:
            check_twin(pruner, _inside(ema))
            part_alike_(_inside(ema), pruner.tracing.packed)  # one that was made before the pruner

    @property
    def report(self) -> Report:
        """What was done to every group so far."""
        return self.pruner.report

    @property
    def finished(self) -> bool:
        """True if every scheduled step was made."""
        return self.done == len(self.at)

    def step(self) -> bool:
        """Count one step; prune, fuse and carry over if it is a scheduled one. Returns True if it was.

        Raises FusionError or ValueError if that fails; network, average, optimizer and count are then as they were.
        """
        if self.finished or self.calls + 1 != self.at[self.done]:
            self.calls += 1
            return False
        self._prune()
        self.calls += 1
        self.done += 1
        left = sum(parameter.numel() for parameter in self.pruner.model.parameters())
        _LOG.info("pruned after step %d (%d of %d): %d parameters left", self.calls, self.done, len(self.at), left)
        return True

    def _prune(self) -> None:
        networks = self._networks()
        broadcast_(tensor for network in networks for tensor in _tensors(network))
        left_out, names = _left_out(self.ema, networks[0]), {name for name, _ in networks[0].named_parameters()}

        def prune() -> None:
            self.pruner.keep_inputs = len(networks) > 1
            try:
                self.pruner.step()
                for twin in networks[1:]:
                    prune_twin_(self.pruner, twin, left_out)
            finally:
                self.pruner.keep_inputs = False
                if self.pruner.last_step is not None:
                    self.pruner.last_step.inputs = self.pruner.last_step.openings = ()

        with self._all_or_nothing():
            together(prune, result=lambda: [(cut.root, cut.removed) for cut in self.pruner.last_step.cuts])
            self._carry_over()
        broadcast_(tensor for network in networks for tensor in _tensors(network))
        broadcast_(_state_tensors(self.optimizer))
        self._added += [name for name, _ in networks[0].named_parameters() if name not in names]

    def _networks(self) -> list[nn.Module]:
        return [self.pruner.model] if self.ema is None else [self.pruner.model, _inside(self.ema)]

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        modules = [module for network in self._networks() for module in network.modules()]
        snapshot, reported = Snapshot(self.pruner.DG, modules, self.pruner.state()), len(self.report.groups)
        try:
            yield
        except BaseException:
            snapshot.restore()
            del self.report.groups[reported:]
            raise

    def _carry_over(self) -> None:
        if self.optimizer is not None:
            transfer_optimizer_state(self.optimizer, self.pruner, keep=self._keep, kinds=self._kinds)

    def state_dict(self) -> dict[str, Any]:
        """What a later process needs to go on: the count, and the cuts so far. Plain numbers, strings and lists."""
        return {
            "format": _FORMAT,
            "at": list(self.at),
            "calls": self.calls,
            "done": self.done,
            "pruner_step": self.pruner.current_step,
            "history": [[name, bool(out), [int(i) for i in idxs]] for name, out, idxs in self.pruner.pruning_history()],
            "added": list(self._added),
            "initial_channels": dict(self.pruner.initial_channels),
            "num_heads": {self._name(module): heads for module, heads in self.pruner.num_heads.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Make network, pruner, optimizer, average and schedule as at the start of training, call this, which cuts the
        dense network (and optimizer and average) to the widths of then, and then load their own states: network,
        average, optimizer.

        Raises ValueError, and changes nothing, if the state is of another schedule or the network was pruned already.
        """
        if state.get("format") != _FORMAT:
            raise ValueError(f"this state of a FusionSchedule has format {state.get('format')!r}, not {_FORMAT}")
        if list(state["at"]) != self.at:
            raise ValueError(f"this state is of a schedule with at={list(state['at'])}, not {self.at}")
        if self.done or self.pruner.pruning_history():
            raise ValueError("load_state_dict needs the dense network: this one was pruned already")
        self._cut_again(state)
        self.calls, self.done, self._added = state["calls"], state["done"], list(state["added"])
        self.pruner.current_step = state["pruner_step"]
        self.pruner.initial_channels.update(state["initial_channels"])
        for module in self.pruner.num_heads:
            heads = state["num_heads"].get(self._name(module), self.pruner.num_heads[module])
            self.pruner.num_heads[module] = self.pruner.out_channel_groups[module] = heads

    def _name(self, module: nn.Module) -> str:
        return next(name for name, other in self.pruner.model.named_modules() if other is module)

    def _cut_again(self, state: Mapping[str, Any]) -> None:
        networks = self._networks()
        try:
            with self._all_or_nothing():
                self.pruner.cut_again(state["history"])
                for twin in networks[1:]:
                    prune_twin_(self.pruner, twin)
                with self.pruner.lineage.recording():
                    for name in state["added"]:
                        for network in networks:
                            _add_bias(network, name)
                self._carry_over()
        except Exception as error:
            raise ValueError(f"this state does not fit the network: {error}") from error


def _inside(ema: nn.Module) -> nn.Module:
    """The averaged network inside an AveragedModel or a timm ModelEma."""
    inside = getattr(ema, "module", None)
    return inside if isinstance(inside, nn.Module) else ema


def _left_out(ema: nn.Module | None, model: nn.Module) -> dict[str, Tensor]:
    """The network's buffers, if the average does not keep up with them: statistics of old would mislead the refit."""
    if ema is None or getattr(ema, "use_buffers", True):
        return {}
    return {name: buffer for name, buffer in model.named_buffers() if buffer is not None}


def _state_tensors(optimizer: Any) -> list[Tensor]:
    """What an optimizer keeps per entry of its parameters, in an order that all processes share."""
    if optimizer is None:
        return []
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = [value for parameter in held for value in optimizer.state.get(parameter, {}).values()]
    return [value for value in entries if isinstance(value, Tensor) and value.dim() > 0]


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


@torch.no_grad()
def _add_bias(network: nn.Module, name: str) -> None:
    path, _, last = name.rpartition(".")
    layer: Any = network.get_submodule(path)
    size = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    setattr(layer, last, nn.Parameter(layer.weight.new_zeros(size), requires_grad=layer.weight.requires_grad))
