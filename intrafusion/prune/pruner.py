"""The pruners a torch-pruning user imports: change the import, and channels are fused instead of discarded.

The pruner is the adapter to torch-pruning: constructor, scores, widths. What happens to a group is in `step.py`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.dependency.group import Group

from intrafusion.groups.heads import heads_by_layer, opaque
from intrafusion.groups.packed import known_heads
from intrafusion.groups.permutation_check import inconsistent_groups
from intrafusion.groups.snapshot import Snapshot
from intrafusion.groups.table import GroupTable, module_name, tabulate
from intrafusion.history.lineage import Lineage
from intrafusion.history.tracing import Tracing
from intrafusion.prune import attention, checks, feeding, preparation, refusals, scoring
from intrafusion.prune.allocation import allocate_
from intrafusion.prune.configs import without_bias
from intrafusion.prune.fused_group import FusedGroup, FusionError
from intrafusion.prune.fusion import Fusion
from intrafusion.prune.inputs import Inputs
from intrafusion.prune.report import GroupReport, Report
from intrafusion.prune.step import Step
from intrafusion.prune.twin import Comparison
from intrafusion.prune.widths import Asked, asks_for_heads, checked
from intrafusion.running import run_model


class FusionMixin:
    """Turns a torch-pruning pruner into one that fuses. Mixed in before the pruner class.

    Attributes:
        report: what was done to every group so far.
        last_step: the last `Step`, or None.
        lineage: what became of every parameter.
        progress: set it to False for no progress bars; they are on a terminal only.
        heads: the attention blocks that were found, see `groups.heads.Heads`; their numbers of heads are in
            torch-pruning's `num_heads`, where the user gave none.
        keep_inputs: set it to True and `last_step.inputs` holds what the step ran on.
        inputs: what the next step is going to run on, in the place of inputs of its own; None otherwise.
        is_trying: the next step is taken back afterwards, so that the config of the network does not follow it.
    """

    progress: bool = True
    keep_inputs: bool = False
    inputs: Inputs | None = None
    is_trying: bool = False

    # What the host class provides.
    model: nn.Module
    importance: Callable
    ignored_layers: list
    root_module_types: list
    global_pruning: bool
    num_heads: dict
    prune_head_dims: bool
    prune_num_heads: bool
    head_pruning_ratio_dict: dict
    iterative_steps: int
    in_channel_groups: dict
    out_channel_groups: dict
    current_step: int
    _scope_initial_channels: dict

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__init__ is not FusionMixin.__init__:  # a constructor of one's own, here or in a parent: its signature
            cls.__signature__ = None
            return
        after = cls.__mro__[cls.__mro__.index(FusionMixin) + 1]
        host = inspect.signature(after)
        own = inspect.signature(FusionMixin.__init__).parameters.values()
        ours = [parameter for parameter in own if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
        cls.__signature__ = host.replace(parameters=[*host.parameters.values(), *ours])

    def __init__(
        self,
        *args: Any,
        fusion: str | Fusion = "data-free",
        calibration: Iterable | None = None,
        memory_limit: float | None = None,
        after_cut: Callable[[nn.Module, Group], Any] | None = None,
        widths: Mapping[str, float] | None = None,
        allocation: str = "equal",
        **kwargs: Any,
    ) -> None:
        self.fusion = Fusion.of(fusion)
        self.memory_limit = checks.memory_limit(memory_limit)
        self.after_cut = checks.after_cut(after_cut)
        self.widths = checked(widths)
        self.calibration = checks.calibration_batches(calibration, self.fusion.method(), f"fusion={self.fusion.name!r}")
        bound = inspect.signature(super().__init__).bind(*args, **kwargs)
        checks.check_arguments(bound.arguments)
        self.allocation = checks.allocation(allocation, self.fusion, bound.arguments)
        preparation.prepare_(bound.arguments)
        self._feed(bound.arguments)
        given, model = bound.arguments, bound.arguments["model"]
        run, modes = partial(self.run, inputs=self.example_inputs), [(m, m.training) for m in model.modules()]
        try:
            with known_heads(model, run, given["ignored_layers"], asks_for_heads(self.widths, given)) as self.heads:
                with opaque(self.heads):
                    given["num_heads"].update(heads_by_layer(self.heads, given["num_heads"]))
                    super().__init__(*bound.args, **bound.kwargs)
                attention.tell_(self)
                self.unbiased = without_bias(self.model)
                self.report = Report()
                self.last_step: Step | None = None
                self.lineage, self.tracing = Lineage(self.DG), Tracing.of(self.DG, given)
                self._scores: dict[tuple[Any, Callable], Tensor] = {}
                self._listed: list[Group] = []
                self._quiet = False
                attention.leave_(self)
                self.asked = Asked(self, self.widths)
                checks.warn_if_nothing_prunable(self)
        except (ArithmeticError, LookupError, AttributeError, TypeError) as error:
            if reason := refusals.explained(error, model):
                raise ValueError(reason) from error
            raise
        finally:  # tracing switches the network to eval mode
            for module, training in modes:
                module.training = training

    @property
    def DG(self) -> tp.DependencyGraph:
        """Torch-Pruning's graph of the network."""
        return self.__dict__["DG"]

    @DG.setter
    def DG(self, graph: tp.DependencyGraph) -> None:
        """Torch-Pruning has traced the network, and is going to ask its graph for all groups, however long it takes."""
        self.__dict__["DG"] = graph
        if reason := refusals.endless(graph, self.ignored_layers, self.root_module_types):
            raise ValueError(reason)

    def _feed(self, arguments: dict[str, Any]) -> None:
        """Run the network on its example, and on a calibration batch if there is one; note how it is called."""
        model, forward_fn = arguments["model"], arguments.get("forward_fn")
        self.run = partial(run_model, forward_fn=forward_fn, output_transform=arguments.get("output_transform"))
        self.example_inputs = arguments["example_inputs"] = feeding.fed(model, arguments["example_inputs"], self.run)
        arguments["output_transform"] = feeding.outputs_of(arguments.get("output_transform"))
        if self.calibration:
            plain = forward_fn is None
            self.calibration = feeding.tried(self.calibration, model, self.example_inputs, self.run, plain=plain)

    def step(self, interactive: bool = False) -> Iterator[Group] | None:
        """One pruning step, as in torch-pruning; if a group fails, every group of the step is put back first.

        Raises FusionError naming the group.
        """
        if self.allocation != "equal" and self.report.allocation is None and not self.report.groups:
            one = partial(super().step, interactive=False)  # type: ignore[misc]
            self.report.allocation = allocate_(self, one, self.allocation)
        if interactive:
            return super().step(interactive=True)  # type: ignore[misc]
        snapshot, mark = Snapshot(self.DG, self.model.modules(), self.state()), self.report.mark()
        try:
            super().step(interactive=False)  # type: ignore[misc]
        except BaseException:
            snapshot.restore()
            self.report.back_to(mark)
            raise
        return None

    def estimate_importance(self, group: Group) -> Tensor | None:
        """The metric's score of every channel of a full group: [n], or None if the metric has nothing to score.

        With `score_on="folded"` the metric sees the batch-norm-folded network, unless it has nothing to say there
        (batch-norm scale) or has an attribute `sees_activations`, which folding does not change. Raises FusionError for
        scores that are not finite or of the wrong shape, or where a metric of torch-pruning's fails.
        """
        score = scoring.score_of(self, group)
        if isinstance(score, str):
            self._note(module_name(self.DG, group[0].dep.target.module), len(group[0].idxs), reason=score)
            return None
        self._scores[group[0].dep.target.module, group[0].dep.handler] = score
        return score

    def manual_prune_width(
        self, layer: nn.Module, pruning_fn: Callable, pruning_ratios_or_idxs: float | list[int]
    ) -> None:
        """Fuse and cut one layer's group to a given width, as a step of its own.

        pruning_ratios_or_idxs: the channels to remove, or a float. Torch-Pruning reads the float as the fraction that
        stays (it removes n·(1 - ratio) channels), and so do we, with a warning.
        """
        removed: Any = pruning_ratios_or_idxs
        if isinstance(removed, float):
            warnings.warn(
                f"manual_prune_width reads {removed} as the fraction of channels that stays, as torch-pruning does",
                stacklevel=2,
            )
            removed = scoring.least(self, layer, pruning_fn, removed)
        group = self.DG.get_pruning_group(layer, pruning_fn, [int(i) for i in removed])
        self.last_step = step = Step(self)
        for one in step.groups([group]):
            one.prune()

    def _prune(self) -> Iterator[Group]:
        attention.tell_(self)
        self.asked.begin_(self)
        self._scores.clear()
        self._listed = list(self.all_groups())
        if reason := checks.refusal(self, self._listed):
            raise FusionError(reason)
        self.last_step = step = Step(self)
        seen, first = set(), len(self.report.groups)
        self._quiet = True
        try:
            for group in step.groups(self.chosen()):
                root = group[0].dep
                seen.add((root.target.module, root.handler))
                yield group
        finally:
            self._quiet = False
        for root, handler in self._scores:
            if (root, handler) not in seen:
                name, n = module_name(self.DG, root), checks.width(self.DG, root, handler)
                self._note(name, n, reason="torch-pruning removes none of its channels, or could not leave one")
        self._warn([group for group in self.report.groups[first:] if group.merged == "selection" and group.reason])
        self.asked.warn(self)

    def chosen(self) -> Iterator[Group]:
        """What torch-pruning chooses to cut."""
        before, cut = dict(self.num_heads), set()
        for group in super()._prune():  # type: ignore[misc]
            cut.update(item[0].target.module for item in group if self.DG.is_in_channel_pruning_fn(item[0].handler))
            self.asked.see(self, group)
            yield group
        attention.count_again_(self, before, cut)

    # What a step asks of the pruner.

    def all_groups(self) -> Iterator[Group]:
        """Every group that torch-pruning may cut, in full."""
        return iter(self.DG.get_all_groups(self.ignored_layers, self.root_module_types))

    def table(self, group: Group) -> GroupTable:
        """The group's table, at its present width."""
        root = group[0].dep
        return tabulate(self.DG, root.target.module, root.handler, self.channel_groups_of(group))

    def channel_groups_of(self, group: Group) -> int:
        """Torch-Pruning's number of chunks of a group: heads, grouped convolutions."""
        return self._get_channel_groups(group)  # type: ignore[attr-defined]

    def is_attention(self, group: Group) -> bool:
        """Does torch-pruning cut heads here?"""
        return self._is_atten_group(group)[0]  # type: ignore[attr-defined]

    def score_of(self, table: GroupTable) -> Tensor | None:
        """[n] what the metric said of a group's channels, if it was asked."""
        return next(
            (score for (root, _), score in self._scores.items() if module_name(self.DG, root) == table.name), None
        )

    def as_it_is(self, group: Group) -> Group:
        """The same group at the widths of now, its channels chosen anew if each group is scored when its turn comes.

        Global rankings, heads and chunked channels keep torch-pruning's choice.
        """
        return scoring.chosen_now(self, group)

    def inconsistent_groups(self) -> frozenset[str]:
        """Groups that torch-pruning describes wrongly; asked at every step, since its offsets also go stale.

        Raises FusionError where it is known that they must not be cut.
        """
        groups, self._listed = self._listed or self.all_groups(), []
        tables = [self.table(group) for group in groups if not self.is_attention(group)]
        forward = partial(self.run, inputs=self.example_inputs)
        broken = frozenset(inconsistent_groups(self.DG, tables, forward))
        reason = refusals.disordered(self.DG, tables, broken) if broken else ""
        if reason:
            raise FusionError(reason)
        return broken

    def compared(self, comparison: Comparison) -> None:
        """A step is over; a warning if its result is farther from the dense network than plain cutting's."""
        self.report.comparisons.append(comparison)
        if comparison.is_worse:
            warnings.warn(comparison.warning(self.fusion.name), stacklevel=5)

    def reported(self, entry: GroupReport) -> None:
        """A group was pruned."""
        self.report.groups.append(entry)
        if not self._quiet and entry.merged == "selection" and entry.reason:
            self._warn([entry])

    def cut_again(self, history: Iterable[tuple[str, bool, Iterable[int]]]) -> None:
        """Cut the channels of a torch-pruning history again, fusing nothing and reporting nothing: structure only."""
        settings, mark = self.fusion, self.report.mark()
        self.fusion = settings.discarded()
        try:
            self.last_step = step = Step(self)
            for name, outputs, removed in history:
                root = self.model.get_submodule(name)
                pruner: Any = self.DG.get_pruner_of_module(root)
                handler = pruner.prune_out_channels if outputs else pruner.prune_in_channels
                group = self.DG.get_pruning_group(root, handler, [int(i) for i in removed])
                attention.count_(self, group)
                FusedGroup.wrap(group, step, None).prune()
            step.finish()
        finally:
            self.fusion = settings
            self.report.back_to(mark)

    def state(self) -> list[dict]:
        """The dictionaries that hold what a step changes of the pruner."""
        own = (self.num_heads, self.in_channel_groups, self.out_channel_groups, self.initial_channels)
        return [self.__dict__, vars(self.asked), *own]

    @property
    def initial_channels(self) -> dict:
        """What torch-pruning remembers of the widths before the first of several steps; it may be changed."""
        return self._scope_initial_channels

    def _note(self, name: str, n: int, reason: str) -> None:
        self.report.groups.append(GroupReport(name, self.current_step, n, n, "untouched", None, reason))

    def _warn(self, groups: list[GroupReport]) -> None:
        if groups:
            listed = "; ".join(f"{group.name}: {group.reason}" for group in groups)
            warnings.warn(f"{len(groups)} of the groups could only be cut, not fused: {listed}", stacklevel=3)


class IntraFusionPruner(FusionMixin, tp.pruner.BasePruner):
    """Drop-in for `torch_pruning`'s `BasePruner` (= `MetaPruner` = `MagnitudePruner`): same arguments, same order.

    fusion: (keyword-only) a preset name of `intrafusion.PRESETS`, or a `Fusion`. calibration: (keyword-only) batches of
    inputs without labels, for `fusion="calibrated"`: tensors, tuples or dictionaries of them. memory_limit:
    (keyword-only) GiB of activations that are held at a time, None for as much as it takes; what is beyond lies in
    temporary files. after_cut: (keyword-only) after_cut(model, group) is called when a group has been cut, to set
    attributes of the network that hold widths; those that leave no choice are set without it. widths: (keyword-only) a
    ratio for each kind of width that shall be cut, see `prune.widths`; all others are left alone. allocation:
    (keyword-only) "measured" moves channels between groups before the first step, at an equal total of MACs
    ("measured-parameters": of parameters), to where their loss costs least, see `prune.allocation`.

    >>> pruner = IntraFusionPruner(model, example_inputs, importance, pruning_ratio=0.5, ignored_layers=[model.fc])
    >>> pruner.step()                      # or: for group in pruner.step(interactive=True): group.prune()
    >>> print(pruner.report)               # per group: width, plan cost, merge rule, what was only cut and why
    """
