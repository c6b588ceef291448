"""Structured pruning that keeps its accuracy without fine-tuning: channels are fused, not discarded."""

from intrafusion.averaging import fuse
from intrafusion.fusion import PRESETS, Fusion
from intrafusion.importance import CHIPImportance, ReconstructionImportance
from intrafusion.pruner import (
    FusedGroup,
    FusionError,
    IntraFusionBNScalePruner,
    IntraFusionGroupNormPruner,
    IntraFusionGrowingRegPruner,
    IntraFusionPruner,
)
from intrafusion.report import GroupReport, Report
from intrafusion.surgery.align import Alignment, align

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Alignment",
    "CHIPImportance",
    "FusedGroup",
    "Fusion",
    "FusionError",
    "GroupReport",
    "IntraFusionBNScalePruner",
    "IntraFusionGroupNormPruner",
    "IntraFusionGrowingRegPruner",
    "IntraFusionPruner",
    "ReconstructionImportance",
    "Report",
    "align",
    "fuse",
]
