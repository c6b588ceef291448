"""A common order of the channels of several networks: each is aligned to the mean of the others, in turn.

With w_i >= 0 the networks' weights and π_i their orders, every turn lowers

    Σ_{i<j} w_i w_j ‖ π_i(B_i) - π_j(B_j) ‖²

(Ainsworth et al. 2023, MergeMany), which is symmetric in the networks: nothing is a chain, and the end depends on their
list only through where it starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.average.align import best_match, couple_rows
from intrafusion.average.couplings import Couplings
from intrafusion.average.matching import Links, WeightMatching, comparable
from intrafusion.average.responses import responses
from intrafusion.groups.places import State

_ROUNDS = 20
_SWEEPS = 50


def common_orders(
    networks: Sequence[nn.Module],
    states: Sequence[State],
    weights: Sequence[float],
    couplings: Couplings,
    run: Callable[[nn.Module, Any], Any],
    batches: Sequence,
    *,
    by: str,
    seed: int,
) -> list[dict[str, Tensor]]:
    """[n] per group and network: the orders that bring all networks together. networks: of one width.

    states: the networks' tensors on one device. by: as for `align`; batches: for `activations`.
    """
    views = [comparable(state, couplings) for state in states]
    start = [best_match(views[0], view, couplings, by=by, seed=seed) for view in views] if by != "activations" else None
    if start is None:
        rows = [responses(network, run, batches, couplings) for network in networks]
        return _by_rows(views, rows, weights, couplings)
    matches, moved = start, [_moved(match) for match in start]
    for _ in range(_ROUNDS if by == "matching" and len(views) > 2 else 0):
        changed = False
        for at in range(len(views)):
            others = [(w, view) for i, (w, view) in enumerate(zip(weights, moved, strict=True)) if i != at]
            new = WeightMatching(_mean(others), views[at], couplings.groups, couplings.groups, soft=False)
            new.links.update(matches[at].links)
            new.descend(seed=seed, sweeps=_SWEEPS)
            if not all(new.links[name].same(link) for name, link in matches[at].links.items()):
                changed, matches[at], moved[at] = True, new, _moved(new)
        if not changed:
            break
    return [_orders(match.links) for match in matches]


def _by_rows(
    views: list[State], rows: list[dict[str, Tensor]], weights: Sequence[float], couplings: Couplings
) -> list[dict[str, Tensor]]:
    """By activations: rows per group, which do not depend on the other groups' orders."""
    matches = [WeightMatching(views[0], view, couplings.groups, couplings.groups, soft=False) for view in views]
    for match, mine in zip(matches, rows, strict=True):
        couple_rows(match, mine, rows[0], couplings.groups, couplings.groups, soft=False)
    for _ in range(_ROUNDS if len(views) > 2 else 0):
        before = [_orders(match.links) for match in matches]
        for at, match in enumerate(matches):
            others = [i for i in range(len(matches)) if i != at]
            mean = {
                name: torch.stack([weights[i] * rows[i][name][matches[i].links[name].order] for i in others]).sum(dim=0)
                for name in rows[at]
            }
            couple_rows(match, rows[at], mean, couplings.groups, couplings.groups, soft=False)
        if all(
            torch.equal(a[n], b[n]) for a, b in zip(before, (_orders(m.links) for m in matches), strict=True) for n in a
        ):
            break
    return [_orders(match.links) for match in matches]


def _moved(match: WeightMatching) -> State:
    return {key: match.moved(key) for key in match.tensors}


def _mean(weighted: Sequence[tuple[float, State]]) -> State:
    total = sum(weight for weight, _ in weighted)
    return {
        key: torch.stack([weight / total * view[key] for weight, view in weighted]).sum(dim=0) for key in weighted[0][1]
    }


def _orders(links: Links) -> dict[str, Tensor]:
    return {name: link.order for name, link in links.items() if link.order is not None}
