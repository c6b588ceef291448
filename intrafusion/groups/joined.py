"""Queries, keys and values of one linear layer, where torch-pruning cannot follow how its outputs are parted.

In a network that is pruned such a layer becomes three linear layers in place, whose outputs are joined as they were:
heads that share keys (Phi-3), or that lie beside their own keys and values (GPT-NeoX, Falcon). Its state dict stays as
it was, so that what is saved is loaded into the original class, if that takes the widths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

PARTS = ("q_proj", "k_proj", "v_proj")


class JoinedLinear(nn.Module):
    """Three linear layers that are saved, and loaded, as one, weight [queries + keys + values, inputs].

    The class says in which order. Parameters are new ones, and those of a state dict are copies: make optimizers and
    averages of weights afterwards, and averages of parameters (timm's ModelEma writes into a state dict).
    num_key_value_heads, head_dim: of the keys, as they are now.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    num_key_value_heads: int
    head_dim: int

    @property
    def parts(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return self.q_proj, self.k_proj, self.v_proj

    @property
    def weight(self) -> Tensor:
        return self._joined([part.weight for part in self.parts], 0)

    @property
    def bias(self) -> Tensor | None:
        biases = [part.bias for part in self.parts]
        return None if any(bias is None for bias in biases) else self._joined(biases, 0)

    @property
    def in_features(self) -> int:
        return self.q_proj.in_features

    @property
    def out_features(self) -> int:
        return sum(part.out_features for part in self.parts)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., queries + keys + values]. Raises RuntimeError if the numbers of heads do not fit."""
        return self._joined([part(x) for part in self.parts], -1)

    def _joined(self, parts: Sequence[Tensor], axis: int) -> Tensor:
        if parts[1].shape[axis] != self.num_key_value_heads * self.head_dim:  # they say what the heads are
            told = f"num_key_value_heads={self.num_key_value_heads}, head_dim={self.head_dim}"
            raise RuntimeError(f"keys of {parts[1].shape[axis]} channels do not fit {told}")
        return self.in_order([part.movedim(axis, -1) for part in parts]).movedim(-1, axis)

    def in_order(self, parts: list[Tensor]) -> Tensor:
        """[..., queries], [..., keys] and [..., values] as the one layer gives them."""
        raise NotImplementedError

    def apart(self, joined: Tensor, sizes: list[int]) -> list[Tensor]:
        """The three of a tensor [queries + keys + values, ...], of these sizes."""
        raise NotImplementedError

    def _parted(self, joined: Tensor) -> list[Tensor]:
        """Tensors [queries + keys + values, ...] of the three. Raises RuntimeError for another size."""
        sizes = [part.out_features for part in self.parts]
        if len(joined) != sum(sizes):
            raise RuntimeError(f"{len(joined)} rows, of {sum(sizes)} that queries, keys and values have together")
        return self.apart(joined, sizes)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """As torch's, of one layer."""
        destination = {} if destination is None else destination
        for name, value in (("weight", self.weight), ("bias", self.bias)):
            if value is not None:
                destination[prefix + name] = value if keep_vars else value.detach()
        return destination

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, strict: bool, *told: Any) -> None:
        for name in ("weight", "bias"):
            if prefix + name not in state_dict:
                continue
            try:
                parted = self._parted(state_dict[prefix + name])
            except RuntimeError as error:
                told[-1].append(f"{prefix}{name}: {error}")
                continue
            del state_dict[prefix + name]
            state_dict.update({f"{prefix}{part}.{name}": value for part, value in zip(PARTS, parted, strict=True)})
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *told)


class JoinedByHead(JoinedLinear):
    """For every key its queries, itself and its values (GPT-NeoX, Falcon, BLOOM)."""

    def in_order(self, parts: list[Tensor]) -> Tensor:
        each = [part.unflatten(-1, (self.num_key_value_heads, -1)) for part in parts]
        return torch.cat(each, dim=-1).flatten(-2)

    def apart(self, joined: Tensor, sizes: list[int]) -> list[Tensor]:
        heads = self.num_key_value_heads
        each = joined.unflatten(0, (heads, -1)).split([size // heads for size in sizes], dim=1)
        return [part.flatten(0, 1) for part in each]


class JoinedByPart(JoinedLinear):
    """All queries, then all keys, then all values (Phi-3)."""

    def in_order(self, parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, dim=-1)

    def apart(self, joined: Tensor, sizes: list[int]) -> list[Tensor]:
        return list(joined.split(sizes))


JOINED = (JoinedByHead, JoinedByPart)


def part_(layer: nn.Linear, queries: int, key_heads: int, head_dim: int, kind: type[JoinedLinear]) -> None:
    """Turn a linear layer into three, in place. queries: channels; key_heads, head_dim: of keys and of values."""
    tensors = {name: value for name, value in layer._parameters.items() if value is not None}
    inputs, bias, training = layer.in_features, "bias" in tensors, layer.training
    for name in ("in_features", "out_features"):
        del layer.__dict__[name]
    layer._parameters.clear()
    joined: Any = layer
    joined.__class__ = kind
    joined.num_key_value_heads, joined.head_dim = key_heads, head_dim
    keys = key_heads * head_dim
    for name, outputs in zip(PARTS, (queries, keys, keys), strict=True):
        setattr(joined, name, nn.Linear(inputs, outputs, bias=bias, device="meta").train(training))
    for name, value in tensors.items():
        give_(joined.parts, name, value, joined._parted)


def give_(
    parts: Sequence[nn.Module], name: str, joined: nn.Parameter, apart: Callable[[Tensor], Sequence[Tensor]]
) -> None:
    """Give each part its piece of a parameter, and of its gradient. apart: what makes the pieces."""
    grads = [None] * len(parts) if joined.grad is None else apart(joined.grad)
    for part, own, grad in zip(parts, apart(joined.detach()), grads, strict=True):
        part._parameters[name] = parameter = nn.Parameter(own.clone(), joined.requires_grad)
        parameter.grad = None if grad is None else grad.clone()
