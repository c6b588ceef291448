"""nn.MultiheadAttention, where its heads, or the channels inside them, shall be cut.

Torch-Pruning cuts the one parameter of its queries, keys and values with the stream, without regard to heads. In a
network whose heads are cut such a layer becomes four linear layers in place, which compute what it computed. Its state
dict stays as it was, so that what is saved is loaded into the original class, if that takes the widths.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from intrafusion.groups.joined import PARTS, give_


class PartedAttention(nn.Module):
    """What nn.MultiheadAttention computes, by linear layers q_proj, k_proj, v_proj and out_proj.

    Called, saved and loaded as that. Parameters of the first three are new ones, and those of a state dict are copies:
    make optimizers and averages of weights afterwards. num_heads, head_dim: as they are now. scale: of the logits, that
    of the heads' first width.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear
    num_heads: int
    head_dim: int
    scale: float
    dropout: float
    batch_first: bool

    _qkv_same_embed_dim = False
    """So that nn.TransformerEncoderLayer calls the layer, and does not hand its weights to a kernel for square ones."""
    bias_k = bias_v = None
    add_zero_attn = False

    @property
    def parts(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return self.q_proj, self.k_proj, self.v_proj

    @property
    def in_proj_weight(self) -> Tensor:
        return torch.cat([part.weight for part in self.parts])

    @property
    def in_proj_bias(self) -> Tensor | None:
        """None if no part has one, zeros for one that has none."""
        if all(part.bias is None for part in self.parts):
            return None
        return torch.cat(
            [part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in self.parts]
        )

    @property
    def embed_dim(self) -> int:
        return self.q_proj.in_features

    @property
    def kdim(self) -> int:
        return self.k_proj.in_features

    @property
    def vdim(self) -> int:
        return self.v_proj.in_features

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's: query [N, L, E] and key, value [N, S, E] -> ([N, L, E], weights [N, L, S] or [N, heads, L, S]).

        [L, N, E] if not batch_first, [L, E] without a batch; nested tensors where all three are one. Raises
        RuntimeError if num_heads and head_dim do not fit the layers, or attn_mask [N·heads, L, S] does not fit both.
        """
        if query.is_nested:
            return self._nested(query, key, value)
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal says what attn_mask is: give the mask too")
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x[None] for x in (query, key, value))
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (self._heads(part(x)) for part, x in zip(self.parts, (query, key, value), strict=True))
        mask, weights = self._mask(attn_mask, key_padding_mask, q), None
        dropped = self.dropout if self.training else 0.0
        if need_weights:
            logits = (q * self.scale) @ k.mT
            weights = F.dropout((logits if mask is None else logits + mask).softmax(-1), dropped)
            read = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            causal = is_causal and key_padding_mask is None
            read = F.scaled_dot_product_attention(
                q, k, v, None if causal else mask, dropped, is_causal=causal, scale=self.scale
            )
        output = self.out_proj(read.transpose(1, 2).flatten(2))
        if not batched:
            return output[0], None if weights is None else weights[0]
        return output if self.batch_first else output.transpose(0, 1), weights

    def _heads(self, x: Tensor) -> Tensor:
        """[N, L, heads·dim] -> [N, heads, L, dim]"""
        if x.shape[-1] != self.num_heads * self.head_dim:
            told = f"num_heads={self.num_heads}, head_dim={self.head_dim}"
            raise RuntimeError(f"heads of {x.shape[-1]} channels do not fit {told}")
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """What is added to the logits [N, heads, L, S], in a shape that fits them."""
        if attn_mask is not None:
            attn_mask = _added(attn_mask, q)
            if attn_mask.dim() == 3:
                if len(attn_mask) != len(q) * self.num_heads:
                    told = f"{len(q)} sequences of {self.num_heads} heads need {len(q) * self.num_heads}"
                    raise RuntimeError(f"attn_mask has {len(attn_mask)} masks, {told}")
                attn_mask = attn_mask.unflatten(0, (len(q), self.num_heads))
        if padding is None:
            return attn_mask
        padding = _added(padding, q).reshape(-1, 1, 1, padding.shape[-1])
        return padding if attn_mask is None else attn_mask + padding

    def _nested(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, None]:
        """nn.TransformerEncoder makes nested tensors of padded sequences."""
        if query is not key or key is not value:
            raise RuntimeError("nested tensors: only of self-attention, query, key and value being one")
        lengths = [len(one) for one in query.unbind()]
        x = query.to_padded_tensor(0.0)
        there = torch.arange(x.shape[1], device=x.device) < torch.tensor(lengths, device=x.device)[:, None]
        x = x if self.batch_first else x.transpose(0, 1)
        output, _ = self(x, x, x, key_padding_mask=~there, need_weights=False)
        output = output if self.batch_first else output.transpose(0, 1)
        return torch._nested_tensor_from_mask(output, there, mask_check=False), None

    def merge_masks(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor
    ) -> tuple[Tensor | None, int | None]:
        """As torch's."""
        return nn.MultiheadAttention.merge_masks(self, attn_mask, key_padding_mask, query)  # pyright: ignore

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """As that of nn.MultiheadAttention."""
        destination = {} if destination is None else destination
        for name, value in (("in_proj_weight", self.in_proj_weight), ("in_proj_bias", self.in_proj_bias)):
            if value is not None:
                destination[prefix + name] = value if keep_vars else value.detach()
        return self.out_proj.state_dict(destination=destination, prefix=f"{prefix}out_proj.", keep_vars=keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, metadata: Any, strict: bool, *told: Any) -> None:
        sizes = [part.out_features for part in self.parts]
        for name in ("weight", "bias"):
            joined = state_dict.get(f"{prefix}in_proj_{name}")
            if joined is None:
                continue
            if len(joined) != sum(sizes):
                rows = f"{len(joined)} rows, of {sum(sizes)} that queries, keys and values have together"
                told[-1].append(f"{prefix}in_proj_{name}: {rows}")
                continue
            del state_dict[f"{prefix}in_proj_{name}"]
            for part, value in zip(PARTS, joined.split(sizes), strict=True):
                if getattr(self, part)._parameters[name] is not None or bool(value.any()):  # zeros are no bias
                    state_dict[f"{prefix}{part}.{name}"] = value
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *told)


def _added(mask: Tensor, q: Tensor) -> Tensor:
    """A mask as what is added to logits: True is what is not seen."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -torch.inf)
    if not mask.is_floating_point():
        raise RuntimeError(f"a mask of {mask.dtype}: give one of bool, or of what is added to the logits")
    return mask


@contextmanager
def weights_unseen(model: nn.Module) -> Iterator[None]:
    """For as long as it lasts, gradients of the weights that are returned come from nothing.

    Torch-Pruning would take what is computed of them for channels of the queries, where they have none.
    """
    with ExitStack() as stack:
        for layer in model.modules():
            if isinstance(layer, PartedAttention):
                stack.callback(layer.register_forward_hook(_detached).remove)
        yield


def _detached(_layer: nn.Module, _args: Any, given: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    output, weights = given
    return output, None if weights is None else weights.detach()


def why_whole(layer: nn.MultiheadAttention) -> str:
    """What keeps an nn.MultiheadAttention from being parted; '' if nothing does."""
    if type(layer) is not nn.MultiheadAttention:
        return f"is a class of its own, {type(layer).__name__}"
    if layer.in_proj_weight is None:
        return "has keys or values of other widths (kdim, vdim)"
    if layer.bias_k is not None or layer.bias_v is not None:
        return "has a key and value of its own (add_bias_kv)"
    if layer.add_zero_attn:
        return "has a key and value of zeros (add_zero_attn)"
    own = {"in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight"}
    if layer._parameters.keys() - own or layer._modules.keys() != {"out_proj"} or layer._buffers:
        return "has tensors that nn.MultiheadAttention has not"
    if "in_proj_weight" not in layer._parameters or layer.out_proj._parameters.keys() != {"weight", "bias"}:
        return "has weights that are computed (weight_norm)"
    if type(layer.out_proj) not in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return f"has an output layer of a class of its own, {type(layer.out_proj).__name__}"
    if "forward" in vars(layer):
        return "has been given another forward"
    return ""


def part_attention_(layer: nn.MultiheadAttention) -> None:
    """Turn an nn.MultiheadAttention into a `PartedAttention`, in place; one for which `why_whole` is ''."""
    tensors = {name: layer._parameters[f"in_proj_{name}"] for name in ("weight", "bias")}
    width, training = layer.embed_dim, layer.training
    parted: Any = layer
    parted._parameters.clear()
    for name in ("embed_dim", "kdim", "vdim", "_qkv_same_embed_dim", "bias_k", "bias_v", "add_zero_attn"):
        parted.__dict__.pop(name, None)
    parted.__class__ = PartedAttention
    parted.scale = parted.head_dim**-0.5
    out_proj = parted._modules.pop("out_proj")
    out_proj.__class__ = nn.Linear  # torch's own is one that no call is made of, which counters of operations pass over
    for part in PARTS:
        linear = nn.Linear(width, width, bias=tensors["bias"] is not None, device="meta")
        setattr(parted, part, linear.train(training))
    parted.out_proj = out_proj
    for name, joined in tensors.items():
        if joined is not None:
            give_(parted.parts, name, joined, lambda value: value.chunk(3))
