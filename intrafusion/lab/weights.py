"""Network weights in safetensors files: no pickles, every mismatch named."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from intrafusion.lab.errors import LabError
from intrafusion.lab.files import write_atomic

_SHOWN = 6
_OPTIONAL = "num_batches_tracked"


def load_weights_(model: nn.Module, path: Path) -> None:
    """Fill ``model`` from a safetensors file in place; half-precision tensors become float32.

    Raises:
        LabError: the file is missing, truncated or no safetensors file; keys are missing or unknown; a shape
            differs; a value is not finite. The file, the keys and both shapes are named, and the network is
            unchanged.
    """
    given = _read(path)
    expected = model.state_dict()
    problems: list[str] = []
    missing = [key for key in expected if key not in given and not key.endswith(_OPTIONAL)]
    if missing:
        problems.append(f"missing from the file: {_listed(missing)}")
    unknown = [key for key in given if key not in expected]
    if unknown:
        problems.append(f"in the file but not in the network: {_listed(unknown)}")
    shapes = [
        f"{key} is {_shape(tensor)} in the file, {_shape(expected[key])} in the network"
        for key, tensor in given.items()
        if key in expected and tensor.shape != expected[key].shape
    ]
    if shapes:
        problems.append(f"shapes differ: {_listed(shapes)}")
    broken = [key for key, tensor in given.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        problems.append(f"values that are not finite: {_listed(broken)}")
    if problems:
        raise LabError(f"{path} does not fit {type(model).__name__}:\n  " + "\n  ".join(problems))
    floats = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in given.items()}
    model.load_state_dict(floats, strict=False)


def save_weights(model: nn.Module, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write the state dict of ``model`` to a safetensors file, in one step.

    Raises:
        OSError: the folder cannot be written.
    """
    write_atomic(path, to_bytes(model, metadata))


def to_bytes(model: nn.Module, metadata: dict[str, str] | None = None) -> bytes:
    """The state dict of ``model`` as a safetensors file; tied weights are written once per key."""
    from safetensors.torch import save

    contiguous = torch.contiguous_format
    state = {key: tensor.detach().cpu().clone(memory_format=contiguous) for key, tensor in model.state_dict().items()}
    return save(state, metadata or {})


def read_metadata(path: Path) -> dict[str, str]:
    """The text pairs stored in a safetensors file; empty if the file is missing or unreadable."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def digest(model: nn.Module) -> str:
    """Sixteen hexadecimal digits that change whenever any key, shape or value of the state dict does."""
    total = hashlib.sha256()
    for key, tensor in model.state_dict().items():
        total.update(f"{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
        total.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise LabError(f"no weights file at {path}")
    try:
        return load_file(str(path))
    except SafetensorError as error:
        raise LabError(f"{path} is truncated or not a safetensors file ({error})") from None


def _listed(entries: Sequence[str]) -> str:
    more = f", and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
    return ", ".join(entries[:_SHOWN]) + more


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
