"""The networks of recipes by name, one's own included, and their layers by name."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from intrafusion.lab.errors import LabError
from intrafusion.lab.named import named_function
from intrafusion.models import LIBRARIES, UnknownModelError, named_model


def build_model(name: str, num_classes: int = 10) -> nn.Module:
    """A network with random weights.

    Args:
        name: a name of :func:`intrafusion.models.named_model`, or ``package.module:factory``, where the factory is
            called as ``factory(num_classes=...)`` and returns an ``nn.Module``.
        num_classes: width of the output.

    Raises:
        LabError: the name is unknown, the library is not installed or the factory fails.
    """
    source, colon, _ = name.partition(":")
    if colon and source not in LIBRARIES:
        return _from_factory(name, num_classes)
    try:
        return named_model(name, num_classes)
    except UnknownModelError as error:
        raise LabError(f"{error}{'' if colon else ', package.module:factory'}") from None


def find_layers(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """The modules whose names match a pattern, by name (``*`` stands for anything, dots included).

    Raises:
        LabError: nothing matches; the message has the convolutions and linear layers with the closest names.
    """
    names = {name: module for name, module in model.named_modules() if name}
    matched = fnmatch.filter(names, pattern)
    if not matched:
        layers = [name for name, module in names.items() if isinstance(module, nn.Conv2d | nn.Linear)]
        raise LabError(f"'{pattern}' matches no layer; {closest(pattern, layers)}")
    return {name: names[name] for name in matched}


def closest(name: str, known: Sequence[str]) -> str:
    """``closest: a, b, c``: at most three of the known names."""
    return f"closest: {', '.join(difflib.get_close_matches(name, known, n=3, cutoff=0.0)) or 'none'}"


def example_input(shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """A fixed batch of one, ``[1, *shape]`` float32, for tracing and for counting operations."""
    return torch.zeros(1, *shape, device=device)


def _from_factory(name: str, num_classes: int) -> nn.Module:
    function = named_function(name)
    try:
        model = function(num_classes=num_classes)
    except Exception as error:
        raise LabError(f"'{name}': the call with num_classes={num_classes} failed: {error}") from error
    if not isinstance(model, nn.Module):
        raise LabError(f"'{name}' returned a {type(model).__name__}, not an nn.Module")
    return model
