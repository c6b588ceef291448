"""A residual stream that is read through norms is turned to its principal directions before it is cut."""

import copy

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

from intrafusion import IntraFusionPruner
from intrafusion.correct.streams import Rotation, may_be_turned, stream_moments
from intrafusion.groups.apply import apply_pair
from intrafusion.groups.streams import stream_of, untie_
from intrafusion.groups.table import tabulate
from intrafusion.running import run_model, tensors_in

WIDTH = 12


class MyRMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Residual(nn.Module):
    """Feed-forward blocks on a stream, each behind a norm with gains (and shifts) of its own."""

    def __init__(self, norm, blocks: int = 2, tied: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, WIDTH)
        self.norms = nn.ModuleList(norm(WIDTH) for _ in range(blocks))
        self.up = nn.ModuleList(nn.Linear(WIDTH, 16) for _ in range(blocks))
        self.down = nn.ModuleList(nn.Linear(16, WIDTH) for _ in range(blocks))
        self.last = norm(WIDTH)
        self.scores = nn.Linear(WIDTH, 20, bias=not tied)
        if tied:
            self.scores.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(F.silu(up(norm(x))))
        return self.scores(self.last(x))


def residual(norm, cls=Residual, **options) -> Residual:
    torch.manual_seed(0)
    model = cls(norm, **options).eval()
    with torch.no_grad():
        for one in (*model.norms, model.last):
            for parameter in one.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def ids(count: int = 64) -> Tensor:
    return torch.randint(20, (count, 7), generator=torch.Generator().manual_seed(3))


def pruner_of(model: nn.Module, fusion: str, ratio: float, **options) -> IntraFusionPruner:
    given = [ids()] if fusion == "calibrated" else None
    metric = tp.importance.GroupMagnitudeImportance(p=1)
    ignored = [model.scores, *model.up]
    return IntraFusionPruner(
        model, ids(1), metric, pruning_ratio=ratio, ignored_layers=ignored, fusion=fusion, calibration=given, **options
    )


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm, MyRMSNorm])
@pytest.mark.parametrize("tied", [False, True])
def test_a_stream_that_is_turned_and_not_cut_leaves_the_function_unchanged(norm, tied):
    model = residual(norm, tied=tied)
    before = model(ids())
    graph = pruner_of(model, "discard", 0.0).DG
    root = model.down[0]
    table = tabulate(graph, root, tp.prune_linear_out_channels)
    if tied:
        assert stream_of(graph, table) is None
        assert untie_(model, {owner for owner, _ in table.reach})
        table = tabulate(graph, root, tp.prune_linear_out_channels)
    stream = stream_of(graph, table)
    assert stream is not None
    assert stream.centred == (norm is nn.LayerNorm)
    assert may_be_turned(stream, graph, lambda network: [network(ids())])
    moments = stream_moments(stream, copy.deepcopy(model), run_model, [(ids(),)])
    rotation = Rotation(stream, moments, torch.arange(WIDTH))
    rotation.before_(graph, table)
    assert torch.allclose(model(ids()), before, atol=1e-4, rtol=1e-4)
    apply_pair(table, rotation.pair)
    rotation.after_(graph, table)
    assert not torch.equal(model.down[0].weight, residual(norm, tied=tied).down[0].weight)
    assert torch.allclose(model(ids()), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
@pytest.mark.parametrize("fusion", ["calibrated", "data-free"])
def test_directions_that_nobody_writes_leave_without_a_trace(norm, fusion):
    model = residual(norm)
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)))[0][:5]
    with torch.no_grad():
        model.tokens.weight.copy_(model.tokens.weight @ basis.T @ basis)
        for down in model.down:
            down.weight.copy_(basis.T @ basis @ down.weight)
            down.bias.copy_(basis.T @ basis @ down.bias)
    before = model(ids())
    pruner = pruner_of(model, fusion, 0.5)
    pruner.step()
    assert model.down[0].out_features == 6  # five directions, and one for the mean of a layer-norm
    assert (model(ids()) - before).norm() < 2e-3 * before.norm()
    assert [group.merged for group in pruner.report.groups] == [fusion]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm, MyRMSNorm])
def test_turning_is_better_than_cutting(norm, tied):
    """Tied scores have no bias that could take over a shift of the last norm."""
    errors = {}
    for fusion in ("discard", "calibrated"):
        model = residual(norm, tied=tied)
        before = model(ids())
        pruner_of(model, fusion, 0.25).step()
        errors[fusion] = (model(ids()) - before).norm().item()
    assert errors["calibrated"] < 0.8 * errors["discard"]


def test_tied_embeddings_get_weights_of_their_own():
    model = residual(nn.RMSNorm, tied=True)
    before = model(ids())
    pruner_of(model, "calibrated", 0.25).step()
    assert model.scores.weight is not model.tokens.weight
    assert model.scores.weight.shape == model.tokens.weight.shape == (20, 9)
    assert (model(ids()) - before).norm() < 0.5 * before.norm()


class Raw(Residual):
    """Something reads the stream without a norm."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + self.up[0](self.tokens(tokens)).mean()


class Shown(Residual):
    """What a norm gives is an output."""

    def forward(self, tokens: Tensor):
        return super().forward(tokens), self.norms[0](self.tokens(tokens))


class Met(Residual):
    """What a norm gives meets something else before it is read."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        return self.scores(self.last(x + self.down[0](F.silu(self.up[0](self.norms[0](x) * 2 + x)))))


@pytest.mark.parametrize("cls", [Raw, Shown, Met])
def test_a_stream_that_is_seen_otherwise_is_not_turned(cls):
    model = residual(nn.RMSNorm, cls=cls)
    graph = pruner_of(model, "discard", 0.0).DG
    stream = stream_of(graph, tabulate(graph, model.down[0], tp.prune_linear_out_channels))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert stream is None or not may_be_turned(stream, graph, lambda network: list(tensors_in(network(ids()))))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Summed(Residual):
    """A width that two streams must have in common, seen only when both are cut."""

    def forward(self, tokens: Tensor) -> Tensor:
        return self.scores(self.last(self.tokens(tokens).reshape(*tokens.shape, len(self.last.weight) + 1)))


def test_a_stream_of_a_network_that_does_not_run_yet_is_not_turned():
    model = residual(nn.RMSNorm)
    graph = pruner_of(model, "discard", 0.0).DG
    stream = stream_of(graph, tabulate(graph, model.down[0], tp.prune_linear_out_channels))
    model.__class__ = Summed
    assert not may_be_turned(stream, graph, lambda network: list(tensors_in(network(ids()))))
