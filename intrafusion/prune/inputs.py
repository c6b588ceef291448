"""What a method runs the network on: nothing, the user's own inputs, synthetic ones, or both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from intrafusion.correct.sequences import token_ids
from intrafusion.correct.synthetic import NoSyntheticInputs, synthetic_count, synthetic_inputs
from intrafusion.methods.method import Method
from intrafusion.prune.fused_group import FusionError
from intrafusion.prune.host import Host
from intrafusion.prune.twin import BLINDLY, ROUGHLY, Judges, count_of, held_out, says, varied
from intrafusion.running import merged, to_device

_WAY_OUT = (
    "Give fusion='calibrated' with calibration=<batches of your own>, or fusion='paper' or 'discard', which need none"
)


@dataclass(frozen=True)
class Inputs:
    """own: batches that the user gave; drawn: synthetic ones; judges: what the result is judged on, held out of the one
    or the other, and, where the user gave none, the example. Nothing looks at them before a step is over.
    """

    own: list[Any]
    drawn: list[Any]
    judges: list[Judges]

    @property
    def batches(self) -> list[Any]:
        return self.own + self.drawn


def inputs_for(pruner: Host, method: Method) -> Inputs:
    """The batches for one step, on the network's device.

    Raises FusionError if the method wants synthetic inputs and the network does not run on any.
    """
    device = next(pruner.model.parameters()).device
    own = list(pruner.calibration) if method.inputs == "calibration" else []
    count, example = 0, pruner.example_inputs
    if method.inputs == "synthetic" or (own and method.fills_up):
        if own and token_ids(own[0]) is not None:
            example = to_device(own[0], device)  # texts as long as the user's own
        count = synthetic_count(pruner.model, example, own)
    drawn: list[Any] = []
    if count:
        try:
            drawn = synthetic_inputs(
                pruner.model, example, pruner.run,
                count=count, seed=pruner.fusion.seed, progress=pruner.progress,
            )  # fmt: skip
        except NoSyntheticInputs as error:
            if not own:
                raise FusionError(f"no synthetic inputs: {error}. {_WAY_OUT}") from error
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            if not own:
                raise FusionError(
                    f"the network does not run on batches of synthetic inputs shaped like its example ({error}). "
                    f"{_WAY_OUT}"
                ) from error
    own, drawn = ([to_device(batch, device) for batch in batches] for batches in (merged(own), drawn))
    return _parted(own, drawn, pruner.example_inputs)


def _parted(own: list[Any], drawn: list[Any], example: Any) -> Inputs:
    name = "calibration" if own else "synthetic"
    kept, judges = held_out(own or drawn)
    told = f"{count_of(judges)} {name} inputs that were held out"
    if not judges and kept:
        judges, told = kept, f"the {name} inputs themselves, too few to hold any out"
    elif not judges:
        judges, told = [varied(example)], "the example inputs, or noise of their shape"
    every = [Judges(judges, told) if own or drawn else Judges(judges, told, BLINDLY)]
    if not own and says(example):  # what the user has is nearer to this than to noise, or to what is drawn
        every.append(Judges([example], "the example inputs", ROUGHLY))
    return Inputs(kept, drawn, every) if own else Inputs([], kept, every)
