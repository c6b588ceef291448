"""What the metric says of a group, or why it says nothing; and the channels that go when a group's turn comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning import ops
from torch_pruning.dependency.group import Group

from intrafusion.groups.batchnorm import folded
from intrafusion.groups.table import foldable_pairs, module_name, ties
from intrafusion.prune import attention, checks, refusals
from intrafusion.prune.fused_group import FusionError


def score_of(pruner: Any, group: Group) -> Tensor | str:
    """The score of every channel of a full group: [n]; a sentence if it is left alone. See `estimate_importance`."""
    n, chunks = len(group[0].idxs), pruner.channel_groups_of(group)
    where = f"while scoring group {module_name(pruner.DG, group[0].dep.target.module)!r} ({n} channels)"
    if n % chunks:
        raise FusionError(f"{where}: {refusals.undivided(chunks, refusals.root_of(pruner.DG, group))}")
    try:
        score = _asked(pruner, group)
    except Exception as error:
        if not (reason := refusals.unscored(error, refusals.root_of(pruner.DG, group))):
            raise
        if chunks < n:
            raise FusionError(f"{where}: {reason}") from error
        return "each channel is a chunk of its own, of which torch-pruning removes none"
    if score is None:
        return "the metric has nothing to score here"
    if isinstance(score, Tensor) and score.dim() == 1 and len(score) > n:
        score = _asked(pruner, _longest_last(group))
    problem = checks.importance_problem(score, n)
    if problem:
        raise FusionError(f"{where}: {problem}")
    return _together(pruner, group, score.detach())


def _together(pruner: Any, group: Group, score: Tensor) -> Tensor:
    """Channels of what is split that can only go together, as the two halves of a gated layer, get their mean score.

    Torch-Pruning chooses the least n r of n channels and then takes along what is tied to them: of a layer whose halves
    are multiplied, anything from r to all.
    """
    n = len(score)
    if not any(item.dep.target.type == ops.OPTYPE.SPLIT for item in group):
        return score
    partners = ties(pruner.table(group))
    if partners is None:
        return score
    sums = torch.zeros(n, dtype=torch.float64).index_add(0, partners, score.cpu().double())
    counts = torch.bincount(partners, minlength=n)
    means = (sums / counts.clamp(min=1)).to(score.dtype if score.dtype == torch.float64 else torch.float32)
    return _apart(means, counts > 0)[partners].to(score.device)


def _apart(values: Tensor, counted: Tensor) -> Tensor:
    """The same, with numbers that are equal told apart: torch-pruning would take a half of each of several units."""
    order = torch.argsort(values, stable=True)
    order = order[counted[order]]
    up, tiny = values.new_tensor(float("inf")), torch.finfo(values.dtype).tiny
    found, last = values.clone(), None
    for number in order.tolist() if len(values[order].unique()) < len(order) else ():
        if last is not None and found[number] <= last:
            found[number] = torch.maximum(torch.nextafter(last, up), last + tiny)
        last = found[number]
    return found


def _longest_last(group: Group) -> Group:
    """The group with its layers by how many of their channels are in it.

    torch-pruning's importances give as many scores as the first layer that they look at has channels in the group. That
    is too many where it reads the channels twice, behind a concat, and the layers before it have nothing to score.
    """
    ordered = Group()
    ordered._DG = group._DG
    ordered._group = [group[0], *sorted(group[1:], key=lambda item: len(item.idxs))]
    return ordered


def _asked(pruner: Any, group: Group) -> Any:
    score = None
    if getattr(pruner.importance, "takes_blocks", False) and (heads := attention.whole_heads(pruner, group)):
        return pruner.importance(group, blocks=heads)
    if pruner.fusion.score_on == "folded" and not getattr(pruner.importance, "sees_activations", False):
        with folded(foldable_pairs(pruner.DG, group)):
            score = pruner.importance(group)
    return pruner.importance(group) if score is None else score


def least(pruner: Any, layer: nn.Module, pruning_fn: Callable, left: float) -> list[int]:
    """The channels with the least scores, all but the share that is left. Raises FusionError if there are no scores."""
    n = checks.width(pruner.DG, layer, pruning_fn)
    score = pruner.estimate_importance(pruner.DG.get_pruning_group(layer, pruning_fn, list(range(n))))
    if score is None:
        raise FusionError(f"group {module_name(pruner.DG, layer)!r}: the metric has nothing to score here")
    return torch.argsort(score)[: int(n * (1 - left))].tolist()


def chosen_now(pruner: Any, group: Group) -> Group:
    """See `FusionMixin.as_it_is`."""
    root = group[0].dep
    if all(hasattr(item, "dep") for item in group):
        idxs = [int(i) for i in group[0].idxs]
        group = pruner.DG.get_pruning_group(root.target.module, root.handler, idxs)
    asked_again = pruner.fusion.rescore and not pruner.global_pruning
    if not asked_again or pruner.is_attention(group) or pruner.channel_groups_of(group) > 1:
        return group
    n = checks.width(pruner.DG, root.target.module, root.handler)
    full = pruner.DG.get_pruning_group(root.target.module, root.handler, list(range(n)))
    score = pruner.estimate_importance(full)
    if score is None:
        return group
    count = len(set(group[0].idxs))
    removed = torch.topk(score.cpu(), k=count, largest=False).indices
    chosen = pruner.DG.get_pruning_group(root.target.module, root.handler, sorted(removed.tolist()))
    return chosen if len(set(chosen[0].idxs)) == count else group  # tied channels bring others along
