"""Embeddings: a table of values for every channel."""

from __future__ import annotations

from torch import nn

from intrafusion.groups.kinds.base import Reached, Side, Slot, register
from intrafusion.groups.kinds.parameter import Values


class Embedding(Values):
    """nn.Embedding: channels are the columns of its table."""

    modules = (nn.Embedding,)
    makes = True
    channel_axis = -1

    def slot(self, at: Reached) -> Slot | str | None:
        if at.tied:
            return f"{at.name!r} ties its weight to another layer (torch-pruning unties them)"
        return at.slot(self, Side.MAKES, at.owner.embedding_dim, axis=1)

    def output_axis(self, owner: object) -> int:
        return 1


register(Embedding())
