"""The pruners a torch-pruning user imports: change the import, and channels are fused instead of discarded."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.dependency.group import Group

from intrafusion.correct.corrector import Corrector
from intrafusion.correct.sequential import Sequential
from intrafusion.correct.synthetic import synthetic_count, synthetic_inputs
from intrafusion.groups.batchnorm import folded
from intrafusion.groups.permutation_check import inconsistent_groups
from intrafusion.groups.snapshot import Snapshot, frozen_parameters
from intrafusion.groups.table import GroupTable, foldable_pairs, module_name, tabulate
from intrafusion.history.lineage import Lineage
from intrafusion.history.replay import GroupCut
from intrafusion.history.tracing import Tracing
from intrafusion.prune import checks
from intrafusion.prune.fuse_group import Outcome, fuse
from intrafusion.prune.fused_group import FusedGroup, FusionError
from intrafusion.prune.fusion import Fusion
from intrafusion.prune.report import GroupReport, Report
from intrafusion.running import run_model, to_device


class FusionMixin:
    """Turns a torch-pruning pruner into one that fuses. Mixed in before the pruner class.

    progress: set it to False for no progress bars; they are on a terminal only.
    """

    progress: bool = True

    # What the host class provides.
    DG: tp.DependencyGraph
    model: nn.Module
    importance: Callable
    ignored_layers: list
    root_module_types: list
    global_pruning: bool
    num_heads: dict
    in_channel_groups: dict
    out_channel_groups: dict
    current_step: int
    _scope_initial_channels: dict

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        host = inspect.signature(cls.__mro__[2])
        keyword = inspect.Parameter.KEYWORD_ONLY
        ours = [
            inspect.Parameter("fusion", keyword, default="data-free", annotation="str | Fusion"),
            inspect.Parameter("calibration", keyword, default=None, annotation="Iterable | None"),
        ]
        cls.__signature__ = host.replace(parameters=[*host.parameters.values(), *ours])

    def __init__(
        self, *args: Any, fusion: str | Fusion = "data-free", calibration: Iterable | None = None, **kwargs: Any
    ) -> None:
        self.fusion = Fusion.of(fusion)
        self._calibration = checks.calibration_batches(calibration, self.fusion.correct)
        self._corrector: Corrector | None = None
        bound = inspect.signature(super().__init__).bind(*args, **kwargs)
        checks.check_arguments(bound.arguments)
        checks.complete(bound.arguments)
        self._run = partial(run_model, forward_fn=bound.arguments.get("forward_fn"))
        self._example = bound.arguments["example_inputs"]
        modes = [(module, module.training) for module in bound.arguments["model"].modules()]
        try:
            super().__init__(*bound.args, **bound.kwargs)
        finally:  # tracing switches the network to eval mode
            for module, training in modes:
                module.training = training
        self.report = Report()
        self._scores: dict[tuple[Any, Callable], Tensor] = {}
        self._quiet = False
        self._inconsistent: set[str] = set()
        self._lineage = Lineage(self.DG)
        self._cuts: tuple[GroupCut, ...] = ()
        self._tracing = Tracing.of(self.DG, bound.arguments)
        checks.warn_if_nothing_prunable(self)

    def step(self, interactive: bool = False) -> Iterator[Group] | None:
        """One pruning step, as in torch-pruning; if a group fails, every group of the step is put back first.

        Raises FusionError naming the group.
        """
        if interactive:
            return super().step(interactive=True)  # type: ignore[misc]
        snapshot, reported = Snapshot(self.DG, self.model.modules(), self._state()), len(self.report.groups)
        try:
            super().step(interactive=False)  # type: ignore[misc]
        except BaseException:
            snapshot.restore()
            del self.report.groups[reported:]
            raise
        return None

    def estimate_importance(self, group: Group) -> Tensor | None:
        """The metric's score of every channel of a full group: [n], or None if the metric has nothing to score.

        With `score_on="folded"` the metric sees the batch-norm-folded network, unless it has nothing to say there
        (batch-norm scale) or has an attribute `sees_activations`, which folding does not change. Raises FusionError for
        scores that are not finite or of the wrong shape.
        """
        score = None
        if self.fusion.score_on == "folded" and not getattr(self.importance, "sees_activations", False):
            with folded(foldable_pairs(self.DG, group)):
                score = self.importance(group)
        if score is None:
            score = self.importance(group)
        root = group[0].dep
        name = module_name(self.DG, root.target.module)
        if score is None:
            self._note(name, len(group[0].idxs), reason="the metric has nothing to score here")
            return None
        problem = checks.importance_problem(score, len(group[0].idxs))
        if problem:
            raise FusionError(f"while scoring group {name!r} ({len(group[0].idxs)} channels): {problem}")
        self._scores[root.target.module, root.handler] = score.detach()
        return score

    def manual_prune_width(
        self, layer: nn.Module, pruning_fn: Callable, pruning_ratios_or_idxs: float | list[int]
    ) -> None:
        """Fuse and cut one layer's group to a given width.

        pruning_ratios_or_idxs: the channels to remove, or a float. Torch-Pruning reads the float as the fraction that
        stays (it removes n·(1 - ratio) channels), and so do we, with a warning.
        """
        removed: Any = pruning_ratios_or_idxs
        if isinstance(removed, float):
            n = checks.width(self.DG, layer, pruning_fn)
            warnings.warn(
                f"manual_prune_width reads {removed} as the fraction of channels that stays, as torch-pruning does",
                stacklevel=2,
            )
            full = self.DG.get_pruning_group(layer, pruning_fn, list(range(n)))
            score = self.estimate_importance(full)
            if score is None:
                raise FusionError(f"group {module_name(self.DG, layer)!r}: the metric has nothing to score here")
            removed = torch.argsort(score)[: int(n * (1 - removed))].tolist()
        group = self.DG.get_pruning_group(layer, pruning_fn, [int(i) for i in removed])
        FusedGroup.wrap(group, self).prune()

    def _prune(self) -> Iterator[Group]:
        checks.check_finite(self.model)
        self._corrector = None  # the one of the step before compares with a network that is gone
        self._cuts = ()
        self._scores.clear()
        self._inconsistent = self._find_inconsistent()
        seen, first = set(), len(self.report.groups)
        self._quiet = True
        try:
            groups = super()._prune()  # type: ignore[misc]
            for group in groups if self.fusion.correct == "none" else self._in_forward_order(list(groups)):
                root = group[0].dep
                seen.add((root.target.module, root.handler))
                yield FusedGroup.wrap(self._rescored(group), self)
            self._finish()
        finally:
            self._quiet = False
        for root, handler in self._scores:
            if (root, handler) not in seen:
                name, n = module_name(self.DG, root), checks.width(self.DG, root, handler)
                self._note(name, n, reason="torch-pruning removes none of its channels, or could not leave one")
        self._warn([group for group in self.report.groups[first:] if group.merged == "selection" and group.reason])

    def _in_forward_order(self, groups: list[Group]) -> Iterator[Group]:
        """The groups in the order of the forward pass, each as it is by then; prepares the correction of the layers."""
        if not groups:
            return
        self._corrector = corrector = self._new_corrector()
        turn = {id(group): corrector.position(self._table(group)) for group in groups}
        for group in sorted(groups, key=lambda group: turn[id(group)]):
            root = group[0].dep
            whole = all(hasattr(item, "dep") for item in group)
            idxs = [int(i) for i in group[0].idxs]
            yield self.DG.get_pruning_group(root.target.module, root.handler, idxs) if whole else group

    def _new_corrector(self) -> Corrector:
        """What corrects the layers of one step; the benchmarks' rivals bring their own."""
        batches = self._calibration
        few = synthetic_count(self.model, self._example, batches)
        options: dict[str, Any] = {"count": few, "seed": self.fusion.seed, "progress": self.progress}
        try:
            drawn = synthetic_inputs(self.model, self._example, self._run, **options) if few else []
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            if not batches:
                raise FusionError(
                    f"the network does not run on batches of synthetic inputs shaped like its example ({error}): give "
                    "fusion='calibrated' with calibration=<batches of your own>, or fusion='paper', which needs none"
                ) from error
            drawn = []
        batches = [*batches, *drawn]
        device = next(self.model.parameters()).device
        batches = [to_device(batch, device) for batch in batches]
        return Sequential(self.DG, self._run, batches, self.progress)

    @torch.no_grad()
    def _finish(self) -> None:
        """Correct the layers behind the last group."""
        if self._corrector is None:
            return
        snapshot = Snapshot(self.DG, self.model.modules())
        try:
            with self._lineage.recording():
                self._corrector.finish()
        except Exception as error:
            snapshot.restore()
            raise FusionError(f"while refitting the layers after the cut: {error}") from error

    def _table(self, group: Group) -> GroupTable:
        root = group[0].dep
        return tabulate(self.DG, root.target.module, root.handler, self._get_channel_groups(group))  # type: ignore[attr-defined]

    def _rescored(self, group: Group) -> Group:
        """The same group with as many channels to remove, chosen by their score on the network as it is now.

        Global rankings, heads and chunked channels keep torch-pruning's choice.
        """
        heads = self._is_atten_group(group)[0]  # type: ignore[attr-defined]
        chunks = self._get_channel_groups(group)  # type: ignore[attr-defined]
        if not self.fusion.rescore or self.global_pruning or heads or chunks > 1:
            return group
        root = group[0].dep
        n = checks.width(self.DG, root.target.module, root.handler)
        score = self.estimate_importance(self.DG.get_pruning_group(root.target.module, root.handler, list(range(n))))
        if score is None:
            return group
        count = len(set(group[0].idxs))
        removed = torch.topk(score.cpu(), k=count, largest=False).indices
        chosen = self.DG.get_pruning_group(root.target.module, root.handler, sorted(removed.tolist()))
        return chosen if len(set(chosen[0].idxs)) == count else group  # tied channels bring others along

    def _find_inconsistent(self) -> set[str]:
        """Groups that torch-pruning describes wrongly; asked at every step, since its offsets also go stale."""
        if self.fusion.merge == "selection":
            return set()
        tables = []
        for group in self.DG.get_all_groups(self.ignored_layers, self.root_module_types):
            if not self._is_atten_group(group)[0]:  # type: ignore[attr-defined]
                tables.append(self._table(group))
        return inconsistent_groups(self.DG, tables, lambda model: self._run(model, self._example))

    @torch.no_grad()
    def _prune_group(self, group: FusedGroup, record_history: bool) -> None:
        table = self._table(group)
        removed = sorted({int(i) for i in group[0].idxs})
        kept = torch.tensor([i for i in range(table.n) if i not in set(removed)], dtype=torch.long)
        snapshot = Snapshot(self.DG, table.modules() if self._corrector is None else self.model.modules())
        frozen = frozen_parameters(table.modules())
        try:
            if not 0 <= removed[0] <= removed[-1] < table.n:
                raise ValueError(f"channels {removed[0]}..{removed[-1]} are to be removed of {table.n}")
            with self._lineage.recording() as change:
                outcome = self._fuse(group, table, kept)
                change.mixed(table, outcome.pair)
                with change.cutting(group):
                    Group.prune(group, record_history=record_history)
                for module, name in frozen:  # torch-pruning makes a cut parameter trainable
                    module.get_parameter(name).requires_grad_(False)
                if self._corrector is not None and not self._quiet:
                    self._corrector.finish()
        except Exception as error:
            snapshot.restore()
            where = f"while fusing group {table.name!r} ({table.n} -> {len(kept)} channels)"
            raise FusionError(f"{where}: {error}") from error
        cost, plan = (outcome.plan.cost, outcome.plan.main_targets) if outcome.plan else (None, ())
        width = (table.n, len(kept))
        self._cuts = (*self._cuts, GroupCut.of(self.DG, group, self._get_channel_groups(group), outcome.pair))  # type: ignore[attr-defined]
        entry = GroupReport(table.name, self.current_step, *width, outcome.merged, cost, outcome.reason, plan)
        self.report.groups.append(entry)
        if not self._quiet and outcome.merged == "selection" and outcome.reason:
            self._warn([entry])

    def _fuse(self, group: FusedGroup, table: GroupTable, kept: Tensor) -> Outcome:
        if self.fusion.merge == "selection":
            return Outcome("selection")
        reason = checks.mismatch(group, table, kept)
        root = group[0].dep
        importance = self._scores.get((root.target.module, root.handler))
        if table.name in self._inconsistent:
            reason = "torch-pruning's index map does not describe the network here, and its cut may be wrong as well"
        if not reason and self._is_atten_group(group)[0]:  # type: ignore[attr-defined]
            reason = "queries and keys meet in a product, which a linear merge cannot keep"
        return fuse(self.DG, table, kept, importance, self.fusion, self._corrector, veto=reason)

    def _note(self, name: str, n: int, reason: str) -> None:
        self.report.groups.append(GroupReport(name, self.current_step, n, n, "untouched", None, reason))

    def _warn(self, groups: list[GroupReport]) -> None:
        if groups:
            listed = "; ".join(f"{group.name}: {group.reason}" for group in groups)
            warnings.warn(f"{len(groups)} of the groups could only be cut, not fused: {listed}", stacklevel=3)

    def _cut_again(self, history: Iterable[tuple[str, bool, Iterable[int]]]) -> None:
        """Cut the channels of a torch-pruning history again, fusing nothing and reporting nothing: structure only."""
        settings, corrector, reported = self.fusion, self._corrector, len(self.report.groups)
        self.fusion, self._corrector = settings.discarded(), None
        try:
            for name, outputs, removed in history:
                root = self.model.get_submodule(name)
                pruner: Any = self.DG.get_pruner_of_module(root)
                handler = pruner.prune_out_channels if outputs else pruner.prune_in_channels
                group = self.DG.get_pruning_group(root, handler, [int(i) for i in removed])
                FusedGroup.wrap(group, self).prune()
        finally:
            self.fusion, self._corrector = settings, corrector
            del self.report.groups[reported:]

    def _state(self) -> list[dict]:
        own = (self.num_heads, self.in_channel_groups, self.out_channel_groups, self._scope_initial_channels)
        return [self.__dict__, *own]


class IntraFusionPruner(FusionMixin, tp.pruner.BasePruner):
    """Drop-in for `torch_pruning`'s `BasePruner` (= `MetaPruner` = `MagnitudePruner`): same arguments, same order.

    fusion: (keyword-only) a preset name of `intrafusion.PRESETS`, or a `Fusion`. calibration: (keyword-only) batches of
    inputs without labels, for `fusion="calibrated"`: tensors, tuples or dictionaries of them.

    >>> pruner = IntraFusionPruner(model, example_inputs, importance, pruning_ratio=0.5, ignored_layers=[model.fc])
    >>> pruner.step()                      # or: for group in pruner.step(interactive=True): group.prune()
    >>> print(pruner.report)               # per group: width, plan cost, merge rule, what was only cut and why
    """


class IntraFusionBNScalePruner(FusionMixin, tp.pruner.BNScalePruner):
    """Drop-in for `torch_pruning.pruner.BNScalePruner` (network slimming): same arguments, plus `fusion`."""


class IntraFusionGroupNormPruner(FusionMixin, tp.pruner.GroupNormPruner):
    """Drop-in for `torch_pruning.pruner.GroupNormPruner` (DepGraph sparse training): same arguments, plus `fusion`."""


class IntraFusionGrowingRegPruner(FusionMixin, tp.pruner.GrowingRegPruner):
    """Drop-in for `torch_pruning.pruner.GrowingRegPruner` (growing regularisation): same arguments, plus `fusion`."""
