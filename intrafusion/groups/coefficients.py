"""What channels are mixed by: a matrix of which only few entries are not zero, where it comes from a plan."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_BLOCK = 2**17
"""Numbers that are mixed at a time: 1 MB in float64, which stays in a cache."""
_SPARSE = 0.05
"""Where so few of the entries are not zero, going from one to the next is faster than a matrix product."""


@dataclass(frozen=True, eq=False)
class Coefficients:
    """A matrix [c, n] in float64: value[e] is at (row[e], column[e]), each place once, in order; zero elsewhere."""

    shape: tuple[int, int]
    row: Tensor
    column: Tensor
    value: Tensor

    @staticmethod
    def of(matrix: Tensor | Coefficients) -> Coefficients:
        if isinstance(matrix, Coefficients):
            return matrix
        row, column = matrix.nonzero().unbind(dim=1)
        return Coefficients((len(matrix), matrix.shape[1]), row, column, matrix[row, column].double())

    def to(self, device: torch.device) -> Coefficients:
        if self.value.device == device:
            return self
        return Coefficients(self.shape, self.row.to(device), self.column.to(device), self.value.to(device))

    def with_values(self, value: Tensor) -> Coefficients:
        """Other values [e] at the same places."""
        return Coefficients(self.shape, self.row, self.column, value)

    def scaled(self, columns: Tensor) -> Coefficients:
        """Every column times a number: columns [n]."""
        return self.with_values(self.value * columns[self.column])

    def scaled_rows(self, rows: Tensor) -> Coefficients:
        """Every row times a number: rows [c]."""
        return self.with_values(self.value * rows[self.row])

    def row_sums(self) -> Tensor:
        """[c]"""
        return self.value.new_zeros(self.shape[0]).index_add_(0, self.row, self.value)

    def row_average(self) -> Coefficients:
        """Magnitudes, each row scaled to sum to 1: the map for gains, which must not be counted twice."""
        sizes = self.with_values(self.value.abs())
        total = sizes.row_sums()
        return sizes.scaled_rows(1.0 / torch.where(total == 0, 1.0, total))

    def __matmul__(self, vector: Tensor) -> Tensor:
        """[n] -> [c]"""
        return self.scaled(vector).row_sums()

    @cached_property
    def _matrix(self) -> Tensor:
        """As a tensor to multiply by: sparse if that is faster."""
        places = torch.stack([self.row, self.column])
        made = torch.sparse_coo_tensor(places, self.value, self.shape, is_coalesced=True, check_invariants=False)
        return made if len(self.value) < _SPARSE * self.shape[0] * self.shape[1] else made.to_dense()

    def products(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The product with rows [n, d] of any precision, in float64: columns that are done, and theirs [c, columns]."""
        each = max(1, _BLOCK // max(1, len(rows)))
        for first in range(0, rows.shape[1], each):
            columns = slice(first, first + each)
            yield columns, self._matrix @ rows[:, columns].double()

    def mixed(self, rows: Tensor) -> Tensor:
        """[n, d] -> [c, d], computed in float64, in the precision of `rows`."""
        result = rows.new_empty(self.shape[0], rows.shape[1])
        for columns, product in self.products(rows):
            result[:, columns] = product
        return result
