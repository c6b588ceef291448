"""The loss between networks: along the line through two, over the plane through three.

Interpolated are all parameters and buffers of networks with the same tensors; align them first
(:func:`intrafusion.align`), or the line runs between two orders of the same channels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from intrafusion.average.statistics import reestimate_
from intrafusion.groups.places import State, load_state_, state_of
from intrafusion.lab.data.dataset import Dataset
from intrafusion.lab.errors import LabError
from intrafusion.running import evaluating, run_model


@dataclass(frozen=True)
class Score:
    """Mean loss, and the share of inputs that are classified rightly, in [0, 1]."""

    loss: float
    accuracy: float


Evaluation = Callable[[nn.Module], Score]
"""Anything that scores a network in eval mode."""


@dataclass(frozen=True)
class Path:
    """Scores along a line: `t` [s] from 0 to 1, `loss` and `accuracy` [s]."""

    t: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray

    @property
    def barrier(self) -> float:
        """max over t of loss(t) - ((1 - t) loss(0) + t loss(1)), at least 0 (Entezari et al. 2022)."""
        return float((self.loss - self._chord(self.loss)).max())

    @property
    def accuracy_barrier(self) -> float:
        """max over t of ((1 - t) accuracy(0) + t accuracy(1)) - accuracy(t), in [0, 1]."""
        return float((self._chord(self.accuracy) - self.accuracy).max())

    def _chord(self, values: np.ndarray) -> np.ndarray:
        return (1 - self.t) * values[0] + self.t * values[-1]


@dataclass(frozen=True)
class Slice:
    """Scores over the plane through three networks.

    x: [w] and y: [h] coordinates, in Euclidean distance of the parameters from the first network; loss, accuracy:
    [h, w]; corners: [3, 2] where the networks lie.
    """

    x: np.ndarray
    y: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray
    corners: np.ndarray


@torch.no_grad()
def score(model: nn.Module, data: Dataset, split: str = "test", *, batch_size: int = 500) -> Score:
    """Mean cross-entropy and accuracy on a split; ``partial(score, data=...)`` is an evaluation.

    The loss is NaN where a logit is.
    """
    device = next(model.parameters()).device
    loss = right = 0.0
    with evaluating(model):
        for images, labels in data.batches(split, batch_size, device=device):
            logits = model(images)
            loss += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
            right += int((logits.argmax(dim=1) == labels).sum())
    count = len(data.split(split))
    return Score(loss / count, right / count)


def interpolate(
    first: nn.Module,
    second: nn.Module,
    evaluation: Evaluation,
    *,
    steps: int = 11,
    batches: Iterable | None = None,
    forward_fn: Callable | None = None,
    progress: bool = True,
) -> Path:
    """Score the networks (1 - t)·first + t·second for `steps` values of t from 0 to 1. Neither network is touched.

    batches: unlabelled inputs on which the batch-norm statistics of every point between the ends are re-estimated;
    without them the statistics are interpolated too.

    Raises:
        LabError: fewer than two steps, networks with different tensors, or a loss that is not finite at an end.
    """
    if steps < 2:
        raise LabError(f"a line needs at least 2 steps, not {steps}")
    points = np.linspace(0.0, 1.0, steps)
    field = _Field([first, second], evaluation, batches, forward_fn)
    scores = [field.at((1 - t, t)) for t in tqdm(points, desc="line", delay=2, leave=False, disable=not progress)]
    loss, accuracy = (np.array([getattr(one, name) for one in scores]) for name in ("loss", "accuracy"))
    if not (math.isfinite(loss[0]) and math.isfinite(loss[-1])):
        raise LabError("the loss at an end of the line is not finite: there is no barrier to measure")
    return Path(points, loss, accuracy)


def plane(
    networks: Sequence[nn.Module],
    evaluation: Evaluation,
    *,
    resolution: int = 11,
    margin: float = 0.25,
    batches: Iterable | None = None,
    forward_fn: Callable | None = None,
    progress: bool = True,
) -> Slice:
    """Score a grid on the plane through three networks (Garipov et al. 2018, appendix A.3).

    With w the parameters, u = w2 - w1 and v = (w3 - w1) - <w3 - w1, u> u / |u|², the point (x, y) is
    w1 + x u/|u| + y v/|v|. Buffers follow the same affine combination of the three networks.

    resolution: points along each side. margin: how far the grid goes beyond the networks, in parts of their extent.
    batches: unlabelled inputs on which batch-norm statistics are re-estimated at every point but the networks.

    Raises:
        LabError: not three networks, different tensors, networks on one line, fewer than two points.
    """
    if len(networks) != 3:
        raise LabError(f"a plane goes through 3 networks, not {len(networks)}")
    if resolution < 2:
        raise LabError(f"a grid needs at least 2 points along each side, not {resolution}")
    field = _Field(networks, evaluation, batches, forward_fn)
    corners = _corners(networks)
    low, high = corners.min(axis=0), corners.max(axis=0)
    room = margin * (high - low)
    x, y = (np.linspace(low[i] - room[i], high[i] + room[i], resolution) for i in (0, 1))
    grid = np.empty((2, resolution, resolution))
    places = [(i, j) for i in range(resolution) for j in range(resolution)]
    for i, j in tqdm(places, desc="plane", delay=2, leave=False, disable=not progress):
        one = field.at(_weights(corners, x[j], y[i]))
        grid[:, i, j] = one.loss, one.accuracy
    return Slice(x, y, grid[0], grid[1], corners)


class _Field:
    """Scores of affine combinations of networks."""

    def __init__(
        self,
        networks: Sequence[nn.Module],
        evaluation: Evaluation,
        batches: Iterable | None,
        forward_fn: Callable | None,
    ) -> None:
        self._states = [state_of(network) for network in networks]
        shapes = [{key: tensor.shape for key, tensor in state.items()} for state in self._states]
        if any(other != shapes[0] for other in shapes):
            raise LabError("the networks have different tensors: align the wider one first (intrafusion.align)")
        self._network = copy.deepcopy(networks[0]).eval()
        self._evaluation = evaluation
        self._batches = None if batches is None else [(b,) if isinstance(b, Tensor) else b for b in batches]
        self._run = partial(run_model, forward_fn=forward_fn)

    def at(self, weights: Sequence[float]) -> Score:
        """The score of Σ weights[i]·network i."""
        load_state_(self._network, _combined(self._states, weights))
        a_network = max(weights) > 1 - 1e-9 and sum(map(abs, weights)) < 1 + 1e-9
        if self._batches is not None and not a_network:
            reestimate_(self._network, self._run, self._batches)
        return self._evaluation(self._network)


def _combined(states: Sequence[State], weights: Sequence[float]) -> State:
    combined = {}
    for key, first in states[0].items():
        if not first.is_floating_point():
            combined[key] = first
            continue
        total = sum(
            weight * state[key].double().to(first.device) for weight, state in zip(weights, states, strict=True)
        )
        assert isinstance(total, Tensor)
        combined[key] = total.clamp(min=0) if key.endswith("running_var") else total  # beyond the networks
    return combined


def _corners(networks: Sequence[nn.Module]) -> np.ndarray:
    """[3, 2] coordinates of the networks in their plane."""
    first, second, third = ([p.detach().double().flatten().cpu() for p in net.parameters()] for net in networks)
    uu = uw = ww = 0.0
    for a, b, c in zip(first, second, third, strict=True):
        u, w = b - a, c - a
        uu, uw, ww = uu + float(u @ u), uw + float(u @ w), ww + float(w @ w)
    height = ww - uw**2 / uu if uu > 0 else 0.0
    if not height > 1e-12 * max(uu, ww):
        raise LabError("the three networks lie on one line: there is no plane through them")
    length = math.sqrt(uu)
    return np.array([[0.0, 0.0], [length, 0.0], [uw / length, math.sqrt(height)]])


def _weights(corners: np.ndarray, x: float, y: float) -> tuple[float, float, float]:
    """The three networks' parts in the point (x, y); they sum to 1."""
    third = y / corners[2, 1]
    second = (x - third * corners[2, 0]) / corners[1, 0]
    return 1 - second - third, second, third
