"""Optimal transport between channels: tensors in, tensors out; no modules, no files."""

from intrafusion.ot.cost import COSTS, normalise_rows, pairwise_cost
from intrafusion.ot.merge import Pair, kept_only, selection_pair
from intrafusion.ot.plan import Plan, PlanStatus, solve, transport_plan

__all__ = [
    "COSTS",
    "Pair",
    "Plan",
    "PlanStatus",
    "kept_only",
    "normalise_rows",
    "pairwise_cost",
    "selection_pair",
    "solve",
    "transport_plan",
]
