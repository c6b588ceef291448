"""Optimal transport between channels: tensors in, tensors out; no modules, no files."""

from intrafusion.ot.cost import COSTS, normalise_rows, pairwise_cost
from intrafusion.ot.merge import MERGE_RULES, Pair, merge_rule, selection_pair
from intrafusion.ot.plan import Plan, PlanStatus, solve, transport_plan

__all__ = [
    "COSTS",
    "MERGE_RULES",
    "Pair",
    "Plan",
    "PlanStatus",
    "merge_rule",
    "normalise_rows",
    "pairwise_cost",
    "selection_pair",
    "solve",
    "transport_plan",
]
