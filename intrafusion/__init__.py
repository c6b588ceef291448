"""Structured pruning that keeps its accuracy without fine-tuning: channels are fused, not discarded."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from intrafusion.average.align import Alignment, align
    from intrafusion.average.networks import fuse
    from intrafusion.checkpoint import CheckpointError, load, save
    from intrafusion.groups.batchnorm import recenter_batchnorms_
    from intrafusion.groups.kinds.normalisation import register_norm
    from intrafusion.methods import Method, merge_rule, method
    from intrafusion.onnx.export import ExportError, export
    from intrafusion.ot import Pair, Plan
    from intrafusion.prune.fused_group import FusedGroup, FusionError
    from intrafusion.prune.fusion import PRESETS, Fusion
    from intrafusion.prune.importance import (
        CHIPImportance,
        FLAPImportance,
        ReconstructionImportance,
        WandaImportance,
    )
    from intrafusion.prune.pruner import IntraFusionPruner
    from intrafusion.prune.report import GroupReport, Report
    from intrafusion.prune.siblings import (
        IntraFusionBNScalePruner,
        IntraFusionGroupNormPruner,
        IntraFusionGrowingRegPruner,
    )
    from intrafusion.prune.twin import WorseThanCut
    from intrafusion.training.finetuning import finetune
    from intrafusion.training.fusion_schedule import FusionSchedule
    from intrafusion.training.loop import DivergedError, History
    from intrafusion.training.optimizer_state import transfer_optimizer_state
    from intrafusion.training.ratios import cosine_scheduler, cubic_scheduler, linear_scheduler, one_shot_scheduler
    from intrafusion.training.settings import Training

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "Alignment",
    "CHIPImportance",
    "CheckpointError",
    "DivergedError",
    "ExportError",
    "FLAPImportance",
    "FusedGroup",
    "Fusion",
    "FusionError",
    "FusionSchedule",
    "GroupReport",
    "History",
    "IntraFusionBNScalePruner",
    "IntraFusionGroupNormPruner",
    "IntraFusionGrowingRegPruner",
    "IntraFusionPruner",
    "Method",
    "Pair",
    "Plan",
    "ReconstructionImportance",
    "Report",
    "Training",
    "WandaImportance",
    "WorseThanCut",
    "align",
    "cosine_scheduler",
    "cubic_scheduler",
    "export",
    "finetune",
    "fuse",
    "linear_scheduler",
    "load",
    "merge_rule",
    "method",
    "one_shot_scheduler",
    "recenter_batchnorms_",
    "register_norm",
    "save",
    "transfer_optimizer_state",
]

# Loaded on first use: whoever only loads a pruned network needs neither the pruner nor torch-pruning.
_HOME = {
    "average.networks": ("fuse",),
    "checkpoint": (
        "CheckpointError",
        "load",
        "save",
    ),
    "training.fusion_schedule": ("FusionSchedule",),
    "training.finetuning": ("finetune",),
    "prune.twin": ("WorseThanCut",),
    "prune.fused_group": (
        "FusedGroup",
        "FusionError",
    ),
    "prune.fusion": (
        "PRESETS",
        "Fusion",
    ),
    "prune.importance": (
        "CHIPImportance",
        "FLAPImportance",
        "ReconstructionImportance",
        "WandaImportance",
    ),
    "onnx.export": (
        "ExportError",
        "export",
    ),
    "training.optimizer_state": ("transfer_optimizer_state",),
    "prune.pruner": ("IntraFusionPruner",),
    "prune.siblings": (
        "IntraFusionBNScalePruner",
        "IntraFusionGroupNormPruner",
        "IntraFusionGrowingRegPruner",
    ),
    "training.ratios": (
        "cosine_scheduler",
        "cubic_scheduler",
        "linear_scheduler",
        "one_shot_scheduler",
    ),
    "prune.report": (
        "GroupReport",
        "Report",
    ),
    "average.align": (
        "Alignment",
        "align",
    ),
    "schedule": (),
    "groups.batchnorm": ("recenter_batchnorms_",),
    "groups.kinds.normalisation": ("register_norm",),
    "methods": (
        "Method",
        "merge_rule",
        "method",
    ),
    "ot": (
        "Pair",
        "Plan",
    ),
    "training.loop": (
        "DivergedError",
        "History",
    ),
    "training.settings": ("Training",),
}


def __getattr__(name: str) -> object:
    for module, names in _HOME.items():
        if name in names:
            value = globals()[name] = getattr(_import_module(f"intrafusion.{module}"), name)
            return value
        if name == module:
            return _import_module(f"intrafusion.{module}")
    raise AttributeError(f"module 'intrafusion' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
