"""Refitting a layer: it undoes a distortion of its inputs, and says which layers it can do it for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from intrafusion.correct.refit import RowMap, _Folds, can_refit, refit_
from intrafusion.correct.sensitivity import sensitivities
from intrafusion.correct.walk import Walk
from tests.nets import randomise_


def sights(dense, pruned, name, batches, bn=""):
    """What both networks see at one layer, batch by batch."""
    walk = Walk((dense.eval(), pruned.eval()), lambda model, x: model(x), batches, {name: bn})
    walk.advance()
    found = list(walk.sights())
    walk.close()
    return found


@pytest.mark.parametrize("affine", [True, False])
def test_a_layer_behind_a_distorted_one_gets_the_dense_output_back(affine):
    """The inputs are stretched and mixed by an invertible map: the refitted layer undoes it exactly."""
    dense = randomise_(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5, affine=affine))
    )
    pruned = copy.deepcopy(dense)
    stretch = torch.randn(4, 4) + 2 * torch.eye(4)
    pruned[0].weight.data = torch.einsum("ij,jkab->ikab", stretch, pruned[0].weight.data)
    pruned[0].bias.data = stretch @ pruned[0].bias.data
    batches = [torch.randn(16, 3, 9, 9) for _ in range(4)]
    want = dense(batches[0])
    before = (want - pruned(batches[0])).abs().max()
    done = refit_(
        pruned[1], pruned[2], dense[1], dense[2], sights(dense, pruned, "1", batches, "2"), RowMap.identity(5)
    )
    assert done
    assert (want - pruned(batches[0])).abs().max() < 0.05 * before
    if affine:  # the batch-norm is real: training mode starts from the same function
        together = torch.cat(batches)
        calm, busy = pruned.eval()(together), pruned.train()(together)
        assert (calm - busy).abs().max() < 0.02 * calm.abs().max()


@pytest.mark.parametrize("groups", [2, 4])
def test_a_grouped_layer_behind_a_distorted_one_gets_the_dense_output_back(groups):
    """Every channel is stretched and shifted by itself, which a grouped layer can undo within its groups."""
    dense = randomise_(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, groups=groups), nn.BatchNorm2d(8)))
    pruned = copy.deepcopy(dense)
    pruned[0].weight.data *= torch.tensor([0.5, 2.0, -3.0, 1.0])[:, None, None, None]
    pruned[0].bias.data += torch.tensor([1.0, 0.0, -2.0, 3.0])
    batches = [torch.randn(16, 3, 9, 9) for _ in range(4)]
    want, before = dense(batches[0]), pruned(batches[0])
    assert refit_(
        pruned[1], pruned[2], dense[1], dense[2], sights(dense, pruned, "1", batches, "2"), RowMap.identity(8)
    )
    assert (want - pruned(batches[0])).abs().max() < 0.02 * (want - before).abs().max()


def test_a_layer_whose_inputs_did_not_change_is_left_alone():
    dense = randomise_(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3)))
    pruned = copy.deepcopy(dense)
    before = pruned[1].weight
    batches = [torch.randn(4, 3, 9, 9)]
    assert not refit_(pruned[1], None, dense[1], None, sights(dense, pruned, "1", batches), RowMap.identity(5))
    assert pruned[1].weight is before


class Noisy(nn.Module):
    """A layer of which only some inputs, `kept`, are left; what makes them is off by as much as they are large."""

    def __init__(self, kept: torch.Tensor, off: float) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 5)
        self.kept, self.off = kept, off

    def forward(self, x):
        return self.layer(x[:, self.kept] + self.off * torch.sin(37 * x[:, self.kept]))


def test_where_inputs_say_little_the_dense_network_says_how_those_that_are_kept_make_the_rest():
    """Half of the inputs are sums of the others: told so by the dense network, few and noisy inputs do no harm."""
    every, kept = torch.arange(8), torch.arange(4)
    dense = Noisy(every, 0.0)
    batches = [torch.randn(14, 4) @ torch.cat([torch.eye(4), torch.randn(4, 4)], dim=1) for _ in range(2)]
    mixed = torch.linalg.lstsq(torch.cat(batches)[:, :4], torch.cat(batches)[:, 4:]).solution
    weight = dense.layer.weight.detach()
    exact = weight[:, :4] + weight[:, 4:] @ mixed.T
    errors = []
    for told in (kept, None):
        pruned = Noisy(kept, 0.7)
        pruned.layer = copy.deepcopy(dense.layer)
        pruned.layer.weight = nn.Parameter(weight[:, :4].clone())
        seen = sights(dense, pruned, "layer", batches)
        assert refit_(pruned.layer, None, dense.layer, None, seen, RowMap.identity(5), kept=told)
        errors.append(float((pruned.layer.weight.detach() - exact).norm() / exact.norm()))
    assert errors[0] < 0.7 * errors[1]


def test_inputs_that_somebody_else_has_cut_are_no_trouble():
    dense, pruned, batches = Noisy(torch.arange(8), 0.0), Noisy(torch.arange(4), 0.7), [torch.randn(40, 8)]
    pruned.layer = nn.Linear(4, 5)
    seen = sights(dense, pruned, "layer", batches)
    assert refit_(pruned.layer, None, dense.layer, None, seen, RowMap.identity(5), kept=torch.arange(6))
    assert pruned.layer.weight.shape == (5, 4)


class Stream(nn.Module):
    """Two maps added to a stream, which a norm reads; the first token of a sequence is a hundred times the others."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.norm, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.RMSNorm(6), nn.Linear(6, 3)

    def forward(self, x):
        x = x + self.one(x)
        return self.head(self.norm(x + self.two(torch.tanh(x))))


@pytest.mark.parametrize("counted", [True, False])
def test_behind_a_norm_every_place_counts_by_its_own_size(counted):
    """What a huge token has lost cannot be given back: fitted by absolute errors, the layer fails on all others."""
    torch.manual_seed(0)
    dense = randomise_(Stream()).eval()
    pruned = copy.deepcopy(dense)
    pruned.one.weight.data[:3] += 0.3 * torch.randn(3, 6)
    x = torch.randn(64, 20, 6)
    x[:, 0] *= 100
    batches = list(x.split(16))
    seen = sights(dense, pruned, "two", batches)
    assert all(before.other is not None for before, _ in seen)
    wanted, before = dense(x)[:, 1:], pruned(x)[:, 1:]
    run = lambda network, batch: network(batch)  # noqa: E731
    counts = sensitivities(dense, run, batches, {"two": ""}, {"two": (16, 20, 6)})["two"] if counted else None
    assert refit_(pruned.two, None, dense.two, None, seen, RowMap.identity(6), sensitivity=counts)
    error = (pruned(x)[:, 1:] - wanted).norm() / (before - wanted).norm()
    assert (error < 0.8) == counted


def test_kinds_of_layers_that_can_be_refitted():
    assert can_refit(nn.Linear(3, 4))
    assert can_refit(nn.Conv2d(3, 4, 3, stride=2))
    assert can_refit(nn.Conv1d(3, 4, 3))
    assert can_refit(nn.Conv2d(4, 4, 3, groups=4))
    assert not can_refit(nn.ConvTranspose2d(3, 4, 3))
    assert not can_refit(nn.Linear(100_000, 2))


def test_every_batch_gives_the_same_share_of_its_places(monkeypatch):
    monkeypatch.setattr("intrafusion.correct.refit._FEWEST", 60)
    folds, counts = _Folds(), []
    for inputs in (30, 10):
        pieces = list(folds.places((inputs, 10), 4, 1, 400, torch.device("cpu")))
        counts.append(sum(len(image) for _, (image, _) in pieces))
        assert {fold for fold, _ in pieces} == {0, 1}
    assert counts == [45, 15]


def test_of_very_many_batches_each_gives_a_place():
    folds = _Folds()
    pieces = [list(folds.places((1,), 4, 1, 50_000, torch.device("cpu"))) for _ in range(4)]
    assert [[(fold, len(image)) for fold, (image,) in each] for each in pieces] == [[(0, 1)], [(1, 1)]] * 2
