"""A pruned network as one ONNX file: batch-norms folded, dynamic batch, and checked against onnxruntime.

Pruning leaves an ordinary network with smaller layers, so `torch.compile` and `torch.export` take it as it is; this
adds what a deployed file should have.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from intrafusion.checkpoint.inventory import unwrap
from intrafusion.files import replacing
from intrafusion.onnx.fold import fold_batchnorms_
from intrafusion.running import copy_of

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class ExportError(RuntimeError):
    """A network cannot be exported, or the exported one gives other outputs; no file was written."""


@dataclass(frozen=True)
class Exported:
    """A file that was written: where, its ONNX opset, how many batch-norms were folded into layers, and the largest
    difference between its outputs and the network's, relative to the largest output."""

    path: Path
    opset: int
    folded: int
    difference: float


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Tensor | tuple | dict[str, Any],
    *,
    dynamic_batch: bool | None = None,
    opset: int | None = None,
    tolerance: float | None = None,
) -> Exported:
    """Write a network in evaluation mode to an ONNX file; the network itself is not changed.

    Batch-norms behind a convolution or a linear layer are folded into it. The file's outputs are compared with those of
    `model`, on the CPU, for the example and (where its length may vary) for a batch with one more sample.

    example_inputs: a tensor, a tuple of arguments or a dictionary of keyword arguments. dynamic_batch: the first axis
    of every input tensor that is as long as that of the first one may have any length; None: unless the network runs on
    no other length than the example's, with a warning. opset: None takes PyTorch's. tolerance: of the largest
    difference, relative to the largest output; None is 1e-4, or what the roundings of a network in half precision come
    to: 1.6e-2 in float16, 0.13 in bfloat16.

    Raises ExportError with the reason if a package is missing, the network does not run, cannot be traced or the file's
    outputs differ, OSError if the file cannot be written; what was at `path` is then still there.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"exporting needs {', '.join(missing)}: pip install 'intrafusion[export]'")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")
    name = type(unwrap(model)).__name__
    network = copy_of(unwrap(model)).cpu().eval().requires_grad_(False)
    trials = _trials(network, _arguments(example_inputs), dynamic_batch)
    args, kwargs = trials.inputs[0]
    tolerance = _tolerance(network, trials.outputs) if tolerance is None else tolerance
    shapes = None if trials.batch is None else _dynamic_shapes(network, args, kwargs, trials.batch)
    try:
        graph: Any = torch.export.export(network, args, kwargs, dynamic_shapes=shapes).module()
        folded = fold_batchnorms_(graph)
        shapes = None if shapes is None else _one_by_one(network, shapes)
        traced = torch.export.export(graph, args, kwargs, dynamic_shapes=shapes)
        program: Any = torch.onnx.export(traced, dynamo=True, opset_version=opset, verbose=False)
    except Exception as error:
        raise ExportError(f"{name} cannot be exported: {_reason(error)}") from error
    with replacing(Path(path)) as temporary:
        _write(program, temporary)
        pairs = zip(trials.inputs, trials.outputs, strict=True)
        difference = _largest([_difference(temporary, *pair) for pair in pairs])
        if not difference <= tolerance:
            raise ExportError(
                f"the exported {name} differs from the network by {difference:.1e} of its largest output, and "
                f"tolerance={tolerance:.1e}"
            )
    return Exported(Path(path), int(program.model.opset_imports[""]), folded, difference)


@dataclass(frozen=True)
class _Trials:
    """Arguments that the network was run on, and what it gave. batch: the length that may vary; None if none may."""

    inputs: list[tuple[tuple, dict[str, Any]]]
    outputs: list[list[Tensor]]
    batch: int | None


def _trials(network: nn.Module, example: tuple[tuple, dict[str, Any]], dynamic_batch: bool | None) -> _Trials:
    fixed = _Trials([example], [_outputs(network, *example)], None)
    if dynamic_batch is False:
        return fixed
    given = _batch_size(*example)
    batch = max(2, given)  # torch.export takes a 1 for a constant
    inputs = [_resized(example, given, size) for size in (batch, batch + 1)]
    try:
        return _Trials(inputs, [_outputs(network, *one) for one in inputs], batch)
    except ExportError as error:
        why = f"{type(network).__name__} runs on the example inputs, but not on a batch of another length"
        if dynamic_batch:
            raise ExportError(f"{why}: give dynamic_batch=False ({error})") from error
        warnings.warn(f"{why}: it is exported for batches of {given} ({error})", stacklevel=3)
        return fixed


def _arguments(example: Any) -> tuple[tuple, dict[str, Any]]:
    """Positional and keyword arguments, with tensors on the CPU. Raises TypeError if there is no tensor."""
    args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
    args = (args,) if isinstance(args, Tensor) else args
    if not isinstance(args, (tuple, list)) or not any(map(_has_batch, pytree.tree_leaves((args, kwargs)))):
        raise TypeError("example_inputs must be a tensor, a tuple of arguments or a dictionary of keyword arguments")
    return pytree.tree_map(
        lambda value: value.detach().cpu() if isinstance(value, Tensor) else value, (tuple(args), dict(kwargs))
    )


def _has_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _batch_size(args: tuple, kwargs: dict[str, Any]) -> int:
    return len(next(filter(_has_batch, pytree.tree_leaves((args, kwargs)))))


def _resized(inputs: Any, batch: int, size: int) -> Any:
    """The inputs with `size` samples: the given ones over and over."""
    chosen = torch.arange(size) % batch
    return pytree.tree_map(lambda t: t[chosen] if _has_batch(t) and len(t) == batch else t, inputs)


def _dynamic_shapes(network: nn.Module, args: tuple, kwargs: dict[str, Any], batch: int) -> Any:
    """By argument, in the order and structure of the arguments."""
    axis = torch.export.Dim("batch", min=1)

    def of(value: Any) -> Any:
        return {0: axis} if _has_batch(value) and len(value) == batch else None

    bound = inspect.signature(network.forward).bind(*args, **kwargs)
    return {key: pytree.tree_map(of, value) for key, value in bound.arguments.items()}


def _one_by_one(network: nn.Module, shapes: dict[str, Any]) -> dict[str, Any]:
    """The same for a network that torch.export has made: what *args and **kwargs take are arguments of their own."""
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(network.forward).parameters.items():
        if name not in shapes:
            continue
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            found.update({f"{name}_{number}": shape for number, shape in enumerate(shapes[name])})
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found.update(shapes[name])
        else:
            found[name] = shapes[name]
    return found


def _reason(error: BaseException) -> str:
    """The first line that says something, of the innermost error."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}"


def _write(program: Any, path: Path) -> None:
    try:
        program.save(path, external_data=False)
    except ValueError as error:
        raise ExportError(f"the network does not fit into one ONNX file, which holds 2 GB: {_reason(error)}") from error


def _tolerance(network: nn.Module, outputs: list[list[Tensor]]) -> float:
    """16 units in the last place of the shortest numbers that the network computes with, but at least 1e-4."""
    tensors = [*network.parameters(), *network.buffers(), *outputs[0]]
    longest = max((torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point()), default=0.0)
    return max(1e-4, 16 * longest)


def _outputs(network: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    try:
        with torch.no_grad():
            outputs = network(*args, **kwargs)
    except Exception as error:
        name = type(network).__name__
        told = f"inputs of {[list(t.shape) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]}"
        raise ExportError(f"{name} does not run on {told}: {_reason(error)}") from error
    tensors = [value for value in pytree.tree_leaves(outputs) if isinstance(value, Tensor)]
    if not tensors:
        raise ExportError(f"{type(network).__name__} gives no tensor")
    return tensors


def _difference(path: Path, inputs: tuple, expected: list[Tensor]) -> float:
    """The largest difference between the outputs of a file and the expected ones, relative to the largest of these."""
    import onnxruntime

    given = [value for value in pytree.tree_leaves(inputs) if isinstance(value, Tensor)]
    try:
        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
        feed = {slot.name: tensor.numpy() for slot, tensor in zip(session.get_inputs(), given, strict=True)}
        found = [torch.from_numpy(value) for value in session.run(None, feed)]
    except Exception as error:
        raise ExportError(f"onnxruntime cannot run the exported network: {_reason(error)}") from error
    if [value.shape for value in found] != [value.shape for value in expected]:
        raise ExportError(f"the exported network gives outputs of other shapes for a batch of {len(given[0])}")
    pairs = [(one.double(), other.double()) for one, other in zip(found, expected, strict=True)]
    return _largest([float((one - other).abs().max() / other.abs().max().clamp(min=1e-30)) for one, other in pairs])


def _largest(values: list[float]) -> float:
    """NaN if there is one, unlike Python's `max`."""
    return float(torch.tensor(values, dtype=torch.float64).max())
