"""One pruning step: what happens to a group, top to bottom.

    1. score      the metric ranks the channels (`FusionMixin.estimate_importance`)
    2. features   one row per channel: its weights in every layer of the group
    3. plan       optimal transport from all channels to the kept ones
    4. merge      a method turns the plan into a pair (R, S)
    5. apply      the pair is written into the kept places, and torch-pruning cuts

A method that looks at inputs walks the network forward on the way, and every layer behind the first cut is put right.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch_pruning.dependency.group import Group

from intrafusion.correct.circuits import HeadMoments, Reduction
from intrafusion.correct.correction import Correction, LayerView
from intrafusion.groups.apply import Rewrite, cut_, write_
from intrafusion.groups.heads import Heads
from intrafusion.groups.snapshot import Snapshot
from intrafusion.groups.streams import untie_
from intrafusion.groups.table import GroupTable
from intrafusion.history.lineage import Change, Lineage
from intrafusion.history.replay import GroupCut
from intrafusion.methods.method import Method
from intrafusion.methods.view import View
from intrafusion.ot import Pair, Plan, kept_only, selection_pair, transport_plan
from intrafusion.prune import attention, checks, configs, refusals
from intrafusion.prune.fused_group import FusedGroup, FusionError
from intrafusion.prune.host import Host
from intrafusion.prune.inputs import inputs_for
from intrafusion.prune.report import GroupReport
from intrafusion.prune.sizes import Sizes
from intrafusion.prune.twin import Twin
from intrafusion.running import copy_of, full_precision

_REDUCED = "queries with keys, and values with the output, become their best product of that rank"


class Begun(View):
    """What a method sees, and what its result will be compared with; it lives as long as some group may be pruned."""

    twin: Twin
    inconsistent: frozenset[str]
    moments: HeadMoments | None = None


class Step:
    """One pruning step of a pruner, from the first group to the last.

    Attributes:
        cuts: what was done to each group so far, in order.
        lineage: what became of every parameter, in this step and those before.
        inputs, openings: what the step ran on, if the pruner's `keep_inputs` is set; otherwise (), so that they are
            free when the step is over. The same holds for the copy of the dense network and all activations.
    """

    def __init__(self, pruner: Host, method: Method | None = None) -> None:
        """method: another one than the pruner's settings describe."""
        checks.check_finite(pruner.model)
        self._pruner = pruner
        self.settings = pruner.fusion
        self.method: Method = method or self.settings.method()
        self.cuts: tuple[GroupCut, ...] = ()
        self.lineage: Lineage = pruner.lineage
        self.inputs: Sequence = ()
        self.openings: Sequence = ()
        self._held: Callable[[], Begun | None] = lambda: None
        self._inconsistent: frozenset[str] = frozenset()
        self._at_once = False
        self._heads = attention.present(pruner)
        run = partial(pruner.run, pruner.model, pruner.example_inputs)
        self._sizes = Sizes(pruner.model, run, pruner.num_heads, pruner.DG.module2node)

    def going_on_with(self, view: Begun) -> Step:
        """See what another step of the same network has looked at, which was taken back."""
        self._held, self._inconsistent = lambda: view, view.inconsistent
        return self

    @property
    def view(self) -> Begun | None:
        """What the method sees, as long as some group may still be pruned; None also for plain cutting."""
        return self._held()

    def groups(self, groups: Iterable[Group]) -> Iterator[FusedGroup]:
        """The groups, in the order in which they are to be pruned, each as it is by then."""
        if self.method.looks_ahead:
            groups = list(groups)
            view = self.begin(groups)
            if view is not None and (correction := view.correction) is not None:
                groups = sorted(groups, key=lambda group: correction.position(self._pruner.table(group)))
        else:
            view = self.begin(())
        for group in groups:
            yield FusedGroup.wrap(self._pruner.as_it_is(group), self, view)
        self.finish()
        self._at_once = True  # whoever kept a group, and prunes it now, wants the rest put right at once

    @full_precision()
    def begin(self, groups: Sequence[Group]) -> Begun | None:
        """Look at the network before it changes: a method is shown all groups that may be cut. None for plain cutting.

        Who holds what it returns, as groups do, keeps the step going; the step itself does not.
        """
        pruner, method = self._pruner, self.method
        if self.settings.is_discard:
            return None
        tables = [self._pruner.table(group) for group in groups]
        if method.circuits:
            with self.lineage.recording():
                untied = untie_(pruner.model, {owner for table in tables for owner, _ in table.reach})
            tables = [self._pruner.table(group) for group in groups] if untied else tables
        self._inconsistent = pruner.inconsistent_groups()
        inputs = pruner.inputs or inputs_for(pruner, method)
        if pruner.keep_inputs:
            self.inputs, self.openings = inputs.batches, inputs.openings
        view = Begun(
            pruner.DG, pruner.run, pruner.example_inputs, inputs.own, inputs.drawn,
            importance=pruner.score_of, seed=self.settings.seed, progress=pruner.progress,
        )  # fmt: skip
        if method.repairs or method.samples:
            repair_ = _repair(method, view) if method.repairs else None
            view.correction = Correction(
                pruner.DG, pruner.run, inputs.batches, tables, repair_, tracked=inputs.own or inputs.drawn,
                openings=inputs.openings, unbiased=pruner.unbiased, after_cut=method.after_cut, survey=method.samples,
                sensitivity=method.sensitivity, sources=method.sources, progress=pruner.progress,
                memory=None if pruner.memory_limit is None else int(pruner.memory_limit * 2**30),
            )  # fmt: skip
        dense = copy_of(pruner.model) if view.correction is None else view.correction.dense
        view.twin, view.inconsistent = Twin(dense, inputs.judges), self._inconsistent
        method.begin(view, tables)
        self._held = weakref.ref(view)
        return view

    @torch.no_grad()
    @full_precision()
    def prune(self, group: FusedGroup, record_history: bool) -> None:
        """Fuse and cut one group, all or nothing. Raises FusionError, naming the group; the network is as it was."""
        self._note_sizes()
        table = self._pruner.table(group)
        removed = sorted({int(i) for i in group[0].idxs})
        kept = torch.tensor(sorted(set(range(table.n)).difference(removed)), dtype=torch.long)
        correction = self.view.correction if self.view is not None else None
        alone = correction is None and self._pruner.after_cut is None
        modules = table.modules() if alone else list(self._pruner.model.modules())
        snapshot = Snapshot(self._pruner.DG, modules)
        try:
            if not 0 <= removed[0] <= removed[-1] < table.n:
                raise ValueError(f"channels {removed[0]}..{removed[-1]} are to be removed of {table.n}")
            with self.lineage.recording() as change:
                if correction is not None:
                    with self._sizes.explaining():
                        correction.come_to(table)
                plan, pair, note = self._pair(group, table, kept)
                rewrite, inside = self._write_(group, table, kept, pair, change)
                if self.view is not None:
                    self.view.twin.note(self._pruner.DG, group)
                cut = self._sizes.cutting(group)
                with change.cutting(group):
                    cut_(self._pruner.DG, group, table, record_history=record_history)
                cut()
                if self._pruner.after_cut is not None:
                    self._pruner.after_cut(self._pruner.model, group)
                if correction is not None:
                    if self._sizes.is_suspicious:
                        self._sizes.settle()
                    correction.cut(table, selection_pair(kept, table.n) if pair is None else pair, inside)
                    if self._at_once:
                        with self._sizes.explaining():
                            correction.finish()
        except Exception as error:
            snapshot.restore()
            if correction is not None:
                correction.close()
            where = f"while fusing group {table.name!r} ({table.n} -> {len(kept)} channels)"
            raise FusionError(f"{where}: {refusals.uncut(error, table.name)}") from error
        channel_groups = self._pruner.channel_groups_of(group)
        self.cuts = (
            *self.cuts,
            GroupCut.of(self._pruner.DG, group, channel_groups, pair, rewrite=rewrite, inside=inside),
        )
        merged = "selection" if pair is None and not self._refits_heads(group) else self.method.label
        cost, targets = (None, ()) if plan is None else (plan.cost, plan.main_targets)
        entry = GroupReport(table.name, self._pruner.current_step, table.n, len(kept), merged, cost, note, targets)
        self._pruner.reported(entry)
        self._note_sizes()

    def _note_sizes(self) -> None:
        """Report the attributes that have been set since this was last done; they belong to the last cut."""
        changed = self._sizes.changed()
        if changed and self.cuts:
            last = self.cuts[-1]
            sizes = (*last.sizes, *((one.module, one.name, one.after) for one in changed))
            self.cuts = (*self.cuts[:-1], replace(last, sizes=sizes))
            self._pruner.report.attributes.extend(changed)

    def _settle(self) -> None:
        """The network runs from here on, or somebody is told: by an error if the step itself runs it."""
        trouble = self._sizes.trouble() if self.cuts else ""
        self._note_sizes()
        if trouble and self.view is not None and self.view.correction is not None:
            raise FusionError(trouble)
        if trouble:
            warnings.warn(trouble, stacklevel=5)

    def _follow_config(self) -> None:
        """A config that describes the network says its new widths, or somebody is told that it cannot."""
        if not self.cuts or self._pruner.is_trying:
            return
        changed, trouble = configs.follow(self._pruner.model, attention.numbers(self._pruner))
        self._pruner.report.attributes.extend(changed)
        if trouble:
            warnings.warn(trouble, stacklevel=5)

    def _pair(self, group: FusedGroup, table: GroupTable, kept: Tensor) -> tuple[Plan | None, Pair | None, str]:
        """(plan, pair, remark): features, plan, merge. No pair: the group is only cut; the remark says why."""
        view, settings = self.view, self.settings
        if view is None:
            return None, None, ""
        reason = self._why_not(group, table, kept)
        if reason:
            return None, None, reason
        plan = kept_only(kept, table.n) if not self.method.plan else transport_plan(
            view.feature_parts(table, *settings.features), kept, classes=table.classes,
            importance=view.importance(table), cost=settings.cost, source_mass=settings.source_mass,
            target_mass=settings.target_mass, targets=settings.targets, seed=settings.seed,
        )  # fmt: skip
        pair = self.method.pair(table, plan, view)
        return (plan, pair, _remark(plan)) if self.method.plan else (None, pair, "")

    def _refits_heads(self, group: FusedGroup) -> bool:
        """Are these the channels of attention heads, whose circuits the method takes care of?"""
        return self.view is not None and self.method.circuits and self._block(group) is not None

    def _block(self, group: FusedGroup) -> Heads | None:
        """The attention block whose heads a group is."""
        if not self._pruner.is_attention(group):
            return None
        layers = {item[0].target.module for item in group}
        return next((block for block in self._heads.values() if layers >= {block.output, *block.projections}), None)

    def _write_(
        self, group: FusedGroup, table: GroupTable, kept: Tensor, pair: Pair | None, change: Change
    ) -> tuple[Rewrite | None, dict[str, Tensor]]:
        """Apply the pair, and whatever is written besides it.

        Returns that, and what the outputs of some layers will stand for, where the pair does not say.
        """
        view = self.view
        if pair is None or view is None:
            rewrite, whole = self._reduction(group, table, kept)
            write_(self._pruner.DG, table, None, rewrite, change)
            return rewrite, {} if rewrite is None else rewrite.stands_for(whole)
        rewrite = self.method.rewrite(table, pair, view)
        write_(self._pruner.DG, table, pair, rewrite, change)
        self.method.mixed_(table, pair, view)
        return rewrite, {}

    def _reduction(self, group: FusedGroup, table: GroupTable, kept: Tensor) -> tuple[Reduction | None, Tensor]:
        """What is made of the channels inside of heads that are going to lose some, and the heads that are left.

        None where only whole heads go, or the block is not one that was found.
        """
        view, block = self.view, self._block(group)
        if view is None or view.correction is None or block is None or not self._refits_heads(group):
            return None, kept
        inside, whole = (kept % block.dim).unique(), (kept // block.dim).unique()
        if len(inside) == block.dim or block.width != table.n or len(inside) * len(whole) != len(kept):
            return None, whole
        if view.moments is None:
            correction, blocks = view.correction, list(self._heads.values())
            view.moments = HeadMoments(correction.dense, blocks, self._pruner.run, correction.batches)
        return self.method.reduction(block, view.moments.of(block), inside), whole

    def _why_not(self, group: FusedGroup, table: GroupTable, kept: Tensor) -> str:
        """Why a group can only be cut ('' if it can be fused)."""
        if table.name in self._inconsistent:
            return "torch-pruning's index map does not describe the network here, and its cut may be wrong as well"
        if self._refits_heads(group):
            reduced = (block := self._block(group)) is not None and len((kept % block.dim).unique()) < block.dim
            return _REDUCED if reduced else "heads stay as they are; what reads them is refitted"
        if self._pruner.is_attention(group):
            return "queries and keys meet in a product, which a linear merge cannot keep"
        reason = checks.mismatch(group, table, kept) or table.unsupported or checks.uneven_chunks(table, kept)
        if not reason and not any(slot.makes_channels for slot in table.slots):
            reason = "no layer of the group produces its channels"
        return reason

    @torch.no_grad()
    @full_precision()
    def finish(self) -> None:
        """Put right what lies behind the last cut. Raises FusionError; the network is then as it was before."""
        attention.tell_(self._pruner)
        self._settle()
        view = self.view
        if view is None:
            self._follow_config()
            return
        snapshot = Snapshot(self._pruner.DG, self._pruner.model.modules())
        try:
            with self.lineage.recording():
                if view.correction is not None:
                    with self._sizes.explaining():
                        view.correction.finish()
                if self.cuts:
                    self.method.end_(view)
        except Exception as error:
            snapshot.restore()
            raise FusionError(f"while refitting the layers after the cut: {error}") from error
        self._follow_config()
        compared = view.twin.compared(self._pruner.current_step, self._pruner.model, self._pruner.run)
        if compared is not None:
            self._pruner.compared(compared)


def _repair(method: Method, view: View) -> Callable[[LayerView], None]:
    """The method's repair; the view, which holds what calls it, is not held by that."""
    seen = weakref.ref(view)

    def repair_(layer: LayerView) -> None:
        if (now := seen()) is not None:
            method.repair_(layer, now)

    return repair_


def _remark(plan: Plan) -> str:
    if plan.stranded.any():
        return f"{int(plan.stranded.sum())} channels are not transported to any kept channel, and were discarded"
    return plan.status.value if plan.is_identity else ""
