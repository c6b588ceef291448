"""What it costs to move a channel onto another one."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import torch
from torch import Tensor

from intrafusion.ot.parts import BLOCK, Features, Rows

COSTS = ("l1", "l2", "cosine")
"""Distances that :func:`pairwise_cost` knows; `l1` is the published one. The others are matrix products."""

METRICS = ("l1", "l2")
"""Those that obey the triangle inequality: what two distributions have in common then stays where it is."""

_TILE = (2, 64)
"""Channels and targets of a tile of the L1 sum: with a block's columns it fits in the cache of a core, 1 MB."""
_AT_ONCE = 64
"""Rows of a block that are multiplied by something at a time, for the same reason."""
_SHARE = 256
"""Channels that a thread takes at a time."""
_ALONE = 2**24
"""Fewer additions than that are done before other threads have begun."""


def normalise_rows(features: Tensor) -> Tensor:
    """Divide every row by its Euclidean norm; a zero row stays zero (no NaN).

    >>> normalise_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]

    features: [n, d]. Returns [n, d], float64 or float32.
    """
    return Rows.of(features).normalised().dense()


def pairwise_cost(x: Features, y: Features, kind: str = "l1") -> Tensor:
    """Distance of every row of `x` to every row of `y`.

    x: [n, d], y: [k, d], both on one device, each a matrix, its parts side by side, or `Rows`. Returns [n, k] in
    float64, all entries >= 0, and exactly 0 between rows that are exactly equal.
    kind: `l1` (sum of absolute differences, as published), `l2` (Euclidean), `cosine` (1 - cosine similarity;
    two zero rows are at distance 0, a zero row is at distance 1 from any other).

    Rows are compared in their own precision, float32 or float64. `l2` and `cosine` come from a matrix product: a
    squared distance is right to about 1e-7 (float32; 1e-16 in float64) of the squared norms.

    Raises ValueError for an unknown kind or for features that are not finite.
    """
    if kind not in COSTS:
        raise ValueError(f"unknown cost {kind!r}: choose one of {', '.join(COSTS)}")
    x, y = Rows.of(x), Rows.of(y)
    if kind == "l1":
        cost = _l1(x, y)
        if not torch.isfinite(cost).all():
            _name_the_one_that_is_not_finite(x, y)
        return cost
    if kind == "cosine":
        x, y = x.normalised(), y.normalised("target")
    return _from_products(x, y, kind)


def _name_the_one_that_is_not_finite(x: Rows, y: Rows) -> None:
    for rows, name in ((x, "channel"), (y, "target")):
        rows.squares(name)


def _from_products(x: Rows, y: Rows, kind: str) -> Tensor:
    """Distances by |a - b|² = |a|² + |b|² - 2 a·b; equal rows get equal distances, whatever the product rounds."""
    products = torch.zeros(len(x), len(y), dtype=torch.float64, device=x.device)
    marks = [torch.zeros(len(rows), 2, dtype=torch.float64, device=x.device) for rows in (x, y)]
    for a, b in _paired(x, y, 2 * BLOCK):
        products += a @ b.T
        angles = torch.arange(a.shape[1], dtype=a.dtype, device=a.device).cos()
        for rows, mark in zip((a, b), marks, strict=True):
            mark[:, 0] += torch.linalg.vector_norm(rows, dim=1).double().square_()
            mark[:, 1] += torch.cat([(some * angles).sum(dim=1) for some in rows.split(_AT_ONCE)])
    if not all(torch.isfinite(mark).all() for mark in marks):
        _name_the_one_that_is_not_finite(x, y)
    if kind == "l2":
        cost = (marks[0][:, :1] + marks[1][:, 0] - 2 * products).clamp_(min=0.0).sqrt_()
    else:
        cost = (1.0 - products).clamp_(min=0.0)
    one, other = _families(x, y, torch.cat(marks))
    return cost[_first(one)][:, _first(other)].masked_fill_(one[:, None] == other[None, :], 0.0)


def _families(x: Rows, y: Rows, marks: Tensor) -> tuple[Tensor, Tensor]:
    """[n] and [k] int64: rows of x and y with one number are exactly equal.

    marks: [n + k, 2] are equal for equal rows, and so find candidates; each is compared with the row it is taken for.
    """
    first = _first(marks)
    doubtful = (first != torch.arange(len(first), device=first.device)).nonzero().flatten()
    if len(doubtful):
        same = torch.ones_like(doubtful, dtype=torch.bool)
        for pair in _paired(x, y, BLOCK):
            both = torch.cat(pair)
            same &= (both[doubtful] == both[first[doubtful]]).all(dim=1)
        first[doubtful[~same]] = doubtful[~same]
    return first[: len(x)], first[len(x) :]


def _first(values: Tensor) -> Tensor:
    """[n] for every entry (or row) the place of the first one that is equal to it."""
    label = values.unique(dim=0, return_inverse=True)[1]
    own = torch.arange(len(values), device=values.device)
    return torch.full_like(own, len(own)).scatter_reduce(0, label, own, "amin")[label]


def _l1(x: Rows, y: Rows) -> Tensor:
    """Sums of absolute differences, block of columns by block."""
    cost = torch.zeros(len(x), len(y), dtype=torch.float64, device=x.device)
    if x.device.type != "cpu":
        for a, b in _paired(x, y, BLOCK):
            cost += torch.cdist(a, b, p=1)
        return cost
    sums = torch.zeros(len(x), 1, dtype=torch.float64), torch.zeros(1, len(y), dtype=torch.float64)
    with _Minima(len(x) * len(y) * BLOCK) as minima:
        for a, b in _paired(x, y, BLOCK):
            cost += minima(a, b)
            sums[0][:, 0] += a.sum(dim=1)
            sums[1][0] += b.sum(dim=1)
    return cost.mul_(-2).add_(sums[0] + sums[1]).clamp_(min=0.0)


class _Minima:
    """[n, c], [k, c] -> [n, k] sums over c of min(a[i, c], b[j, c]), on all the cores that torch has, while it is open.

    |u - v| = u + v - 2 min(u, v), and minima are one pass over memory where absolute differences are two
    (`torch.cdist` makes one, but a number at a time: it takes four times as long as this). Equal rows give exactly
    what their own sums are, so that their distance is exactly 0: sums over contiguous rows of one length round alike.

    A tile fits in the cache of a core, and threads of Python's that run torch on one core each work on their own:
    torch's threads, which meet after every tile, wait for each other longer than they work on a machine that is busy.
    """

    def __init__(self, work: int) -> None:
        self._threads = torch.get_num_threads()
        alone = self._threads == 1 or work < _ALONE
        self._pool = (
            None if alone else ThreadPoolExecutor(self._threads, initializer=torch.set_num_threads, initargs=(1,))
        )

    def __enter__(self) -> _Minima:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            torch.set_num_threads(self._threads)  # the workers' 1 was also meant for threads yet to come

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        out = torch.empty(len(a), len(b), dtype=a.dtype)
        if self._pool is None:
            _sum_minima(a, b, out)
            return out
        each = min(_SHARE, -(-len(a) // self._threads))
        list(self._pool.map(_sum_minima, a.split(each), repeat(b), out.split(each)))
        return out


def _sum_minima(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Tile by tile; all views are made before, as a tile takes no longer than making a few of them."""
    rows, targets = _TILE
    lefts = a[:, None].split(rows)
    for right, columns in zip(b.split(targets), out.split(targets, dim=1), strict=True):
        room = torch.empty(rows, *right.shape, dtype=a.dtype)
        tiles = [room] * (len(a) // rows) + [room[: len(a) % rows]]
        for left, tile, cell in zip(lefts, tiles, columns.split(rows), strict=False):
            torch.minimum(right, left, out=tile)
            torch.sum(tile, 2, out=cell)


def _paired(x: Rows, y: Rows, columns: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of the same columns of both, in one precision."""
    for a, b in zip(x.blocks(columns), y.blocks(columns), strict=True):
        dtype = torch.promote_types(a.dtype, b.dtype)
        yield a.to(dtype), b.to(dtype)
