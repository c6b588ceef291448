"""The channels of nn.MultiheadAttention: those of the stream it reads and writes, and those inside its heads.

    logits = (q_h x)ᵀ (k_h x),   output = Σ_h o_h softmax(logits) v_h x

The sum over heads h does not depend on their order, the product of q and k not on the order of the channels that both
have inside a head, and neither does o_h v_h on that of v and o: three permutations, all exact, none of which touches
the stream. (Torch-Pruning ties the channels inside the heads to those of the stream, because it cuts both at once.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.groups.places import CouplingGroup, Place
from intrafusion.groups.table import Role

ATTENTION = nn.MultiheadAttention


def stream_places(name: str, layer: Any, reached: Mapping[int, set[int]], n: int) -> list[Place]:
    """Where the channels of the stream lie in an attention layer. reached: its channels by root channel of the group.

    Raises ValueError if a channel of the stream is not one channel of the layer.
    """
    if set(map(len, reached.values())) != {1}:
        raise ValueError(f"{name!r} does not read the channels one by one")
    local = torch.full((n, 1), -1, dtype=torch.long)
    for root, (channel,) in reached.items():
        local[root, 0] = channel
    places = [
        Place(f"{name}.in_proj_weight", 1, local, Role.CONSUMER),
        Place(f"{name}.out_proj.weight", 0, local, Role.PRODUCER),
    ]
    if layer.out_proj.bias is not None:
        places.append(Place(f"{name}.out_proj.bias", 0, local, Role.PRODUCER))
    return places


def head_group(name: str, layer: Any, position: int) -> CouplingGroup:
    """The channels inside the heads: E that queries and keys share (class 0), then E of the values (class 1)."""
    width, heads = layer.embed_dim, layer.num_heads
    title = f"{name}.heads"
    if layer.in_proj_weight is None:
        return CouplingGroup.fixed(title, 2 * width, position, "its keys or values have other widths than its queries")
    channels = torch.arange(width)
    absent = torch.full((width,), -1)
    packed = torch.cat([_two(channels, channels + width), _two(channels + 2 * width, absent)])
    places = [Place(f"{name}.in_proj_weight", 0, packed, Role.PRODUCER)]
    if layer.in_proj_bias is not None:
        places.append(Place(f"{name}.in_proj_bias", 0, packed, Role.PRODUCER))
    keys = torch.cat([channels, absent])[:, None]
    values = torch.cat([absent, channels])[:, None]
    places.append(Place(f"{name}.out_proj.weight", 1, values, Role.CONSUMER))
    if layer.bias_k is not None:
        places.append(Place(f"{name}.bias_k", 2, keys, Role.SHIFT))
        places.append(Place(f"{name}.bias_v", 2, values, Role.SHIFT))
    blocks = torch.cat([channels.unflatten(0, (heads, -1)), (channels + width).unflatten(0, (heads, -1))], dim=1)
    classes = torch.arange(2).repeat_interleave(width)
    return CouplingGroup(title, 2 * width, tuple(places), classes, blocks, position, rigid=True)


def _two(first: Tensor, second: Tensor) -> Tensor:
    return torch.stack([first, second], dim=1)
