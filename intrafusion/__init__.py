"""Structured pruning that keeps its accuracy without fine-tuning: channels are fused, not discarded."""

from intrafusion.finetuning import finetune
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
from intrafusion.surgery.batchnorm import recenter_batchnorms_
from intrafusion.training_loop import DivergedError, History
from intrafusion.training_settings import Training

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "CHIPImportance",
    "DivergedError",
    "FusedGroup",
    "Fusion",
    "FusionError",
    "GroupReport",
    "History",
    "IntraFusionBNScalePruner",
    "IntraFusionGroupNormPruner",
    "IntraFusionGrowingRegPruner",
    "IntraFusionPruner",
    "ReconstructionImportance",
    "Report",
    "Training",
    "finetune",
    "recenter_batchnorms_",
]
