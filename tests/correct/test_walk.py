"""Networks that walk forward together: nothing is computed twice, whatever the depth, and memory has a bound."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch_pruning as tp
from torch import nn

from intrafusion import IntraFusionPruner
from intrafusion.correct.parking import Live
from intrafusion.correct.walk import Walk
from intrafusion.running import merged
from tests.nets import randomise_


def chain(depth: int, width: int = 8) -> nn.Sequential:
    blocks = [
        nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()) for _ in range(depth)
    ]
    stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
    return randomise_(nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))).eval()


def pruner_of(model: nn.Module, batches: list[torch.Tensor], **kwargs) -> IntraFusionPruner:
    metric = tp.importance.GroupMagnitudeImportance(p=1)
    pruner = IntraFusionPruner(
        model, batches[0][:1], metric, pruning_ratio=0.5, ignored_layers=[list(model.modules())[-1]],
        fusion="calibrated", calibration=batches, **kwargs,
    )  # fmt: skip
    pruner.progress = False
    return pruner


class Counted:
    """Counts how many inputs every layer's module is called with."""

    def __init__(self, monkeypatch):
        self.inputs = 0
        forward = nn.Conv2d._conv_forward

        def counted(layer, inputs, weight, bias):
            self.inputs += len(inputs)
            return forward(layer, inputs, weight, bias)

        monkeypatch.setattr(nn.Conv2d, "_conv_forward", counted)


def test_the_number_of_passes_does_not_grow_with_the_depth(monkeypatch):
    """Every layer: the dense network's survey and walk, the pruned one's walk, and what looks at the example."""
    batches = [torch.randn(20, 3, 6, 6) for _ in range(2)]
    monkeypatch.setattr("intrafusion.prune.inputs.synthetic_count", lambda *_: 0)
    per_layer = []
    for depth in (3, 6, 12):
        pruner = pruner_of(chain(depth), batches)
        counted = Counted(monkeypatch)
        pruner.step()
        per_layer.append(counted.inputs / (depth + 1))
        monkeypatch.undo()
        monkeypatch.setattr("intrafusion.prune.inputs.synthetic_count", lambda *_: 0)
    images = sum(map(len, batches))
    assert max(per_layer) == pytest.approx(min(per_layer), rel=0.01)
    assert 3 * images <= per_layer[0] <= 4 * images


def test_a_walk_sees_what_the_layers_see_and_changes_nothing():
    model, x = chain(3), [torch.randn(4, 3, 6, 6), torch.randn(2, 3, 6, 6)]
    twin = copy.deepcopy(model)
    layers = {"0.0": "0.1", "1.0": "1.1", "2.0": "2.1", "3.0": "3.1", "6": ""}
    walk = Walk((model, twin), lambda network, batch: network(batch), x, layers)
    names = []
    while (name := walk.advance()) is not None:
        names.append(name)
        for (first, second), batch in zip(walk.sights(), x, strict=True):
            assert torch.equal(first.inputs, second.inputs)
            assert torch.equal(first.output, second.output)
            assert len(first.inputs) == len(batch)
    assert names == list(layers)
    assert walk.is_at_last
    assert len(walk.sights()) == 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_what_the_rest_of_the_pass_reads_is_what_the_layer_gives_now():
    model, x = chain(2), [torch.randn(4, 3, 6, 6)]
    twin = copy.deepcopy(model)
    walk = Walk((model, twin), lambda network, batch: network(batch), x, {"0.0": "0.1", "1.0": "1.1"})
    walk.advance()
    twin[0][0].weight = nn.Parameter(2 * twin[0][0].weight)
    walk.changed()
    walk.advance()
    ((_, now),) = walk.sights()
    with torch.no_grad():
        assert torch.allclose(now.inputs, twin[0](x[0]), atol=1e-6)
    walk.close()


def test_a_bound_on_memory_changes_nothing_but_where_things_lie(monkeypatch, tmp_path):
    """Every activation but those of one pass goes to a file and comes back: the same network, bit for bit."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("intrafusion.prune.inputs.synthetic_count", lambda *_: 0)
    batches = [torch.randn(40, 3, 6, 6, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    parked, states = [], []
    park = Live.park

    def counted(self, foreign, folder):
        park(self, foreign, folder)
        parked.append(sum(file.stat().st_size for file in folder.iterdir()))

    monkeypatch.setattr(Live, "park", counted)
    for limit in (None, 1e-6):
        torch.manual_seed(0)
        model = chain(3)
        pruner = pruner_of(model, batches, memory_limit=limit)
        pruner.step()
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        assert bool(parked) == (limit is not None)
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    gc.collect()
    assert list(tmp_path.iterdir()) == []  # nothing is left behind
    assert max(parked) > 40 * 4


@pytest.mark.parametrize("limit", [0, -1, "2", True])
def test_a_bound_that_means_nothing_is_refused(limit):
    with pytest.raises(ValueError, match=r"memory_limit is .*: it must be a number of GiB"):
        pruner_of(chain(2), [torch.randn(4, 3, 6, 6)], memory_limit=limit)


def test_many_small_batches_are_put_together_where_that_means_nothing_else():
    ones = [(torch.full((1, 3), float(i)), 7) for i in range(50)]
    together = merged(ones)
    assert len(together) <= 16
    assert torch.equal(torch.cat([batch[0] for batch in together]), torch.cat([batch[0] for batch in ones]))
    assert all(batch[1] == 7 for batch in together)
    named = merged([{"x": torch.ones(2, 3), "mask": torch.ones(2, 1)} for _ in range(20)])
    assert named[0]["x"].shape == (4, 3)
    for apart in (
        ones[:10],
        [(torch.ones(1, 3 + i % 2),) for i in range(50)],
        [(torch.ones(1, 3), torch.ones(2)) for _ in range(50)],
        [(torch.ones(1, 3), i) for i in range(50)],
    ):
        assert merged(apart) is apart
