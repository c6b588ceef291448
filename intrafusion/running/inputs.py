"""Inputs and outputs of a network: tensors, and all that may hold them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def leaves(value: Any) -> Iterator[Any]:
    """All that is inside nested tuples, lists, dictionaries and data classes."""
    if isinstance(value, Mapping):
        parts: Iterable = value.values()
    elif isinstance(value, (tuple, list)):
        parts = value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
    else:
        yield value
        return
    for part in parts:
        yield from leaves(part)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors among the leaves of a value; of another object, those that its attributes hold."""
    found = [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]
    if not found and hasattr(value, "__dict__"):
        found = [leaf for leaf in leaves(vars(value)) if isinstance(leaf, Tensor)]
    yield from found


def map_tensors(value: Any, f: Callable[[Tensor], Any]) -> Any:
    """The same tuples, lists and dictionaries with f(tensor) in the place of every tensor."""
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(part, f) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(part, f) for part in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(part, f) for part in value)
    return value


def recordable(batch: Any) -> Any:
    """The same inputs, of which autograd may keep any: those that were made under inference_mode are copied."""
    if not any(value.is_inference() for value in tensors_in(batch)):
        return batch
    return map_tensors(batch, lambda value: value.clone() if value.is_inference() else value)


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch of inputs with its tensors on `device`."""
    return map_tensors(batch, lambda value: value.to(device))


def described(batch: Any) -> str:
    """Number, dtypes and shapes of what a batch holds: '2 tensors: float32 [16, 3, 8, 8], int64 [16]'."""
    tensors = list(tensors_in(batch))
    each = [f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for tensor in tensors]
    shown = ", ".join(each[:4]) + (", ..." if len(each) > 4 else "")
    return f"{len(tensors)} tensor{'' if len(tensors) == 1 else 's'}" + (f": {shown}" if shown else "")


def input_batches(batches: Iterable, name: str = "calibration") -> list:
    """Unlabelled input batches as a list: what a network takes as example inputs, as often as there are batches.

    name: of the argument. Raises ValueError or TypeError, naming it, if there are none, or for what is no input.
    """
    if isinstance(batches, Tensor):
        raise TypeError(
            f"{_several(name)} one tensor of shape {list(batches.shape)}, but an iterable of batches is meant: give "
            "[inputs], or inputs.split(32)"
        )
    if isinstance(batches, (Mapping, str)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"{_several(name)} a {type(batches).__name__}: give an iterable of batches of inputs, as [inputs]"
        )
    found = [(batch,) if isinstance(batch, Tensor) else batch for batch in batches]
    if not found:
        raise ValueError(f"the {name.removeprefix('the ')} iterable is empty: give at least one batch of inputs")
    for number, batch in enumerate(found):
        tensors = [leaf for leaf in leaves(batch) if isinstance(leaf, Tensor)]
        if not isinstance(batch, (tuple, list, Mapping)) or not tensors:
            raise TypeError(
                f"{name} batch {number} is a {type(batch).__name__} without a tensor: give tensors, or tuples, lists "
                "or dictionaries of them, as the network takes them"
            )
        if not any(tensor.numel() for tensor in tensors):
            shape = list(tensors[0].shape)
            raise ValueError(f"{name} batch {number} has no inputs, its shape is {shape}: leave it out")
        for tensor in tensors:
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(f"{name} batch {number} holds NaN or infinite values")
    return found


def _several(name: str) -> str:
    return f"{name} batches are" if name.endswith("'s") else f"{name} is"


def does_not_run(
    error: Exception, batch: Any, number: int, example: Any = None, name: str = "calibration"
) -> ValueError:
    """Which batch it is that a network does not run on, and what may be wrong with it.

    example: inputs that the network does run on, if there are any. name: of the argument that the batch belongs to.
    """
    return ValueError(
        f"{name} batch {number} ({described(batch)}) does not run: {type(error).__name__}: {error}; "
        f"{_advice(batch, example)}"
    )


def _advice(batch: Any, example: Any) -> str:
    given, known = list(tensors_in(batch)), list(tensors_in(example))
    plain = "give inputs without labels, as the network takes them"
    if not known:
        return plain
    told = f"the example inputs are {described(example)}"
    if len(given) > len(known):
        return f"give inputs without labels ({told})"
    if len(given) == len(known) and [t.dtype for t in given] != [t.dtype for t in known]:
        return f"give them in the dtype and the range that the network was trained on ({told})"
    return f"{plain} ({told})"


def size_of(batch: Any) -> int:
    """How many inputs a batch can be parted into."""
    return len(next(tensors_in(batch))) if shares_first_axis(batch) else 1


def shares_first_axis(batch: Any) -> bool:
    """Do all tensors of a batch share their first axis, and is none in a list?"""
    sizes = {len(value) if value.dim() else None for value in tensors_in(batch)}
    values = batch.values() if isinstance(batch, Mapping) else batch
    nested = sum(isinstance(value, Tensor) for value in values) < sum(1 for _ in tensors_in(batch))
    return len(sizes) == 1 and None not in sizes and not nested


def merged(batches: list, most: int = 16) -> list:
    """The same inputs in about `most` batches, where they are more and can be put together.

    Each batch is walked through on its own: thousands of single inputs would be thousands of passes. Only batches that
    differ in nothing but what lies along the first axis, which all their tensors share, are put together.
    """
    if len(batches) <= most or len({_shape(batch) for batch in batches}) > 1 or _shape(batches[0]) is None:
        return batches
    each = -(-len(batches) // most)
    return [_joined(batches[start : start + each]) for start in range(0, len(batches), each)]


def _shape(batch: Any) -> tuple | None:
    """What two batches must have in common to be put together; None for one that cannot be."""
    items = list(batch.items()) if isinstance(batch, Mapping) else list(enumerate(batch))
    tensors = [value for _, value in items if isinstance(value, Tensor)]
    sizes = {value.shape[0] if value.dim() else None for value in tensors}
    if len(sizes) != 1 or None in sizes:
        return None
    try:
        return tuple(
            (key, value.shape[1:], value.dtype, value.device)
            if isinstance(value, Tensor)
            else (key, hash(value), value)
            for key, value in items
        )
    except TypeError:  # something that cannot be compared
        return None


def _joined(batches: list) -> Any:
    def join(key: Any) -> Any:
        values = [batch[key] for batch in batches]
        return torch.cat(values) if isinstance(values[0], Tensor) else values[0]

    if isinstance(batches[0], Mapping):
        return {key: join(key) for key in batches[0]}
    return tuple(join(number) for number in range(len(batches[0])))
