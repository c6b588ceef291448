"""What a method runs the network on: nothing, the user's own inputs, synthetic ones, or both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from intrafusion.correct.sequences import openings, token_ids
from intrafusion.correct.synthetic import NoSyntheticInputs, synthetic_count, synthetic_inputs
from intrafusion.methods.method import Method
from intrafusion.prune.fused_group import FusionError
from intrafusion.prune.host import Host
from intrafusion.prune.twin import BLINDLY, ROUGHLY, Judges, count_of, held_out, says, varied
from intrafusion.running import input_batches, merged, run_model, to_device

_WAY_OUT = (
    "Give fusion='calibrated' with calibration=<batches of your own>, or fusion='paper' or 'discard', which need none"
)


@dataclass(frozen=True)
class Inputs:
    """own: batches that the user gave; drawn: synthetic ones; judges: what the result is judged on, held out of the one
    or the other, and, where the user gave none, the example. Nothing looks at them before a step is over. openings: how
    sequences begin, for refits alone.
    """

    own: list[Any]
    drawn: list[Any]
    judges: list[Judges]
    openings: list[Any] = field(default_factory=list)

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
    parted = _parted(own, drawn, pruner.example_inputs)
    if not (method.sensitivity and parted.batches):
        return parted
    generator = torch.Generator().manual_seed(pruner.fusion.seed)
    given = parted.own, parted.drawn
    first = openings(pruner.model, parted.batches[0], pruner.run, *given, generator=generator)
    return replace(parted, openings=first)


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


def synthetic_batches(
    model: nn.Module,
    example_inputs: Any,
    *,
    forward_fn: Callable | None = None,
    count: int | None = None,
    seed: int = 0,
) -> list[Any]:
    """Unlabelled inputs for a network that came without any, as `data-free` makes them: for importances, for measuring.

    Images that the batch-norms know, text that a language model writes itself, otherwise noise in the example's units
    (`docs/method.md`). Tuples or dictionaries of tensors, as the network takes them, some inputs each.

    example_inputs, forward_fn: as the pruner takes them. count: how many inputs (as many as `data-free` takes).
    Raises NoSyntheticInputs, a ValueError, for what cannot be drawn, and TypeError for an example without a tensor.
    """
    (example,) = input_batches([example_inputs], "example_inputs")
    run = partial(run_model, forward_fn=forward_fn)
    return synthetic_inputs(model, example, run, count=count, seed=seed, progress=False)
