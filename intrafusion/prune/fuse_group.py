"""Fuse one group: table, features, plan, pair, apply; or say why it is only cut."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch_pruning as tp
from torch import Tensor

from intrafusion.correct.corrector import Corrector
from intrafusion.groups.apply import apply_pair
from intrafusion.groups.features import channel_features
from intrafusion.groups.table import GroupTable, Role
from intrafusion.ot import MERGE_RULES, Pair, Plan, selection_pair, transport_plan
from intrafusion.prune.fusion import Fusion


@dataclass(frozen=True)
class Outcome:
    """What happened to a group before it is cut: how it was merged, the plan and the pair if there was one, and why not
    if not.
    """

    merged: str
    plan: Plan | None = None
    reason: str = ""
    pair: Pair | None = None


def fuse(
    graph: tp.DependencyGraph,
    table: GroupTable,
    kept: Tensor,
    importance: Tensor | None,
    settings: Fusion,
    corrector: Corrector | None = None,
    veto: str = "",
) -> Outcome:
    """Write the fused channels of a group into its kept places, at full size; torch-pruning cuts afterwards.

    kept: [k] increasing root channels; importance: [n], for `importance` masses; corrector: refits layers on the way;
    veto: a reason, known already, why the group is only cut.
    Raises ValueError or RuntimeError if the plan cannot be computed or a fused value is not finite; the network is then
    as it was.
    """
    if settings.merge == "selection":
        return Outcome("selection")
    if corrector is not None:
        corrector.refit_until(table)
    reason = veto or table.unsupported or uneven_chunks(table, kept)
    if not reason and not any(slot.role in (Role.PRODUCER, Role.SHIFT) for slot in table.slots):
        reason = "no layer of the group produces its channels"
    if reason:
        if corrector is not None:
            corrector.note(table, selection_pair(kept, table.n))
        return Outcome("selection", reason=reason)
    plan = transport_plan(
        channel_features(
            graph,
            table,
            rows="filters" in settings.features,
            columns="readers" in settings.features,
            bias="biases" in settings.features,
        ),
        kept,
        classes=table.classes,
        importance=importance,
        cost=settings.cost,
        source_mass=settings.source_mass,
        target_mass=settings.target_mass,
        targets=settings.targets,
        seed=settings.seed,
    )
    pair = MERGE_RULES[settings.merge](plan) if corrector is None else corrector.pair(table, plan)
    apply_pair(table, pair)
    if corrector is not None:
        corrector.note(table, pair)
    note = ""
    if plan.is_identity and not plan.stranded.any():
        note = plan.status.value
    elif plan.stranded.any():
        note = f"{int(plan.stranded.sum())} channels are not transported to any kept channel, and were discarded"
    return Outcome(settings.merge if corrector is None else settings.correct, plan, note, pair)


def uneven_chunks(table: GroupTable, kept: Tensor) -> str:
    """Torch-Pruning cuts every chunk of a grouped layer at the first chunk's offsets: say so if that would be wrong."""
    for slot in table.slots:
        if slot.role is not Role.CONSUMER or slot.chunks == 1:
            continue
        width = slot.size // slot.chunks
        covered = set(slot.local[slot.local >= 0].tolist())
        local = slot.local[kept]
        alive = torch.zeros(slot.size, dtype=torch.bool)
        alive[local[local >= 0]] = True
        alive[[i for i in range(slot.size) if i not in covered]] = True
        by_chunk = alive.reshape(slot.chunks, width)
        if not (by_chunk == by_chunk[0]).all():
            return f"the kept channels of {slot.name!r} differ between its {slot.chunks} groups"
    return ""
