"""A pruned network as one ONNX file: batch-norms folded, dynamic batch, and checked against onnxruntime.

Pruning leaves an ordinary network with smaller layers, so `torch.compile` and `torch.export` take it as it is; this
adds what a deployed file should have.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from intrafusion.checkpoint.inventory import unwrap
from intrafusion.files import replacing
from intrafusion.onnx.fold import fold_batchnorms_

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
    dynamic_batch: bool = True,
    opset: int | None = None,
    tolerance: float = 1e-4,
) -> Exported:
    """Write a network in evaluation mode to an ONNX file; the network itself is not changed.

    Batch-norms behind a convolution or a linear layer are folded into it. The file's outputs are compared with those of
    `model`, on the CPU, for the example and (with dynamic_batch) for a batch with one more sample.

    example_inputs: a tensor, a tuple of arguments or a dictionary of keyword arguments. dynamic_batch: the first axis
    of every input tensor that is as long as that of the first one may have any length. opset: None takes PyTorch's.
    tolerance: of the largest difference, relative to the largest output.

    Raises ExportError with the reason if a package is missing, the network does not run, cannot be traced or the file's
    outputs differ, OSError if the file cannot be written; what was at `path` is then still there.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"exporting needs {', '.join(missing)}: pip install 'intrafusion[export]'")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")
    name = type(unwrap(model)).__name__
    network = copy.deepcopy(unwrap(model)).cpu().eval().requires_grad_(False)
    args, kwargs = _arguments(example_inputs)
    batch = _batch_size(args, kwargs)
    if dynamic_batch and batch == 1:  # torch.export takes a 1 for a constant
        args, kwargs = _resized((args, kwargs), batch, 2)
        batch = 2
    trials = [(args, kwargs)]
    if dynamic_batch:
        trials.append(_resized((args, kwargs), batch, batch + 1))
    outputs = [_outputs(network, *trial) for trial in trials]
    shapes = _dynamic_shapes(network, args, kwargs, batch) if dynamic_batch else None
    try:
        graph: Any = torch.export.export(network, args, kwargs, dynamic_shapes=shapes).module()
        folded = fold_batchnorms_(graph)
        traced = torch.export.export(graph, args, kwargs, dynamic_shapes=shapes)
        program: Any = torch.onnx.export(traced, dynamo=True, opset_version=opset, verbose=False)
    except Exception as error:
        raise ExportError(f"{name} cannot be exported: {_reason(error)}") from error
    with replacing(Path(path)) as temporary:
        _write(program, temporary)
        difference = _largest([_difference(temporary, *pair) for pair in zip(trials, outputs, strict=True)])
        if not difference <= tolerance:
            raise ExportError(f"the exported {name} differs from the network by {difference:.1e} of its largest output")
    return Exported(Path(path), int(program.model.opset_imports[""]), folded, difference)


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


def _outputs(network: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[Tensor]:
    try:
        with torch.no_grad():
            outputs = network(*args, **kwargs)
    except Exception as error:
        name = type(network).__name__
        raise ExportError(f"{name} does not run on the example inputs: {_reason(error)}") from error
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
