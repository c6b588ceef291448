"""Running a network: its modes, its inputs, its random numbers, the order of its layers."""

from intrafusion.running.copies import copy_of
from intrafusion.running.inputs import (
    described,
    does_not_run,
    input_batches,
    leaves,
    map_tensors,
    merged,
    recordable,
    shares_first_axis,
    size_of,
    tensors_in,
    to_device,
)
from intrafusion.running.network import call_order, evaluating, full_precision, run_model, same_outputs, trainable
from intrafusion.running.randomness import Levelled, RandomState, repeatable

__all__ = [
    "Levelled",
    "RandomState",
    "call_order",
    "copy_of",
    "described",
    "does_not_run",
    "evaluating",
    "full_precision",
    "input_batches",
    "leaves",
    "map_tensors",
    "merged",
    "recordable",
    "repeatable",
    "run_model",
    "same_outputs",
    "shares_first_axis",
    "size_of",
    "tensors_in",
    "to_device",
    "trainable",
]
