"""The channels of nn.MultiheadAttention: those of the stream it reads and writes, and those inside its heads.

    logits = (q_h x)ᵀ (k_h x),   output = Σ_h o_h softmax(logits) v_h x

The sum over heads h does not depend on their order, the product of q and k not on the order of the channels that both
have inside a head, and neither does o_h v_h on that of v and o: three permutations, all exact, none of which touches
the stream. (Torch-Pruning ties the channels inside the heads to those of the stream, because it cuts both at once.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.groups.kinds.base import Inner, LayerKind, Place, Reached, Side, Slot, present, register


class Attention(LayerKind):
    """nn.MultiheadAttention, for aligning networks; torch-pruning cuts it without regard to its heads.

    Where heads are cut as such, it is another layer: see `groups.multihead`.
    """

    modules = (nn.MultiheadAttention,)
    is_map = True
    makes = True
    rigid = "is attention, whose channels can change places but not be merged"
    channel_axis = -1

    def slot(self, at: Reached) -> Slot | str | None:
        if at.owner.in_proj_weight is None:
            return f"{at.name!r} is an nn.MultiheadAttention whose keys or values have other widths"
        if at.local.shape[1] != 1:
            return f"{at.name!r} does not read the channels one by one"
        return at.slot(self, Side.PASSES, at.owner.embed_dim)

    def places(self, slot: Slot) -> tuple[Place, ...]:
        """Those of the stream: what the projections read, and what the output adds."""
        out, name = slot.owner.out_proj, slot.name
        made = {"axis": 0, "owner": out, "side": Side.MAKES}
        return present(
            slot.place("in_proj_weight", axis=1, side=Side.READS, reader=name),
            slot.place("weight", key=f"{name}.out_proj.weight", **made),
            slot.place("bias", key=f"{name}.out_proj.bias", **made),
        )

    def inner(self, name: str, owner: Any) -> Inner | None:
        """The channels inside the heads: E that queries and keys share (class 0), then E of the values (class 1)."""
        width, heads = owner.embed_dim, owner.num_heads
        title = f"{name}.heads"
        if owner.in_proj_weight is None:
            return Inner(title, 2 * width, reason="its keys or values have other widths than its queries")
        channels, absent = torch.arange(width), torch.full((width,), -1)
        packed = torch.cat([_two(channels, channels + width), _two(channels + 2 * width, absent)])
        keys = torch.cat([channels, absent])[:, None]
        values = torch.cat([absent, channels])[:, None]
        slot = Slot(name, owner, self, Side.MAKES, 2 * width, packed)
        places = present(
            slot.place("in_proj_weight"),
            slot.place("in_proj_bias"),
            slot.place(
                "weight", owner=owner.out_proj, axis=1, key=f"{name}.out_proj.weight", local=values, side=Side.READS
            ),
            slot.place("bias_k", axis=2, local=keys),
            slot.place("bias_v", axis=2, local=values),
        )
        blocks = torch.cat([channels.unflatten(0, (heads, -1)), (channels + width).unflatten(0, (heads, -1))], dim=1)
        return Inner(title, 2 * width, places, torch.arange(2).repeat_interleave(width), blocks)


def _two(first: Tensor, second: Tensor) -> Tensor:
    return torch.stack([first, second], dim=1)


register(Attention())
