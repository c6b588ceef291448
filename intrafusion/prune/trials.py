"""What cutting some groups to some ratios does: tried on the pruner's own network, which is put back."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.correct.sequences import scores_of
from intrafusion.groups.snapshot import Snapshot
from intrafusion.history.lineage import Lineage
from intrafusion.methods.read_back import ReadBack
from intrafusion.prune.fused_group import FusedGroup, FusionError
from intrafusion.prune.inputs import Inputs, inputs_for
from intrafusion.prune.step import Begun, Step
from intrafusion.prune.twin import Judges, count_of, distance, held_out, outputs_on
from intrafusion.prune.widths import set_ratio_
from intrafusion.running import evaluating

_SHARE = 4
"""One input of so many judges."""
_NUMBERS = 2**26
"""So many scores of tokens are compared."""


@dataclass(frozen=True)
class Tried:
    """What a try does to the output, in units that add up, and what the network costs then."""

    damage: float
    cost: float


class Bench:
    """pruner: whose network is tried on. step: one step of it. count: what a pruner's network costs.

    inputs: that a method sees, and those that judge. told: what is judged on, in words. measure, shown: what is
    measured there, in words, and a damage in its units.
    """

    def __init__(self, pruner: Any, step: Callable[[], Any], count: Callable[[Any], float]) -> None:
        self._pruner, self._step, self._count = pruner, step, count
        self._method = pruner.fusion.method()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inputs = inputs_for(pruner, self._method)
        example = inputs.judges[0].batches[0]
        scores = scores_of(pruner.model, example, pruner.run)
        self.inputs = _parted(inputs, None if scores is None else _most(pruner, scores, example))
        judges = self.inputs.judges[0]
        self.told = judges.told
        self._judged = _Judged(pruner.model, judges.batches, pruner.run, scores)
        self.measure, self.shown = self._judged.measure, self._judged.shown
        self._view: Begun | None = None
        self._importance = _Remembered(pruner.importance)

    def tried(self, ratios: Mapping[tuple[nn.Module, ...], float]) -> Tried:
        """Prune the groups of these layers to these ratios, and no others.

        Under a method that looks at inputs nothing but their readers is put right: all groups were looked at in one
        pass, which the first try makes.
        """
        pruner, looks = self._pruner, self._method.inputs
        if looks != "none" and self._view is None:
            with self._trying({}):
                self._view = Step(pruner, ReadBack(looks)).begin(list(pruner.all_groups()))
        view = self._view
        with self._trying(ratios):
            if view is None:
                self._take_step_()
            else:
                pruner.current_step = 1
                step = Step(pruner, ReadBack(looks)).going_on_with(view)
                for group in pruner.chosen():
                    FusedGroup.wrap(pruner.as_it_is(group), step, view).prune()
            return Tried(self._damage(ratios), self._count(pruner))

    def stepped(self, ratios: Mapping[tuple[nn.Module, ...], float]) -> float:
        """The damage that a whole step does. What the tries have looked at is free then."""
        self._view = None
        with self._trying(ratios):
            self._take_step_()
            return self._damage(ratios)

    def _take_step_(self) -> None:
        """Without the descent behind it."""
        self._pruner.fusion = replace(self._pruner.fusion, descent=0)
        self._step()

    def _damage(self, ratios: Mapping[tuple[nn.Module, ...], float]) -> float:
        try:
            return self._judged.damage(self._pruner.model)
        except FusionError:
            raise
        except RuntimeError as error:
            model = self._pruner.model
            names = [name for name, module in model.named_modules() if any(module in one for one in ratios)]
            where = f"while trying ratios of {', '.join(names[:3])}"
            raise FusionError(f"{where}: the network does not run with its new widths: {error}") from error

    def cost(self, ratios: Mapping[tuple[nn.Module, ...], float]) -> float:
        """What the network costs when it is plainly cut so."""
        with self._trying(ratios):
            self._pruner.fusion = self._pruner.fusion.discarded()
            self._step()
            return self._count(self._pruner)

    @contextmanager
    def _trying(self, ratios: Mapping[tuple[nn.Module, ...], float]) -> Iterator[None]:
        pruner = self._pruner
        snapshot = Snapshot(pruner.DG, pruner.model.modules(), pruner.state())
        mark = pruner.report.mark()
        try:
            pruner.is_trying, pruner.lineage, pruner.inputs = True, Lineage(pruner.DG), self.inputs
            pruner.prune_num_heads = pruner.prune_head_dims = pruner.progress = False
            pruner.iterative_steps, pruner.current_step, pruner.per_step_pruning_ratio = 1, 0, [0.0, 0.0]
            pruner.pruning_ratio_dict, pruner._layer_to_scope = {}, dict(pruner._layer_to_scope)
            if not pruner.fusion.rescore:  # otherwise a group is scored again when others have been cut
                pruner.importance = self._importance
            for layers, ratio in ratios.items():
                for layer in layers:
                    set_ratio_(pruner, layer, ratio)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            snapshot.restore()
            pruner.report.back_to(mark)


class _Remembered:
    """An importance that is asked once for the scores of every group: the network is the same in every try."""

    def __init__(self, importance: Any) -> None:
        self._importance = importance
        self._known: dict[tuple, Any] = {}

    def __call__(self, group: Any, **options: Any) -> Any:
        root = group[0].dep
        key = (root.target.module, root.handler, *(len(item.idxs) for item in group))
        if key not in self._known:
            self._known[key] = self._importance(group, **options)
        return self._known[key]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._importance, name)


class _Judged:
    """How far a network's outputs are from what it gave before, on some batches.

    Of a language model that is the divergence of what it expects to come next, KL(before | now) in nats a token; of
    any other network the square of its outputs' relative error.
    """

    def __init__(
        self, network: nn.Module, batches: Sequence[Any], run: Callable, scores: Callable[[Any], Tensor] | None
    ) -> None:
        """scores: finds what a language model says among its outputs."""
        self._batches, self._run, self._scores = batches, run, scores
        self.measure = "relative error of the output" if self._scores is None else "divergence of the next token"
        self._wanted: Any = outputs_on(network, batches, run) if self._scores is None else list(self._said(network))

    def damage(self, network: nn.Module) -> float:
        """Raises FusionError where the outputs say nothing."""
        if self._scores is None:
            error = distance(outputs_on(network, self._batches, self._run), self._wanted)
            if error is None:
                raise FusionError("what a group's ratio costs could not be measured: the network's outputs say nothing")
            return error**2
        found = [
            torch.where(before.isfinite(), before.exp() * (before - now), 0.0).sum(dim=1)
            for before, now in zip(self._wanted, self._said(network), strict=True)
        ]
        return float(torch.cat(found).mean())

    def shown(self, damage: float) -> float:
        """In the units of `measure`."""
        return math.sqrt(damage) if self._scores is None else damage

    def _said(self, network: nn.Module) -> Iterator[Tensor]:
        """[P, V] the logarithms of what a language model expects, at places spread over every batch."""
        assert self._scores is not None
        with torch.no_grad(), evaluating(network):
            for batch in self._batches:
                scores = self._scores(self._run(network, batch)).flatten(0, 1)
                step = scores.numel() * len(self._batches) // _NUMBERS + 1
                yield scores[step - 1 :: step].float().log_softmax(dim=1)


@torch.no_grad()
def _most(pruner: Any, scores: Callable[[Any], Tensor], batch: Any) -> int:
    """How many inputs give as many scores of tokens as are compared."""
    with evaluating(pruner.model):
        numbers = scores(pruner.run(pruner.model, batch)).numel()
    return max(1, _NUMBERS * count_of([batch]) // numbers)


def _parted(inputs: Inputs, most: int | None) -> Inputs:
    """The same, with a quarter of the inputs to judge on where there are some, at most so many."""
    batches, judges = inputs.own or inputs.drawn, inputs.judges[0].batches
    every = list(batches) if judges is batches else [*batches, *judges]  # few inputs judge what was fitted to them
    wanted = min(count_of(every) // _SHARE, most or count_of(every))
    if not batches or not wanted:
        return inputs
    kept, held = held_out(every, wanted)
    told = f"{count_of(held)} {'calibration' if inputs.own else 'synthetic'} inputs that were held out"
    judged = [Judges(held, told)]
    return Inputs(kept, inputs.drawn, judged) if inputs.own else Inputs([], kept, judged)
