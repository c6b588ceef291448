"""`Conv1D` of transformers (GPT-2): a linear layer whose weight is stored the other way round, [inputs, outputs].

In a network that is pruned such layers become linear layers in place, which everything else knows: torch-pruning, the
refit, exporters. Their state dict stays as it was, so that what is saved is loaded into the original classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class TransposedLinear(nn.Linear):
    """A linear layer, weight [outputs, inputs], that is saved and loaded as [inputs, outputs]."""

    @property
    def nf(self) -> int:
        """What the original class calls the number of outputs."""
        return self.out_features

    @property
    def nx(self) -> int:
        return self.in_features

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = destination[f"{prefix}weight"].T.contiguous()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        key = f"{prefix}weight"
        if key in state_dict:
            state_dict = {**state_dict, key: state_dict[key].T}
        super()._load_from_state_dict(state_dict, prefix, *args)


def as_linear_(model: nn.Module) -> list[str]:
    """Turn every layer of a network that computes x W + b, and is called Conv1D, into a linear layer; their names."""
    found: list[tuple[str, Any]] = [(name, module) for name, module in model.named_modules() if _is_conv1d(module)]
    for _, module in found:
        weight = module._parameters["weight"]
        outputs, inputs = weight.shape[1], weight.shape[0]
        for name in ("nf", "nx"):
            module.__dict__.pop(name, None)
        module.__class__ = TransposedLinear
        module.in_features, module.out_features = inputs, outputs
        module._parameters["weight"] = nn.Parameter(weight.detach().T.contiguous(), weight.requires_grad)
    return [name for name, _ in found]


def _is_conv1d(module: Any) -> bool:
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if type(module).__name__ != "Conv1D" or weight is None or bias is None or weight.dim() != 2:
        return False
    if bias.shape != weight.shape[1:] or module._modules or module._buffers:
        return False
    if weight.is_meta:
        return True
    x = torch.randn(2, len(weight), generator=torch.Generator().manual_seed(0)).to(weight)
    with torch.no_grad():
        return torch.allclose(module(x), x @ weight + bias, atol=1e-4, rtol=1e-3)
