"""Structured pruning that keeps its accuracy without fine-tuning: channels are fused, not discarded."""

from intrafusion.during_training import FusionSchedule
from intrafusion.fusion import PRESETS, Fusion
from intrafusion.importance import CHIPImportance, ReconstructionImportance
from intrafusion.optimizer_state import transfer_optimizer_state
from intrafusion.pruner import (
    FusedGroup,
    FusionError,
    IntraFusionBNScalePruner,
    IntraFusionGroupNormPruner,
    IntraFusionGrowingRegPruner,
    IntraFusionPruner,
)
from intrafusion.ratios import cosine_scheduler, cubic_scheduler, linear_scheduler, one_shot_scheduler
from intrafusion.report import GroupReport, Report

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "CHIPImportance",
    "FusedGroup",
    "Fusion",
    "FusionError",
    "FusionSchedule",
    "GroupReport",
    "IntraFusionBNScalePruner",
    "IntraFusionGroupNormPruner",
    "IntraFusionGrowingRegPruner",
    "IntraFusionPruner",
    "ReconstructionImportance",
    "Report",
    "cosine_scheduler",
    "cubic_scheduler",
    "linear_scheduler",
    "one_shot_scheduler",
    "transfer_optimizer_state",
]
