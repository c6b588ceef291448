"""The slot table: which layer, which side, which channels, and who may mix with whom."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch_pruning as tp
from torch import nn

from intrafusion import IntraFusionPruner
from intrafusion.groups.kinds.base import Side
from intrafusion.groups.layout import from_channels, gather, mix_, to_channels
from intrafusion.groups.table import tabulate
from tests.nets import Concat, Grouped, Plain, Residual


def table_of(model: nn.Module, layer: nn.Module, shape, groups=1):
    model.eval()
    graph = tp.DependencyGraph().build_dependency(model, (torch.randn(1, *shape),), verbose=False)
    return tabulate(graph, layer, graph.get_pruner_of_module(layer).prune_out_channels, groups)


def sides(table) -> set[tuple[str, Side]]:
    return {(slot.name, slot.side) for slot in table.slots}


def test_a_plain_group():
    model = Plain()
    table = table_of(model, model.conv1, (3, 8, 8))
    assert sides(table) == {("conv1", Side.MAKES), ("bn1", Side.PASSES), ("conv2", Side.READS)}
    assert table.classes.unique().numel() == 1
    assert next(slot for slot in table.slots if slot.produces).partner is model.bn1


def test_a_flatten_gives_every_channel_several_columns():
    model = Plain()
    (consumer,) = [s for s in table_of(model, model.conv2, (3, 8, 8)).slots if s.reads]
    assert consumer.local.tolist() == [[4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3] for i in range(6)]


def test_a_residual_stream_has_many_producers_and_a_layer_on_both_sides():
    model = Residual()
    table = table_of(model, model.stem, (3, 6, 6))
    assert {("stem", Side.MAKES), ("b", Side.MAKES), ("c", Side.MAKES)} <= sides(table)
    assert {("a", Side.READS), ("c", Side.READS), ("fc", Side.READS)} <= sides(table)
    assert ("scale", Side.PASSES) in sides(table)


def test_a_concat_covers_part_of_a_batchnorm():
    model = Concat()
    table = table_of(model, model.b, (3, 6, 6))
    local = {slot.name: slot.local.flatten().tolist() for slot in table.slots}
    assert local["bn"] == [6, 7, 8, 9]
    assert local["c"] == [6, 7, 8, 9]


def test_a_consumer_that_reads_a_tensor_twice_has_two_columns_for_each_channel():
    model = Concat()
    (consumer,) = [s for s in table_of(model, model.c, (3, 6, 6)).slots if s.name == "d"]
    assert consumer.local.tolist() == [[i, i + 6] for i in range(6)]


def test_channels_of_different_chunks_are_in_different_classes():
    model = Grouped()
    assert table_of(model, model.a, (3, 6, 6), groups=2).classes.tolist() == [0] * 4 + [1] * 4
    assert table_of(model, model.b, (3, 6, 6)).classes.tolist() == [0] * 4 + [1] * 4


class Split(nn.Module):
    """Two consumers read different parts of one producer."""

    def __init__(self):
        super().__init__()
        self.a, self.left, self.right = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(4, 5, 1)

    def forward(self, x):
        left, right = torch.split(self.a(x), 4, dim=1)
        return self.left(left) + self.right(right)


def test_halves_of_a_split_never_mix():
    model = Split()
    table = table_of(model, model.a, (3, 4, 4))
    classes = table.classes
    assert set(classes[:4].tolist()).isdisjoint(classes[4:].tolist())


class SharedConsumer(nn.Module):
    """One consumer reads both halves: their channels are tied to each other, two by two."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 5, 1)

    def forward(self, x):
        left, right = self.a(x).chunk(2, dim=1)
        return self.b(left) + self.b(right)


def test_channels_that_share_a_column_are_alone():
    model = SharedConsumer()
    assert table_of(model, model.a, (3, 4, 4)).classes.unique().numel() == 8


@pytest.mark.filterwarnings("ignore::intrafusion.WorseThanCut")  # what both calls of a layer lose adds up
def test_a_group_without_anything_to_mix_is_discarded_and_says_so():
    model = SharedConsumer().eval()
    pruner = IntraFusionPruner(
        model,
        torch.randn(1, 3, 4, 4),
        tp.importance.GroupMagnitudeImportance(p=1),
        pruning_ratio=0.25,
        ignored_layers=[model.b],
    )
    pruner.step()
    (group,) = pruner.report.groups
    assert "not transported to any kept channel" in group.reason
    assert model(torch.randn(1, 3, 4, 4)).shape == (1, 5, 4, 4)


@pytest.mark.parametrize(
    ("shape", "axis", "chunks", "channels"),
    [
        ((6,), 0, 1, 6),
        ((6, 5, 3, 3), 0, 1, 6),
        ((6, 5, 3, 3), 1, 1, 5),
        ((6, 2, 3, 3), 1, 3, 6),
        ((8, 3), 1, 2, 6),
        ((4, 5), -1, 1, 5),
    ],
)
def test_layouts_invert_each_other(shape, axis, chunks, channels):
    weight = torch.randn(shape)
    matrix = to_channels(weight, axis, chunks)
    assert matrix.shape[0] == channels
    assert matrix.numel() == weight.numel()
    assert torch.equal(from_channels(matrix, weight, axis, chunks), weight)


def test_a_grouped_convolution_cut_to_one_filter_a_group_is_not_depthwise():
    model = Grouped().eval()
    x = torch.randn(2, 3, 6, 6)
    graph = tp.DependencyGraph().build_dependency(model, x)
    graph.get_pruning_group(model.b, tp.prune_conv_out_channels, [0, 1, 2, 4, 5, 6]).prune()
    assert (model.b.groups, model.b.out_channels, model.b.in_channels) == (2, 2, 8)
    table = tabulate(graph, model.a, tp.prune_conv_out_channels)
    slot = next(slot for slot in table.slots if slot.name == "b")
    assert (slot.side, slot.size, slot.chunks) == (Side.READS, 8, 2)


def test_columns_of_a_grouped_convolution_are_those_that_read_the_channel():
    """Silencing row c of the layout is silencing input channel c."""
    conv, x = nn.Conv2d(6, 4, 1, groups=2, bias=False), torch.randn(1, 6, 3, 3)
    for channel in range(6):
        muted = x.clone()
        muted[:, channel] = 0
        matrix = to_channels(conv.weight.detach(), 1, 2).clone()
        matrix[channel] = 0
        weight = from_channels(matrix, conv.weight, 1, 2)
        assert torch.allclose(nn.functional.conv2d(x, weight, groups=2), conv(muted), atol=1e-6)


def test_mixing_reads_everything_before_it_writes():
    matrix = torch.arange(6.0).reshape(3, 2).double()
    swap = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]).double()
    mix_(matrix, torch.arange(3)[:, None], swap, torch.tensor([0, 1]))
    assert matrix.tolist() == [[2.0, 3.0], [0.0, 1.0], [4.0, 5.0]]


def test_missing_copies_are_zero_and_are_not_written():
    local = torch.tensor([[0, 1], [2, -1]])
    matrix = torch.arange(3.0)[:, None].double() + 1
    assert gather(matrix, local).tolist() == [[1.0, 2.0], [3.0, 0.0]]
    mix_(matrix, local, torch.eye(2, dtype=torch.float64) * 2, torch.arange(2))
    assert matrix.flatten().tolist() == [2.0, 4.0, 6.0]


class CrossedSplit(nn.Module):
    """Torch-Pruning gives the two parts of this split to the wrong readers."""

    def __init__(self):
        super().__init__()
        self.a, self.s, self.t = nn.Conv2d(3, 12, 1), nn.Conv2d(6, 5, 1), nn.Conv2d(6, 5, 1)

    def forward(self, x):
        half = self.a.out_channels // 2
        p, q = torch.split(torch.relu(self.a(x)), [half, half], dim=1)
        return 2 * self.s(p) + self.t(q)


def test_a_graph_that_does_not_describe_the_network_is_found_out():
    torch.manual_seed(0)
    model, x = CrossedSplit().eval(), torch.randn(2, 3, 4, 4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    metric = tp.importance.GroupMagnitudeImportance(p=1)
    pruner = IntraFusionPruner(model, x, metric, ignored_layers=[model.s, model.t], out_channel_groups={model.a: 2})
    inconsistent = pruner.inconsistent_groups()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    if not inconsistent:
        pytest.skip("this torch-pruning maps split outputs correctly")
    with pytest.warns(UserWarning, match="index map does not describe the network"):
        pruner.step()
    assert [group.merged for group in pruner.report.groups] == ["selection"]


def test_a_graph_that_describes_the_network_is_trusted():
    for model, shape in ((Plain(), (3, 8, 8)), (Residual(), (3, 6, 6)), (Grouped(), (3, 6, 6))):
        metric = tp.importance.GroupMagnitudeImportance(p=1)
        with pytest.warns(UserWarning, match="Unwrapped") if isinstance(model, Residual) else contextlib.nullcontext():
            pruner = IntraFusionPruner(model, torch.randn(1, *shape), metric)
        assert pruner.inconsistent_groups() == frozenset()
