"""What a method runs the network on: nothing, the user's own inputs, synthetic ones, or both."""

from __future__ import annotations

from typing import Any

from intrafusion.correct.synthetic import synthetic_count, synthetic_inputs
from intrafusion.methods.method import Method
from intrafusion.prune.fused_group import FusionError
from intrafusion.prune.host import Host
from intrafusion.running import merged, to_device


def inputs_for(pruner: Host, method: Method) -> list[Any]:
    """The batches for one step, on the network's device.

    Raises FusionError if the method wants synthetic inputs and the network does not run on any.
    """
    own = list(pruner.calibration) if method.inputs == "calibration" else []
    count = 0
    if method.inputs == "synthetic" or (own and method.fills_up):
        count = synthetic_count(pruner.model, pruner.example_inputs, own)
    drawn: list[Any] = []
    if count:
        try:
            drawn = synthetic_inputs(
                pruner.model, pruner.example_inputs, pruner.run,
                count=count, seed=pruner.fusion.seed, progress=pruner.progress,
            )  # fmt: skip
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            if not own:
                raise FusionError(
                    f"the network does not run on batches of synthetic inputs shaped like its example ({error}): give "
                    "fusion='calibrated' with calibration=<batches of your own>, or fusion='paper', which needs none"
                ) from error
    device = next(pruner.model.parameters()).device
    return [to_device(batch, device) for batch in merged(own) + drawn]
