"""One-to-one couplings: the transport between two uniform distributions of equally many channels (Birkhoff)."""

from __future__ import annotations

import torch
from torch import Tensor


def assign(cost: Tensor) -> tuple[Tensor, float]:
    """The one-to-one coupling with the least total cost.

    cost: [n, n]. Returns [n] int64 on the CPU, for every column the row that is assigned to it, and the mean cost.

    Raises ValueError if the cost is not square or not finite.
    """
    from scipy.optimize import linear_sum_assignment

    if cost.dim() != 2 or cost.shape[0] != cost.shape[1]:
        raise ValueError(f"a one-to-one coupling needs a square cost, not {tuple(cost.shape)}")
    if not torch.isfinite(cost).all():
        raise ValueError("the assignment cost is not finite")
    values = cost.detach().T.cpu().double().numpy()
    columns, rows = linear_sum_assignment(values)
    return torch.from_numpy(rows), float(values[columns, rows].mean()) if len(rows) else 0.0


def assign_classes(cost: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, float]:
    """As :func:`assign`, but a column may only take a row with the same label. rows, columns: [n] labels.

    Raises ValueError if a label has not as many rows as columns.
    """
    order, total = torch.empty(len(columns), dtype=torch.long), 0.0
    for label in columns.unique():
        members, places = (rows == label).nonzero().flatten(), (columns == label).nonzero().flatten()
        found, mean = assign(cost[members.to(cost.device)][:, places.to(cost.device)])
        order[places] = members[found]
        total += mean * len(places)
    return order, total / max(1, len(columns))


def assign_blocks(cost: Tensor, blocks: Tensor, classes: Tensor) -> tuple[Tensor, float]:
    """One-to-one coupling of whole blocks (attention heads), and of their channels inside them, together optimal.

    cost: [n, n]; blocks: [h, n / h] the channels of each block; classes: [n] labels that channels keep.
    Every pair of blocks is matched inside first; the blocks are then assigned by what that costs.
    """
    if len(blocks) == 1:
        return assign_classes(cost, classes, classes)
    labels = classes[blocks[0]]
    pairs = [[_inside(cost, row, column, labels) for column in blocks] for row in blocks]
    between = torch.tensor([[mean for _, mean in line] for line in pairs], dtype=torch.float64)
    chosen, mean = assign(between)
    order = torch.empty(len(classes), dtype=torch.long)
    for column, row in enumerate(chosen.tolist()):
        order[blocks[column]] = blocks[row][pairs[row][column][0]]
    return order, mean


def _inside(cost: Tensor, row: Tensor, column: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    return assign_classes(cost[row.to(cost.device)][:, column.to(cost.device)], labels, labels)
