"""The line and the plane between networks: ends, barriers and coordinates, against networks whose loss is known."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from intrafusion import align
from intrafusion.lab.data.sources import digits
from intrafusion.lab.errors import LabError
from intrafusion.lab.landscape.figure import draw_paths, draw_plane
from intrafusion.lab.landscape.loss import Path, Score, interpolate, plane, score
from intrafusion.lab.measure import evaluate
from intrafusion.models import DigitsCNN
from tests.average.test_couplings import CASES, shuffled
from tests.nets import PICO, randomise_


class Point(nn.Module):
    """Two parameters; the loss is a function of them."""

    def __init__(self, x: float, y: float) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor([x, y], dtype=torch.float64))


def bowl(network: nn.Module) -> Score:
    x, y = network.at.tolist()
    return Score(x * x + 10 * y * y, 1 - x / 10)


def labelled(case):
    x = torch.randn(32, *case.shape, generator=torch.Generator().manual_seed(3))
    wanted = torch.arange(32) % 4

    @torch.no_grad()
    def evaluation(network: nn.Module) -> Score:
        logits = network(x)
        return Score(float(F.cross_entropy(logits, wanted)), float((logits.argmax(1) == wanted).double().mean()))

    return evaluation


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_there_is_no_barrier_between_a_network_and_its_permuted_copy_once_aligned(case):
    model, other, _ = shuffled(case)
    aligned = align(other, model, case.example()).apply(other)
    path = interpolate(model, aligned, labelled(case), steps=5)
    assert path.barrier < 1e-5
    assert path.accuracy_barrier == 0


def test_there_is_one_before():
    """On a network that has learnt something: its own logits are the labels."""
    model, other, _ = shuffled(PICO[0])
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = model(x)

    @torch.no_grad()
    def distance(network: nn.Module) -> Score:
        return Score(float((network(x) - wanted).square().mean()), 1.0)

    assert interpolate(model, other, distance, steps=5).barrier > 1e-3


def test_the_ends_are_the_networks_and_the_barrier_is_above_the_chord():
    path = interpolate(Point(-1, 0), Point(3, 0), bowl, steps=5)
    np.testing.assert_allclose(path.loss, [1, 0, 1, 4, 9])
    assert path.barrier == 0
    hill = Path(np.array([0, 0.25, 1]), np.array([1.0, 4.0, 5.0]), np.array([0.9, 0.2, 0.5]))
    assert hill.barrier == pytest.approx(4 - 2)
    assert hill.accuracy_barrier == pytest.approx(0.8 - 0.2)


def test_the_plane_goes_through_the_networks_in_their_distances():
    corners = [Point(1, 2), Point(4, 2), Point(2, 6)]
    found = plane(corners, bowl, resolution=3, margin=0.0)
    np.testing.assert_allclose(found.corners, [[0, 0], [3, 0], [1, 4]], atol=1e-12)
    for i, y in enumerate(found.y):
        for j, x in enumerate(found.x):
            assert found.loss[i, j] == pytest.approx((1 + x) ** 2 + 10 * (2 + y) ** 2)
    wider = plane(corners, bowl, resolution=3, margin=0.5)
    assert (wider.x[0], wider.x[-1]) == pytest.approx((-1.5, 4.5))


def test_score_agrees_with_evaluate_and_the_loss_with_the_whole_split_at_once():
    model, data = randomise_(DigitsCNN()), digits(test_images=100)
    found = score(model, data, batch_size=33)
    assert found.accuracy == evaluate(model, data, progress=False).correct / 100
    images, labels = next(data.batches("test", 100))
    assert found.loss == pytest.approx(float(F.cross_entropy(model(images).detach(), labels)), rel=1e-5)


def test_re_estimation_leaves_the_ends_alone_and_changes_the_middle():
    first = PICO[0].model()
    torch.manual_seed(9)
    second = randomise_(PICO[0].build())
    batches = [torch.randn(32, 3, 8, 8)]
    plain, repaired = (interpolate(first, second, labelled(PICO[0]), steps=3, batches=b) for b in (None, batches))
    assert plain.loss[[0, 2]] == pytest.approx(repaired.loss[[0, 2]])
    assert plain.loss[1] != repaired.loss[1]


def test_the_plane_is_re_estimated_everywhere_but_at_the_networks():
    """Beyond the triangle too, where the weights are above 1 and below 0."""
    networks = [PICO[0].model()]
    for seed in (9, 10):
        torch.manual_seed(seed)
        networks.append(randomise_(PICO[0].build()))
    batches = [torch.randn(32, 3, 8, 8)]
    evaluation = labelled(PICO[0])
    plain, repaired = (plane(networks, evaluation, resolution=3, margin=0.25, batches=b) for b in (None, batches))
    assert not np.isclose(plain.loss, repaired.loss).any()
    corner = plane(networks, evaluation, resolution=2, margin=0.0, batches=batches).loss[0, 0]
    assert corner == pytest.approx(evaluation(networks[0]).loss, rel=1e-5)


def test_networks_are_not_touched():
    first, second = Point(0, 0), Point(1, 1)
    interpolate(first, second, bowl, steps=3)
    assert (first.at.tolist(), second.at.tolist()) == ([0, 0], [1, 1])


def test_figures_are_pngs():
    path = interpolate(Point(-1, 0), Point(3, 0), bowl, steps=3)
    grid = plane([Point(1, 2), Point(4, 2), Point(2, 6)], bowl, resolution=3)
    for png in (draw_paths({"naive": path, "aligned": path}, "line"), draw_plane(grid, ("a", "b", "c"), "plane")):
        assert png.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(interpolate, Point(0, 0), Point(1, 1), bowl, steps=1), "at least 2 steps"),
        (partial(interpolate, Point(0, 0), nn.Linear(2, 2), bowl), "different tensors"),
        (partial(interpolate, Point(0, 0), Point(1, 1), lambda _: Score(math.nan, 0)), "not finite"),
        (partial(plane, [Point(0, 0), Point(1, 1)], bowl), "3 networks, not 2"),
        (partial(plane, [Point(0, 0), Point(1, 1), Point(2, 2)], bowl), "on one line"),
        (partial(plane, [Point(0, 0), Point(0, 0), Point(2, 2)], bowl), "on one line"),
        (partial(plane, [Point(0, 0)] * 3, bowl, resolution=1), "at least 2 points"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(LabError, match=message):
        call()
