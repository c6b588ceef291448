"""Attention made of linear layers: where its heads are, and how torch-pruning sees it.

    logits = (q_h x)ᵀ (k_h x),   output = Σ_h o_h softmax(logits) v_h x

Nobody has to name the heads of such a network: blocks are found by the names of their layers, the numbers of heads by
their attributes or the network's config, and what was found is verified: heads (and the channels inside them) change
places, and the output must not change. Rotary positions, norms inside of heads, position tables of one head show here.

Torch-Pruning follows every operation between these layers; where rotary positions slice and join channels, its groups
never end. While it traces, `opaque` shows it what is true of all of them: channel i of the queries, of the keys and of
the values goes with channel i of what the output layer reads, where several heads may share one key and value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from intrafusion.groups.joined import PARTS, JoinedLinear
from intrafusion.running import Levelled, evaluating, full_precision, same_outputs

_PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"), ("query_proj", "key_proj", "value_proj"), ("q", "k", "v"),
)  # fmt: skip
PACKED = ("qkv", "c_attn", "Wqkv", "to_qkv", "in_proj", "qkv_proj", "query_key_value", "wqkv")
"""Layers that make queries, keys and values, one after the other."""
_OUTPUTS = ("o_proj", "out_proj", "out_lin", "to_out", "wo", "o", "proj", "c_proj", "dense", "dense_out")
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead", "n_local_heads")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_key_heads", "kv_heads")
DIMS = ("head_dim", "attention_head_size", "dim_head", "head_size", "d_kv")


@dataclass(frozen=True, eq=False)
class Heads:
    """One attention block: linear layers, how many heads its queries have, and how many its keys and values.

    queries, keys and values are one and the same layer where that makes all three, one after the other.

    name: of the module that holds the projections. names: of the layers, by their attribute here. width: of what the
    output layer reads, all heads together. heads_move: can whole heads change places? dims_move: can the channels
    inside the heads? What cannot change places is told apart by something that is not in these layers. scaled: are the
    logits divided by the root of the heads' width whenever the network runs?
    """

    name: str
    queries: nn.Linear
    keys: nn.Linear
    values: nn.Linear
    output: nn.Linear
    heads: int
    key_heads: int
    width: int
    names: Mapping[str, str]
    heads_move: bool = True
    dims_move: bool = True
    scaled: bool = False

    @property
    def is_packed(self) -> bool:
        return self.queries is self.keys

    @property
    def dim(self) -> int:
        return self.width // self.heads

    def now(self, heads: int, key_heads: int) -> Heads:
        """The same block as it is by now, when that many heads are left."""
        return replace(self, heads=heads, key_heads=key_heads, width=self.output.in_features)

    @property
    def shared(self) -> int:
        """How many heads of the queries share one of the keys and values."""
        return self.heads // self.key_heads

    @property
    def projections(self) -> tuple[nn.Linear, ...]:
        return (self.queries,) if self.is_packed else (self.queries, self.keys, self.values)


def find_heads(model: nn.Module, forward: Callable[[nn.Module], list[Tensor]]) -> list[Heads]:
    """The attention blocks of a network, in the order of its modules, with what of them can change places.

    forward: runs the network on an example and returns its output tensors. The network is as it was afterwards. None of
    its layers is run if it has no such block. Blocks whose heads cannot be told are left out.
    """
    blocks = blocks_of(model)
    if not blocks:
        return []
    with torch.no_grad(), evaluating(model), full_precision(), Levelled():
        with _Scales(model, blocks) as scales:
            before = forward(model)
        whole = _bearing(model, blocks, lambda some: _unchanged(model, forward, before, some, inside=False))
        inside = _bearing(model, blocks, lambda some: _unchanged(model, forward, before, some, inside=True))
    whole = {block for block in whole if not _has_tables(model, block)}
    found = [
        replace(block, heads_move=block in whole, dims_move=block in inside, scaled=block in scales.found)
        for block in blocks
    ]
    return [block for block in found if not block.is_packed or block.heads_move or block.dims_move]


def _has_tables(model: nn.Module, block: Heads) -> bool:
    """Does the block hold something of its own for every head, which may be too small to be seen in an output?"""
    layers = {id(p) for layer in (*block.projections, block.output) for p in layer.parameters()}
    own = (p for p in model.get_submodule(block.name).parameters() if id(p) not in layers)
    return any(block.heads in p.shape for p in own)


def blocks_of(model: nn.Module) -> list[Heads]:
    """The same, not verified."""
    modules = ((name, module) for name, module in model.named_modules() if not isinstance(module, JoinedLinear))
    blocks = [block for name, module in modules if (block := _block(model, name, module)) is not None]
    used = Counter(layer for block in blocks for layer in (*block.projections, block.output))
    return [block for block in blocks if all(used[layer] == 1 for layer in (*block.projections, block.output))]


class _Scales(TorchFunctionMode):
    """Notes the blocks whose attention is computed by torch's own function with a scale that it makes of the width."""

    def __init__(self, model: nn.Module, blocks: Sequence[Heads]) -> None:
        super().__init__()
        self.found: set[Heads] = set()
        self._last, self._stack = False, ExitStack()
        for block in blocks:
            self._stack.callback(block.output.register_forward_pre_hook(partial(self._read, block)).remove)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "scaled_dot_product_attention":
            self._last = (kwargs or {}).get("scale") is None
        return func(*args, **(kwargs or {}))

    def _read(self, block: Heads, *_: Any) -> None:
        if self._last:
            self.found.add(block)
        self._last = False

    def __exit__(self, *error: Any) -> None:
        self._stack.close()
        super().__exit__(*error)


@contextmanager
def opaque(blocks: Sequence[Heads]) -> Iterator[None]:
    """For as long as it lasts, gradients of every block's output come from its projections, channel by channel."""
    with ExitStack() as stack:
        for block in blocks:
            made: dict[nn.Module, Tensor] = {}

            def note(layer: nn.Module, _args: Any, output: Tensor, made: dict[nn.Module, Tensor] = made) -> None:
                made[layer] = output

            def joined(_layer: nn.Module, args: Any, block: Heads = block, made: dict = made) -> Any:
                if len(made) < len(block.projections) or not args:
                    return None
                given = [made[layer] for layer in block.projections]
                if any(one.dim() < 2 for one in (*given, args[0])):
                    return None
                if block.is_packed:
                    turned = given[0].transpose(1, -1)  # torch-pruning knows chunks of axis 1
                    given = [one.transpose(1, -1) for one in turned.chunk(3, dim=1)]
                seen = _together(block, *given)
                if seen.numel() == args[0].numel() and seen.shape[-1] == args[0].shape[-1]:
                    seen = seen.reshape(args[0].shape)  # windows are put together or apart in between
                made.clear()
                if seen.shape != args[0].shape:
                    return None
                return (args[0].detach() + 0 * seen, *args[1:])

            for layer in block.projections:
                stack.callback(layer.register_forward_hook(note).remove)
            stack.callback(block.output.register_forward_pre_hook(joined).remove)
        yield


def _together(block: Heads, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Elementwise in all three, in the operations by which torch-pruning knows shared keys: [..., tokens, channels]."""
    if block.shared > 1:
        keys, values = (_repeated(block, one) for one in (keys, values))
    if queries.dim() > 1 and keys.shape[-2] != queries.shape[-2]:  # what cross-attention reads has a length of its own
        keys, values = (one.mean(dim=-2, keepdim=True) for one in (keys, values))
    return queries + (keys + values)  # torch-pruning takes the layer that it meets first for the root: the queries


def _repeated(block: Heads, one: Tensor) -> Tensor:
    each = one.reshape(-1, one.shape[-2], block.key_heads, block.dim).transpose(1, 2)
    batch, heads, tokens, dim = each.shape
    many = each[:, :, None].expand(batch, heads, block.shared, tokens, dim).reshape(batch, -1, tokens, dim)
    return many.transpose(1, 2).reshape(*one.shape[:-1], block.heads * block.dim)


def _block(model: nn.Module, name: str, module: nn.Module) -> Heads | None:
    for names in (*_PROJECTIONS, *((packed,) * 3 for packed in PACKED)):
        layers: list[Any] = [getattr(module, one, None) for one in names]
        joined = layers[0] if isinstance(layers[0], JoinedLinear) else None
        if joined is not None:
            names, layers = tuple(f"{names[0]}.{part}" for part in PARTS), list(joined.parts)
        if all(isinstance(layer, nn.Linear) for layer in layers):
            break
    else:
        return None
    queries, keys, values = layers
    packed = queries is keys
    width = queries.out_features // 3 if packed else queries.out_features
    output_name, output = output_of(model, name, module, width)
    if output is None or keys.out_features != values.out_features or (packed and keys.out_features != 3 * width):
        return None
    prefix = f"{name}." if name else ""
    layers_at: dict[str, str] = dict(zip(("queries", "keys", "values"), (prefix + one for one in names), strict=True))
    layers_at["output"] = output_name
    if packed:
        heads = first_number([module, getattr(module, "config", None), getattr(model, "config", None)], HEADS)
        known = heads and width % heads == 0
        return Heads(name, queries, keys, values, output, heads, heads, width, layers_at) if known else None
    if joined is not None:
        heads, key_heads = queries.out_features // joined.head_dim, joined.num_key_value_heads
    else:
        heads, key_heads = _numbers(model, name, module, queries, keys)
    if not heads or not key_heads or heads % key_heads or queries.out_features % heads:
        return None
    if keys.out_features != queries.out_features // heads * key_heads:
        return None
    return Heads(name, queries, keys, values, output, heads, key_heads, width, layers_at)


def output_of(model: nn.Module, name: str, module: nn.Module, width: int) -> tuple[str, Any]:
    """What reads the heads: beside the projections, or in the module around them; its name first."""
    outside = name.rpartition(".")[0]
    around = model.get_submodule(outside) if "." in name else module
    beside = tuple(f"output.{one}" for one in _OUTPUTS) + _OUTPUTS
    places: list[tuple[str, Any, tuple[str, ...]]] = [(name, module, _OUTPUTS), (outside, around, beside)]
    for where, holder, names in places:
        for one in names:
            try:
                found: Any = holder.get_submodule(one)
            except AttributeError:
                continue
            path = f"{where}.{one}" if where else one
            if isinstance(found, nn.Sequential) and len(found):
                found, path = found[0], f"{path}.0"
            if isinstance(found, nn.Linear) and found.in_features == width:
                return path, found
    return "", None


def _numbers(model: nn.Module, name: str, module: nn.Module, queries: nn.Linear, keys: nn.Linear) -> tuple[int, int]:
    """(heads of the queries, heads of keys and values), 0 where nothing tells."""
    holders = [module, getattr(module, "config", None), getattr(model, "config", None)]
    heads = first_number(holders, HEADS)
    dim = first_number(holders[:1], DIMS)
    if dim and queries.out_features % dim == 0 and keys.out_features % dim == 0:
        return queries.out_features // dim, keys.out_features // dim
    key_heads = first_number(holders, KEY_HEADS) or heads
    if heads and keys.out_features == queries.out_features:
        key_heads = heads
    return heads, key_heads


def first_number(holders: Sequence[Any], names: Sequence[str]) -> int:
    for holder in holders:
        for name in names:
            value = getattr(holder, name, None)
            if type(value) is int and value > 0:
                return value
    return 0


def _bearing(model: nn.Module, blocks: Sequence[Heads], bears: Callable[[Sequence[Heads]], bool]) -> set[Heads]:
    """Those that pass: all at once if they do, otherwise those of each class of module, in each class, at once."""
    if bears(blocks):
        return set(blocks)
    classes: dict[tuple[type, ...], list[Heads]] = {}
    for block in blocks:
        kinds = (type(model.get_submodule(name)) for name in (block.name, block.name.rpartition(".")[0]))
        classes.setdefault(tuple(kinds), []).append(block)
    return {block for some in classes.values() if len(classes) > 1 and bears(some) for block in some}


def _unchanged(
    model: nn.Module,
    forward: Callable[[nn.Module], list[Tensor]],
    before: Sequence[Tensor],
    blocks: Sequence[Heads],
    *,
    inside: bool,
) -> bool:
    generator = torch.Generator().manual_seed(0)
    with ExitStack() as stack:
        for block in blocks:
            queries, keys = _order(block, inside, generator)
            if block.is_packed:
                width = len(queries)
                makers = [(block.queries, torch.cat([queries, queries + width, queries + 2 * width]))]
            else:
                makers = [(block.queries, queries), (block.keys, keys), (block.values, keys)]
            for layer, order in makers:
                stack.enter_context(_reordered(layer, order, 0))
            stack.enter_context(_reordered(block.output, queries, 1))
        try:
            after = forward(model)
        except Exception:  # whatever a foreign network raises: these are no heads
            return False
    return same_outputs(after, before)


def _order(block: Heads, inside: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """New orders of the channels of queries and of keys."""
    shape = (block.key_heads, block.shared, block.dim)
    queries = torch.arange(block.heads * block.dim).reshape(shape)
    keys = torch.arange(block.key_heads * block.dim).reshape(block.key_heads, block.dim)
    if inside:  # every key in an order of its own, or channels of several heads would pass for those of one
        order = torch.stack([torch.randperm(block.dim, generator=generator) for _ in range(block.key_heads)])
        return queries.gather(2, order[:, None].expand(shape)).flatten(), keys.gather(1, order).flatten()
    order = torch.randperm(block.key_heads, generator=generator)
    within = torch.randperm(block.shared, generator=generator)
    return queries[order][:, within].flatten(), keys[order].flatten()


@contextmanager
def _reordered(layer: nn.Linear, order: Tensor, axis: int) -> Iterator[None]:
    """For as long as it lasts, channel order[i] is in the place of channel i."""
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    assert weight is not None
    order = order.to(weight.device)
    try:
        layer._parameters["weight"] = nn.Parameter(weight.index_select(axis, order), requires_grad=False)
        if bias is not None and axis == 0:
            layer._parameters["bias"] = nn.Parameter(bias[order], requires_grad=False)
        yield
    finally:
        layer._parameters["weight"], layer._parameters["bias"] = weight, bias


def heads_by_layer(blocks: Sequence[Heads], given: Mapping[nn.Module, int]) -> dict[nn.Module, int]:
    """Torch-Pruning's `num_heads` of blocks that the user gave none of."""
    found: dict[nn.Module, int] = {}
    for block in blocks:
        if not any(layer in given for layer in block.projections):
            found[block.keys] = found[block.values] = block.key_heads
            found[block.queries] = block.heads
    return found
