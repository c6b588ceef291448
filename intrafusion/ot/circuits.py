"""Fewer channels inside an attention head: the best low rank of its two circuits.

What a head computes depends on the products of two maps only, queries with keys (the logits, qᵀ k) and values with the
output (O v). In such a product bᵀ a any invertible map may go between the factors, so that k of r channels are chosen
best as the first k singular directions of the product, weighted by what a and b really are (Eckart and Young).
"""

from __future__ import annotations

import torch
from torch import Tensor

_RANK = 1e-10
"""Directions with less than this share of the largest second moment are none."""


def low_rank(first: Tensor, second: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(P, T), both [k, r] float64: a' = P a and b' = T b, so that b'ᵀ a' is nearest to bᵀ a of all products of rank k.

    first, second: [r, r] second moments of a and b (of a linear map's r rows: its Gram matrix), positive semi-definite.
    Nearest: the expected square of the error, if a and b are drawn independently of each other.
    Raises ValueError for moments that are not finite, or if k is above r.
    """
    r = len(first)
    if not 0 < k <= r:
        raise ValueError(f"{k} of {r} channels cannot be kept")
    if not (torch.isfinite(first).all() and torch.isfinite(second).all()):
        raise ValueError("the second moments of what the heads compute are not finite")
    root_a, back_a = _root(first.double())
    root_b, back_b = _root(second.double())
    u, s, v = torch.linalg.svd(root_b.T @ root_a)
    strength = s[:k].sqrt()[:, None]
    return strength * (v[:k] @ back_a), strength * (u[:, :k].T @ back_b)


def _root(moments: Tensor) -> tuple[Tensor, Tensor]:
    """E with E Eᵀ = moments, and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh((moments + moments.T) / 2)
    values = values.clamp(min=0)
    there = values > _RANK * values.max().clamp(min=1e-300)
    root = values.sqrt()
    inverse = torch.where(there, 1.0 / torch.where(there, root, 1.0), 0.0)
    return vectors * torch.where(there, root, 0.0), inverse[:, None] * vectors.T
