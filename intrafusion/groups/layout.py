"""Any weight as a matrix with one row per channel, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from intrafusion.groups.coefficients import Coefficients

_AT_ONCE = 2**17
"""Numbers that are scaled at a time: 1 MB in float64, which stays in a cache."""


def to_channels(weight: Tensor, axis: int = 0, chunks: int = 1) -> Tensor:
    """View a parameter as [channels, rest].

    axis: where the channels are. chunks > 1 with axis 1: a grouped convolution, whose axis 1 holds the channels of one
    chunk only while axis 0 holds all the chunks one after the other; channel c of chunk g becomes row g·(L/chunks) + c.
    (Grouped channels on axis 0 need no rearrangement: pass chunks=1.)
    """
    if chunks == 1 or axis == 0:
        return weight.movedim(axis, 0).flatten(1) if weight.dim() > 1 else weight[:, None]
    split = weight.unflatten(0, (chunks, -1))  # [chunks, rows of the chunk, channels of the chunk, ...]
    return split.movedim(2, 1).flatten(0, 1).flatten(1)


def from_channels(matrix: Tensor, like: Tensor, axis: int = 0, chunks: int = 1) -> Tensor:
    """Inverse of :func:`to_channels`; `like` gives the shape."""
    if like.dim() == 1:
        return matrix[:, 0].contiguous()
    if chunks == 1 or axis == 0:
        shape = like.movedim(axis, 0).shape
        return matrix.reshape(shape).movedim(0, axis).contiguous()
    rows, channels = like.shape[0] // chunks, like.shape[1]
    split = matrix.reshape(chunks, channels, rows, *like.shape[2:])
    return split.movedim(1, 2).flatten(0, 1).contiguous()


def gather(matrix: Tensor, local: Tensor) -> Tensor:
    """Rows in root order: [L, d] -> [n, m·d]; places where a root channel has no copy are zero."""
    rows, absent = matrix[local.clamp(min=0)], local < 0
    if absent.any():
        rows[absent] = 0
    return rows.flatten(1)


def pick(matrix: Tensor, local: Tensor) -> Tensor:
    """As :func:`gather`, for reading only: no copy where channel i is row i, as in most wide layers."""
    rows, copies = local.shape
    if copies == 1 and rows == len(matrix) and bool((local[:, 0] == torch.arange(rows, device=local.device)).all()):
        return matrix
    return gather(matrix, local)


def mix_(matrix: Tensor, local: Tensor, weights: Tensor | Coefficients, places: Tensor) -> None:
    """matrix[place of root i] <- sum over roots j of weights[i, j] · matrix[place of j], in place.

    matrix: [L, d], local: [n, m], weights: [c, n], places: [c] root channels that are written. All that is read is
    read, in float64, before any of it is written.
    """
    target = local[places]
    there = target >= 0
    mixed = Coefficients.of(weights).mixed(pick(matrix, local)).unflatten(1, (local.shape[1], matrix.shape[1]))
    matrix[target[there]] = mixed.flatten(0, 1) if bool(there.all()) else mixed[there]


def scaled(matrix: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    """Every row times a number, computed in float64 and rounded once: matrix [n, d], by [n] float64."""
    result = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
    each = max(1, _AT_ONCE // max(1, matrix.shape[1]))
    for rows, factors, place in zip(matrix.split(each), by[:, None].split(each), result.split(each), strict=True):
        place.copy_(rows * factors)
    return result


def is_finite(tensor: Tensor) -> bool:
    """No NaN and no infinity, found without a copy."""
    return not tensor.numel() or bool(torch.isfinite(torch.stack(tensor.detach().aminmax())).all())


def by_channel(value: Tensor, axis: int) -> Tensor:
    """[samples, channels]"""
    return value.movedim(axis, -1).flatten(0, -2)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums of values in `dtype` are computed in: half precision overflows."""
    return torch.promote_types(dtype, torch.float32)
