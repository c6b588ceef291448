"""New values of a group's tensors: computed first, all of them, then written together."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from intrafusion.groups.batchnorm import row_average
from intrafusion.groups.coefficients import Coefficients
from intrafusion.groups.layout import from_channels, is_finite, mix_, to_channels


@dataclass(frozen=True)
class Mix:
    """The changed part of one side of a pair: `weights` [c, n] for the root channels `places` [c]."""

    weights: Tensor
    places: Tensor

    @classmethod
    def of(cls, weights: Tensor, kept: Tensor) -> Mix:
        """weights: [k, n] one side of a pair; what makes a channel of `kept` [k] of anything but itself is a change."""
        kept = kept.to(weights.device)
        own = weights.gather(1, kept[:, None])[:, 0]
        moved = (own != 1) | (weights.count_nonzero(dim=1) != 1)
        return cls(weights[moved], kept[moved])

    @cached_property
    def coefficients(self) -> Coefficients:
        """The weights, by those that are not zero."""
        return Coefficients.of(self.weights)

    @cached_property
    def average(self) -> Mix:
        """For gains, which multiply what is mixed already: magnitudes that sum to 1."""
        return Mix(row_average(self.weights), self.places)


@dataclass
class Draft:
    """New values of tensors, collected first and written together, so that a failure changes nothing."""

    values: dict[tuple[Any, str], Tensor] = field(default_factory=dict)

    def now(self, owner: Any, attribute: str) -> Tensor:
        """The present value of owner.attribute (a free parameter's attribute is `data`), as precise as it is known."""
        known = self.values.get((owner, attribute))
        return getattr(owner, attribute).detach() if known is None else known

    def of(self, owner: Any, attribute: str) -> Tensor:
        """The present value of owner.attribute in float64."""
        return self.now(owner, attribute).double()

    def put(self, owner: Any, attribute: str, value: Tensor) -> None:
        self.values[owner, attribute] = value

    def set_at(self, owner: Any, attribute: str, at: Tensor, values: Tensor) -> None:
        """New values for the entries `at` of a vector."""
        vector = self.of(owner, attribute).clone()
        vector[at] = values
        self.put(owner, attribute, vector)

    def mix(self, owner: Any, attribute: str, local: Tensor, by: Mix, axis: int, chunks: int) -> None:
        """Mix the channels along one axis of a tensor. local, axis, chunks: as in `kinds.base.Place`."""
        old = self.now(owner, attribute)
        matrix = to_channels(old, axis, chunks).clone()  # in its own precision: it may be half of the network
        device = matrix.device
        mix_(matrix, local.to(device), by.coefficients.to(device), by.places.to(device))
        self.put(owner, attribute, from_channels(matrix, old, axis, chunks))

    def commit(self) -> None:
        """Write all values in the dtype they had. Raises ValueError, and writes none, if one is not finite."""
        ready = []
        for (owner, attribute), value in self.values.items():
            old = getattr(owner, attribute)
            new = value.to(old.dtype)
            if not is_finite(new):
                raise ValueError(f"the fused {attribute} of {type(owner).__name__} would not be finite in {old.dtype}")
            ready.append((owner, attribute, new))
        for owner, attribute, new in ready:
            if isinstance(owner, nn.Parameter) or attribute in owner._buffers:
                setattr(owner, attribute, new)
            else:
                _replace_parameter(owner, attribute, new)


def _replace_parameter(owner: nn.Module, name: str, value: Tensor) -> None:
    old = getattr(owner, name)
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    new.grad = old.grad
    setattr(owner, name, new)
