"""How a network is fed: its example and the user's batches are tried on it before anything else is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.running import described, does_not_run, evaluating, recordable, tensors_in, to_device


def outputs_of(output_transform: Callable | None) -> Callable[[Any], list[Tensor]]:
    """What torch-pruning is to trace of an output: all tensors, whatever object holds them, behind the user's own."""
    return partial(_tensors, output_transform)


def _tensors(output_transform: Callable | None, output: Any) -> list[Tensor]:
    return list(tensors_in(output if output_transform is None else output_transform(output)))


def fed(model: nn.Module, example: Any, run: Callable[[nn.Module, Any], list[Tensor]]) -> Any:
    """The example as arguments of the network, which it is run on once, in eval mode and without gradients.

    Like torch-pruning, a tuple or a list is taken as arguments, and as the only argument where that does not run.
    run: as `run_model`. Raises ValueError, with what the network said, if it does not run, or gives no tensor.
    """
    example = recordable(example)
    try:
        outputs = _outputs(model, example, run)
    except Exception as error:
        wrapped = (example,)
        try:
            outputs = _outputs(model, wrapped, run) if isinstance(example, (tuple, list)) else None
        except Exception:
            outputs = None
        if outputs is None:
            raise ValueError(
                f"the network does not run on example_inputs ({described(example)}): {type(error).__name__}: {error}"
            ) from error
        example = wrapped
    if not outputs:
        raise ValueError(
            "the network gives no tensor for example_inputs: give output_transform=<function from what it gives to "
            "tensors>"
        )
    return example


def tried(batches: list, model: nn.Module, example: Any, run: Callable[[nn.Module, Any], Any], *, plain: bool) -> list:
    """Calibration batches as arguments of the network, which the first one is tried on.

    example: arguments that it runs on; where that is a list as the only argument, batches may be such lists. plain: are
    inputs given to the network as they are (no forward_fn)? They then have as many axes as the example has.

    Raises ValueError, naming the batch and what may be wrong with it.
    """
    in_a_list = plain and isinstance(example, tuple) and len(example) == 1 and isinstance(example[0], (list, tuple))
    if in_a_list and all(_is_bare(batch) for batch in batches):
        batches = [(batch,) for batch in batches]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if plain:
        _check_axes(batches, example)
    try:
        _outputs(model, to_device(batches[0], device), run)
    except Exception as error:
        raise does_not_run(error, batches[0], 0, example) from error
    return batches


def _outputs(model: nn.Module, inputs: Any, run: Callable[[nn.Module, Any], list[Tensor]]) -> list[Tensor]:
    with torch.no_grad(), evaluating(model):
        return run(model, inputs)


def _is_bare(batch: Any) -> bool:
    """A list of tensors, and not one that holds such a list."""
    return isinstance(batch, (tuple, list)) and all(isinstance(value, Tensor) for value in batch)


def _check_axes(batches: list, example: Any) -> None:
    """One image where a batch of images is meant runs in many networks, and means something else."""
    known = _top(example)
    for number, batch in enumerate(batches):
        given = _top(batch)
        for value, other in zip(given, known, strict=False):
            if value.dim() == other.dim() - 1 and value.shape == other.shape[1:]:
                raise ValueError(
                    f"calibration batch {number} ({described(batch)}) is a single input where a batch of them is "
                    f"meant (the example inputs are {described(example)}): give batches, as "
                    "calibration=torch.stack(inputs).split(32)"
                )


def _top(batch: Any) -> Sequence[Tensor]:
    values = batch.values() if isinstance(batch, Mapping) else batch
    return [value for value in values if isinstance(value, Tensor)]
