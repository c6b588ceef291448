"""Which layers write a residual stream that is only read through norms."""

from __future__ import annotations

import pytest
import torch
import torch_pruning as tp
from torch import nn

from intrafusion.groups.kinds.base import torch_pruners
from intrafusion.groups.streams import joins_normed_stream
from tests.nets import PICO


class PreNorm(nn.Module):
    """stem + a(norm(stem)) + b(norm(...)); `read` says what else reads the stream."""

    def __init__(self, norm: type[nn.Module], read: str) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = (nn.Linear(8, 8) for _ in range(4))
        self.first, self.second, self.last = norm(8), norm(8), norm(8)
        self.read = read

    def forward(self, x):
        x = self.stem(x)
        x = x + self.a(torch.relu(self.first(x)))
        x = x + self.b(torch.relu(self.second(x)))
        return self.head(x if self.read == "the head" else self.last(x))


def graph_of(model: nn.Module, x: torch.Tensor) -> tp.DependencyGraph:
    return tp.DependencyGraph().build_dependency(model, x, verbose=False, customized_pruners=torch_pruners())


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_what_is_added_to_a_stream_that_norms_read_is_found(norm):
    model = PreNorm(norm, "norms")
    graph = graph_of(model, torch.randn(2, 5, 8))
    found = [name for name, layer in model.named_modules() if joins_normed_stream(graph, layer)]
    assert found == ["stem", "a", "b"]


def test_not_where_a_layer_reads_the_stream_itself():
    model = PreNorm(nn.LayerNorm, "the head")
    graph = graph_of(model, torch.randn(2, 5, 8))
    assert not any(joins_normed_stream(graph, layer) for layer in model.modules())


@pytest.mark.parametrize("case", PICO, ids=lambda case: case.name)
def test_batchnorms_are_no_such_norms(case):
    model = case.model()
    if case.name == "mlp":
        pytest.skip("it has a stream of its own")
    graph = graph_of(model, case.example())
    assert not any(joins_normed_stream(graph, layer) for layer in model.modules())
