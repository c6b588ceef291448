"""Rows of features that are never held as one matrix: parts side by side, read a block of columns at a time.

A channel's features are its weights in every layer of its group. In VGG-16 that is 4,096 rows of 29,184 numbers:
1 GB in float64. Here the layers' own weights stay what they are ([n, d_i] views, in the network's dtype). Distances,
norms and means are sums over blocks of columns: in the network's precision inside a block, in float64 from one to the
next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

BLOCK = 1024
"""Columns that are read at a time: a float32 sum over so many is as good as the numbers themselves."""

_AT_ONCE = 2**17
"""So many numbers of them are scaled at a time: 1 MB in float64, which stays in a cache."""


@dataclass(frozen=True)
class Rows:
    """n rows, each times a factor: row i is ``scale[i] * [part[i] for part in parts]``.

    parts: [m, d_j] on one device; scale: [m] float64; index: [n] which of the m rows there are (None: all, n = m).
    """

    parts: tuple[Tensor, ...]
    scale: Tensor
    index: Tensor | None = None

    @staticmethod
    def of(features: Features) -> Rows:
        """A matrix [n, d], or its parts [n, d_j] side by side, as rows with factor 1; nothing is copied.

        Raises ValueError if there are no parts, or their numbers of rows differ.
        """
        if isinstance(features, Rows):
            return features
        given = [features] if isinstance(features, Tensor) else list(features)
        if not given or len({len(part) for part in given}) > 1:
            raise ValueError(f"features need parts with one row per channel each, not {[len(part) for part in given]}")
        parts = tuple(part.detach().to(given[0].device) for part in given)
        return Rows(parts, torch.ones(len(parts[0]), dtype=torch.float64, device=parts[0].device))

    def __len__(self) -> int:
        return len(self.scale) if self.index is None else len(self.index)

    @property
    def device(self) -> torch.device:
        return self.scale.device

    @property
    def dtype(self) -> torch.dtype:
        """What blocks are computed in: float64 if a part is, else float32."""
        return torch.float64 if any(part.dtype == torch.float64 for part in self.parts) else torch.float32

    def take(self, rows: Tensor) -> Rows:
        """The rows with the numbers `rows`, in that order; nothing is copied."""
        rows = rows.to(self.device)
        return replace(self, index=rows if self.index is None else self.index[rows])

    def blocks(self, columns: int = BLOCK, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
        """[n, <= columns] contiguous blocks from left to right, together [n, d]; thin parts share a block.

        dtype: of the blocks, if it is not that of the rows.
        """
        dtype = dtype or self.dtype
        held: list[Tensor] = []
        room = columns
        for part in self.parts:
            at = 0
            while at < part.shape[1]:
                piece = part[:, at : at + room]
                at, room = at + piece.shape[1], room - piece.shape[1]
                held.append(piece)
                if room == 0:
                    yield self._block(held, dtype)
                    held, room = [], columns
        if held:
            yield self._block(held, dtype)

    def _block(self, pieces: list[Tensor], dtype: torch.dtype) -> Tensor:
        """The pieces side by side, times the factors: in float64, to be rounded once."""
        widths = [piece.shape[1] for piece in pieces]
        block = torch.empty(len(self), sum(widths), dtype=dtype, device=self.device)
        index = torch.arange(len(self), device=self.device) if self.index is None else self.index
        each = max(1, _AT_ONCE // sum(widths))
        for some, rows in zip(index.split(each), block.split(each), strict=True):
            for piece, place in zip(pieces, rows.split(widths, dim=1), strict=True):
                place.copy_(piece[some] * self.scale[some, None])
        return block

    def dense(self) -> Tensor:
        """[n, d] in `dtype`."""
        nothing = torch.zeros(len(self), 0, dtype=self.dtype, device=self.device)
        return torch.cat([nothing, *self.blocks()], dim=1)

    def squares(self, name: str = "channel") -> Tensor:
        """[n] float64, the squared Euclidean norm of every row.

        Raises ValueError, calling the first one by `name`, if a row is not finite.
        """
        total = torch.zeros(len(self), dtype=torch.float64, device=self.device)
        for block in self.blocks(max(1, _AT_ONCE // max(1, len(self))), torch.float64):
            total += block.square_().sum(dim=1)
        bad = (~torch.isfinite(total)).nonzero().flatten()
        if len(bad):
            raise ValueError(f"the features of {name} {bad[0].item()} are not finite")
        return total

    def normalised(self, name: str = "channel") -> Rows:
        """The same rows at Euclidean norm 1; a zero row stays zero (no NaN).

        Rows of float64 are rescaled by their largest entry first, so that neither a tiny nor a huge one under- or
        overflows when it is squared; those of float32 cannot, as their squares are summed in float64.

        Raises ValueError, calling rows by `name`, for features that are not finite.
        """
        rows = self
        if self.dtype == torch.float64:
            largest = torch.zeros_like(self.scale if self.index is None else self.scale[self.index])
            for block in self.blocks():
                largest = torch.maximum(largest, block.abs().amax(dim=1))
            rows = self._divided(largest)
        return rows._divided(rows.squares(name).sqrt())

    def _divided(self, by: Tensor) -> Rows:
        """The same rows divided by `by` [n] where that is not 0."""
        by = torch.where(by > 0, by, torch.where(by == 0, 1.0, by))
        if self.index is None:
            return replace(self, scale=self.scale / by)
        return replace(self, scale=self.scale.index_copy(0, self.index, self.scale[self.index] / by))


Features = Tensor | Sequence[Tensor] | Rows
"""[n, d] features: a matrix, its parts side by side, or rows."""
