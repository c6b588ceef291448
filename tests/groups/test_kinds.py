"""Layer kinds: each layer has one, its places move as the function allows, its output is a regression on windows."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch_pruning._helpers import _HybridIndex

from intrafusion.groups.kinds.base import Side, kind_of, making_classes, register, torch_pruners
from intrafusion.groups.kinds.convolution import Convolution, Depthwise, Transposed
from intrafusion.groups.kinds.filters import Geometry, filters_of
from intrafusion.groups.kinds.linear import Linear
from intrafusion.groups.permutation_check import class_permutation, reordered
from intrafusion.groups.places import move
from intrafusion.groups.reach import reach
from intrafusion.groups.table import GroupTable, tabulate
from tests.nets import PICO, Case


def groups_of(case: Case) -> tuple[nn.Module, tp.DependencyGraph, list[GroupTable]]:
    model = case.model()
    graph = tp.DependencyGraph().build_dependency(model, (case.example(),), verbose=False)
    roots = [group[0].dep for group in graph.get_all_groups(ignored_layers=case.ignored(model))]
    return model, graph, [tabulate(graph, root.target.module, root.handler) for root in roots]


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.Linear(3, 4), Linear),
        (nn.Conv2d(3, 4, 1), Convolution),
        (nn.Conv2d(4, 4, 1, groups=2), Convolution),
        (nn.Conv2d(4, 4, 1, groups=4), Depthwise),
        (nn.Conv2d(8, 4, 1, groups=4), Convolution),  # one filter a chunk, but of two channels
        (nn.Conv2d(1, 1, 1), Convolution),
        (nn.ConvTranspose1d(4, 6, 1), Transposed),
        (nn.modules.linear.NonDynamicallyQuantizableLinear(3, 4), Linear),
    ],
)
def test_a_layer_is_of_the_kind_of_its_nearest_class(layer: nn.Module, kind: type) -> None:
    assert type(kind_of(layer)) is kind


def test_what_has_no_kind_is_not_guessed_at() -> None:
    assert kind_of(nn.LSTM(3, 4)) is None
    assert kind_of(nn.ReLU()) is None
    with pytest.raises(TypeError, match="LayerNorm is neither a linear layer nor a convolution"):
        filters_of(nn.LayerNorm(4))


def test_groups_begin_at_layers_that_make_channels() -> None:
    assert set(making_classes()) >= {nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.MultiheadAttention}
    assert nn.RMSNorm in torch_pruners()
    assert nn.LayerNorm not in torch_pruners()  # torch-pruning cuts it itself


@pytest.mark.parametrize("case", PICO, ids=lambda case: case.name)
def test_all_groups_may_be_permuted_at_once_and_come_back_as_they_were(case: Case) -> None:
    model, _, tables = groups_of(case)
    x, generator = case.example(), torch.Generator().manual_seed(2)
    before, tensors = model(x), {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    moved = [(table, class_permutation(table.classes, generator)) for table in tables if not table.unsupported]
    with reordered(*moved):
        assert any(not torch.equal(value, model.state_dict()[name]) for name, value in values.items())
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(after[name] is tensor for name, tensor in tensors.items())
    assert all(torch.equal(after[name].detach(), value) for name, value in values.items())


def test_a_failure_inside_puts_every_tensor_back() -> None:
    model, _, tables = groups_of(PICO[1])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="inside"), reordered(*((t, torch.arange(t.n).flip(0)) for t in tables)):
        raise RuntimeError("inside")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("case", PICO, ids=lambda case: case.name)
def test_places_lie_inside_their_tensors_under_the_names_of_the_state(case: Case) -> None:
    model, _, tables = groups_of(case)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for slot in (slot for table in tables for slot in table.slots):
        assert slot.places
        for place in slot.places:
            assert state[place.key] is place.tensor
            assert int(place.local.max()) < place.length(place.tensor)
            assert place.reads == (slot.side is Side.READS)
            assert (place.reader == slot.name) is place.reads


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3, 3), (6, 4, 5)])
def test_moving_two_axes_at_once_is_moving_one_after_the_other(shape: tuple[int, ...]) -> None:
    model = Case("", lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 6)), (3,)).model()
    graph = tp.DependencyGraph().build_dependency(model, (torch.randn(2, 3),))
    rows = tabulate(graph, model[1], tp.prune_linear_out_channels).slots[0].places[0]  # pyright: ignore
    columns = tabulate(graph, model[0], tp.prune_linear_out_channels).slots[1].places[0]  # pyright: ignore
    tensor, orders = torch.randn(shape), (torch.randperm(6), torch.randperm(4))
    wanted = tensor[orders[0]][:, orders[1]]
    assert torch.equal(move(tensor, (rows, orders[0]), (columns, orders[1])), wanted)
    assert torch.equal(move(move(tensor, (columns, orders[1])), (rows, orders[0])), wanted)


def walked(graph: tp.DependencyGraph, root: Any, handler: Any, n: int) -> dict[Any, set[tuple[int, int]]]:
    """Torch-Pruning's own walk, one index object at a time, with every pair kept."""
    start = [_HybridIndex(idx=i, root_idx=i) for i in range(n)]
    pairs: dict[Any, set] = defaultdict(set)
    pairs[root, handler].update(start)
    stack = [(graph.module2node[root], handler, start)]
    while stack:
        node, fn, indices = stack.pop()
        for dep in node.dependencies:
            if dep.is_triggered_by(fn):
                mapped = indices
                for mapping in dep.index_mapping:
                    mapped = mapped if mapping is None else mapping(mapped)  # type: ignore[misc]
                fresh = [index for index in mapped if index not in pairs[dep.target.module, dep.handler]]
                pairs[dep.target.module, dep.handler].update(fresh)
                stack += [(dep.target, dep.handler, fresh)] if fresh else []
    return {key: {(i.idx, i.root_idx) for i in found} for key, found in pairs.items() if found}


class Slices(nn.Module):
    """Every second channel, a part, a concat of parts, a flatten that is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 12, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(8, 5, 1)
        self.fc, self.last = nn.Linear(20, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        p, q = y[:, 2:6], torch.cat([y[:, 8:], y[:, :4]], dim=1)
        z = torch.relu(self.b(p) + self.c(q)).flatten(1)
        return self.last(torch.relu(self.fc(z)) + self.fc(2 * z))


@pytest.mark.parametrize("case", [*PICO, Case("slices", Slices, (3, 2, 2), "last")], ids=lambda case: case.name)
def test_index_tensors_reach_what_index_objects_reach(case: Case) -> None:
    model, graph, tables = groups_of(case)
    assert tables
    for group in graph.get_all_groups(ignored_layers=case.ignored(model)):
        root, n = group[0].dep, len(group[0].idxs)
        wanted = walked(graph, root.target.module, root.handler, n)
        items = reach(graph, root.target.module, root.handler, n)
        assert [(item.owner, item.handler) for item in items] == list(wanted)
        for item in items:
            pairs = {(i, r) for r, row in enumerate(item.local.tolist()) for i in row if i >= 0}
            assert pairs == wanted[item.owner, item.handler]
            sharing = {r for i, r in pairs if sum(i == j for j, _ in pairs) > 1}
            assert set(item.tied.tolist()) == sharing


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(5, 4), (3, 5)),
        (nn.Linear(5, 4), (3, 6, 5)),
        (nn.Conv1d(4, 6, 3, padding=1), (3, 4, 7)),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (3, 4, 7, 7)),
        (nn.Conv2d(4, 6, 3, padding="same", dilation=2), (3, 4, 7, 7)),
        (nn.Conv2d(4, 6, (2, 4), padding="same"), (3, 4, 7, 7)),
        (nn.Conv3d(4, 6, 2, padding=1), (3, 4, 5, 5, 5)),
        (nn.Conv2d(4, 6, 1, stride=2), (3, 4, 7, 7)),
    ],
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
def test_the_output_is_the_weight_times_what_is_read(layer: Any, shape: tuple[int, ...]) -> None:
    kind, x = filters_of(layer), torch.randn(shape)
    assert kind.can_refit(layer)
    call = Geometry() if isinstance(layer, nn.Linear) else Geometry(layer.stride, layer.padding, layer.dilation)
    wanted = layer(x).detach().movedim(kind.channel_axis, -1)
    read = kind.windows(layer, x, call).flatten(wanted.dim() - 1)
    torch.testing.assert_close(read @ layer.weight.detach().flatten(1).T + layer.bias.detach(), wanted)


def test_transposed_and_very_wide_layers_are_not_refitted() -> None:
    for layer in (nn.ConvTranspose2d(3, 4, 2), nn.Linear(9000, 1)):
        assert not filters_of(layer).can_refit(layer)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention = nn.Linear(5, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.embed(x)
        return self.head((y + self.attention(y, y, y, need_weights=False)[0]).mean(1))


def test_attention_can_be_permuted_but_not_merged() -> None:
    torch.manual_seed(0)
    model, x = Attends().eval(), torch.randn(2, 3, 5)
    graph = tp.DependencyGraph().build_dependency(model, (x,))
    table = tabulate(graph, model.embed, tp.prune_linear_out_channels)
    assert "can change places but not be merged" in table.unsupported
    assert table.immovable == ""
    before = model(x)
    with reordered((table, torch.randperm(8))):
        torch.testing.assert_close(model(x), before)


def test_a_kind_that_is_registered_later_wins() -> None:
    class Own(nn.Linear):
        """A class of the user's."""

    class OwnKind(Linear):
        modules = (Own,)

    assert type(kind_of(Own(2, 3))) is Linear
    kind = register(OwnKind())
    assert kind_of(Own(2, 3)) is kind
    assert kind_of(copy.deepcopy(Own(2, 3))) is kind
    assert type(kind_of(nn.Linear(2, 3))) is Linear
