"""Pruned pico networks, and what it means that two networks are the same."""

from __future__ import annotations

import copy
import functools
import warnings

import torch
import torch_pruning as tp
from torch import Tensor, nn

from intrafusion import IntraFusionPruner
from intrafusion.checkpoint import inventory
from tests.nets import PICO, Case

CASES = {case.name: case for case in PICO}


class Tied(nn.Module):
    """An embedding that is also the head, two buffers that are one, and a buffer that no state dict has."""

    def __init__(self, width=8, tie=True):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, width), nn.Linear(width, 11, bias=False)
        self.norm, self.other = nn.LayerNorm(width), nn.LayerNorm(width)
        if tie:
            self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.rand(width), persistent=False)
        self.norm.register_buffer("scale", self.scale)
        self.register_buffer("nothing", None)
        self.register_buffer("empty", torch.empty(0))
        self.factor, self.heads, self.window = width**-0.5, width // 2, [width, 3]

    def forward(self, tokens):
        return self.head(self.norm(self.embed(tokens) * self.scale) * self.factor)


def pruner_of(model: nn.Module, example: Tensor, ignored: list[nn.Module], fusion: str = "discard", **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
        pruner = IntraFusionPruner(
            model,
            example,
            tp.importance.GroupMagnitudeImportance(p=1),
            pruning_ratio=0.5,
            ignored_layers=ignored,
            fusion=fusion,
            **options,
        )
    pruner.step()
    return pruner


@functools.cache
def _pruned(case: Case, fusion: str) -> nn.Module:
    model = case.model()
    pruner_of(model, case.example(), case.ignored(model), fusion)
    return model


def pruned(name: str, fusion: str = "discard") -> nn.Module:
    return copy.deepcopy(_pruned(CASES[name], fusion))


def dense(name: str) -> nn.Module:
    """The architecture, with other weights."""
    torch.manual_seed(7)
    return CASES[name].build()


def state(model: nn.Module) -> dict:
    """Everything that a checkpoint promises to keep."""
    tensors = inventory.tensors_of(model)
    described = {
        name: None if t is None else (kind, t.dtype, t.requires_grad, t.device, t.detach().clone())
        for name, (kind, t) in tensors.items()
    }
    return {"tensors": described, "modules": inventory.modules_of(model), "tied": inventory.shared(tensors)}


def same(a: dict, b: dict) -> bool:
    if (a["modules"], a["tied"], list(a["tensors"])) != (b["modules"], b["tied"], list(b["tensors"])):
        return False
    return all(_equal(one, b["tensors"][name]) for name, one in a["tensors"].items())


def _equal(one, other) -> bool:
    if one is None or other is None:
        return one is other
    left, right = one[-1].cpu().contiguous(), other[-1].cpu().contiguous()
    return one[:-1] == other[:-1] and left.shape == right.shape and torch.equal(_bits(left), _bits(right))


def _bits(tensor: Tensor) -> Tensor:
    """NaN is equal to itself here."""
    return tensor.flatten().view(torch.uint8)


def output(model: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        return model(CASES[name].example().to(next(model.parameters())))


def randomise(model: nn.Module) -> nn.Module:
    """Batch-norms with statistics of their own, in evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()
