"""Which blocks of channels to keep so that least squares rebuilds the others best: heads go whole.

The choice of `ot.choice` with blocks b of s channels in the place of single ones. Forward, from none, choosing b turns
what is left, D, into D - D_:b D_bb⁻¹ D_b:, and removes tr((D M D)_bb D_bb⁻¹) of the error. Backward, from all (OSSCAR,
Meng et al., ICML 2024, whose groups are heads of an output matrix), with P = H⁻¹ and G = W Wᵀ, dropping b costs
tr(G_bb P_bb⁻¹), and refits to

    W ← W - Q W_b:,    P ← P - Q P_b:,    G ← G - Q G_b: - G_:b Qᵀ + Q G_bb Qᵀ,        Q = P_:b P_bb⁻¹.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EXHAUSTED = 1e-9
"""Directions with less than this share of a block's largest variance are combinations of what was chosen."""


def forward(left: Tensor, metric: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Pick order [blocks] and what each pick removes [blocks]. left, metric: [readers, n, n], D and M."""
    left, energy = left.clone(), left @ metric @ left  # D and D M D
    floor = _EXHAUSTED * _diagonal(left, blocks).diagonal(dim1=-2, dim2=-1).amax(dim=-1)
    order: list[int] = []
    removed = []
    for _ in range(blocks):
        roots = _pseudo_roots(_diagonal(left, blocks), floor)
        gains = ((roots.mT @ _diagonal(energy, blocks) @ roots).diagonal(dim1=-2, dim2=-1)).sum(dim=-1).sum(dim=0)
        gains[order] = -torch.inf
        best = int(gains.argmax())
        order.append(best)
        removed.append(gains[best].clamp(min=0))
        u = left[:, :, _channels(best, left, blocks)] @ roots[:, best]  # D becomes D - u uᵀ
        read = metric @ u
        seen, inside = left @ read, u.mT @ read
        half = seen - u @ inside / 2
        energy = energy - u @ half.mT - half @ u.mT
        left = left - u @ u.mT
    return torch.tensor(order, device=left.device), torch.stack(removed)


def backward(inverse: Tensor, gram: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Pick order [blocks], the last drop first, and their costs [blocks]. inverse, gram: [readers, n, n], P and G."""
    there = list(range(blocks))
    dropped, costs = [], []
    while there:
        own = _diagonal(inverse, len(there))
        cost = torch.linalg.solve(own, _diagonal(gram, len(there))).diagonal(dim1=-2, dim2=-1).sum(dim=-1).sum(dim=0)
        least = int(cost.argmin())
        costs.append(cost[least].clamp(min=0))
        dropped.append(there.pop(least))
        at = _channels(least, inverse, len(there) + 1)
        others = torch.ones(inverse.shape[1], dtype=torch.bool, device=inverse.device)
        others[at] = False
        q = torch.linalg.solve(own[:, least], inverse[:, at][:, :, others]).mT
        cross = gram[:, others][:, :, at] - q @ gram[:, at][:, :, at] / 2
        inverse = inverse[:, others][:, :, others] - q @ inverse[:, at][:, :, others]
        gram = gram[:, others][:, :, others] - q @ cross.mT - cross @ q.mT
    return torch.tensor(dropped, device=inverse.device).flip(0), torch.stack(costs).flip(0)


def _diagonal(matrix: Tensor, blocks: int) -> Tensor:
    """[readers, blocks, s, s] of [readers, n, n]."""
    parts = matrix.unflatten(1, (blocks, -1)).unflatten(3, (blocks, -1))
    return parts.diagonal(dim1=1, dim2=3).movedim(-1, 1)


def _channels(block: int, matrix: Tensor, blocks: int) -> Tensor:
    size = matrix.shape[1] // blocks
    return torch.arange(block * size, (block + 1) * size, device=matrix.device)


def _pseudo_roots(matrix: Tensor, floor: Tensor) -> Tensor:
    """X with X Xᵀ the pseudo-inverse of [readers, blocks, s, s]; floor: [readers, blocks], what counts as nothing."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    there = values > floor[..., None].clamp(min=1e-300)
    return vectors * torch.where(there, torch.where(there, values, 1.0).rsqrt(), 0.0)[..., None, :]
