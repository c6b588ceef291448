"""Find layers that make queries, keys and values of heads at once, in an order that torch-pruning cannot follow.

Nobody says the order. Both are tried: heads, and the channels inside them, change places, and the output must not
change; where it does in each, the layer stays what it was. So with nn.MultiheadAttention, where heads shall be cut.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from intrafusion.groups.config_reads import ConfigReads
from intrafusion.groups.heads import HEADS, PACKED, Heads, find_heads, first_number, output_of
from intrafusion.groups.joined import JOINED, JoinedLinear, part_
from intrafusion.groups.multihead import PartedAttention, part_attention_, weights_unseen, why_whole
from intrafusion.groups.snapshot import rebuilding
from intrafusion.running import evaluating

Kind: TypeAlias = type[JoinedLinear] | type[PartedAttention]
"""What a layer becomes."""


@dataclass(frozen=True)
class Packed:
    """A layer by name, and how it can be parted: queries (channels), heads of keys and of values, their width."""

    name: str
    queries: int
    key_heads: int
    head_dim: int


@contextmanager
def known_heads(
    model: nn.Module,
    forward: Callable[[nn.Module], list[Tensor]],
    ignored: Iterable[Any] = (),
    multihead: bool = False,
) -> Iterator[list[Heads]]:
    """As `find_heads`, once layers that hide them have been parted, in place; put back if what follows fails.

    ignored: modules and parameters whose layers stay what they are. multihead: are nn.MultiheadAttention parted? Heads
    whose number is read from a config that all layers share do not move: one block cannot lose some alone.
    """
    alone = _ignored(model, ignored)
    backs: list[Callable[[], None]] = []
    try:
        backs += part_packed_(model, forward, _besides(model, alone, candidates(model)))
        if multihead:
            backs += part_packed_(model, forward, _besides(model, alone, multiheads(model)), (PartedAttention,))
            _tell_whole(model, alone)
        blocks = find_heads(model, forward)
        with ConfigReads(model, blocks) as reads, torch.no_grad(), evaluating(model):
            if blocks:
                reads.note(forward)
        modes = [(part, part.training) for name in parted(model) for part in model.get_submodule(name).children()]
        with weights_unseen(model):
            yield [replace(block, heads_move=block.heads_move and block not in reads.found) for block in blocks]
        for part, training in modes:  # tracing switches the network to eval mode
            part.training = training
    except BaseException:
        for back in backs:
            back()
        raise


def _ignored(model: nn.Module, ignored: Iterable[Any]) -> set[nn.Module]:
    """Modules, all that is inside of them, and the layers that own parameters."""
    given = list(ignored)
    parameters = {id(one) for one in given if isinstance(one, nn.Parameter)}
    owners = (m for m in model.modules() if any(id(p) in parameters for p in m._parameters.values()))
    return {inner for one in given if isinstance(one, nn.Module) for inner in one.modules()}.union(owners)


def _besides(model: nn.Module, alone: Container[nn.Module], found: Iterable[Packed]) -> list[Packed]:
    return [packed for packed in found if model.get_submodule(packed.name) not in alone]


def _tell_whole(model: nn.Module, alone: Container[nn.Module]) -> None:
    """Warn of every nn.MultiheadAttention that has not been parted."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.MultiheadAttention) and layer not in alone:
            why = why_whole(layer) or "is tied to another layer, or has heads that are told apart by something else"
            warnings.warn(f"the heads of {name!r} stay: this nn.MultiheadAttention {why}", stacklevel=5)


def part_packed_(
    model: nn.Module,
    forward: Callable[[nn.Module], list[Tensor]],
    left: Sequence[Packed],
    kinds: Sequence[Kind] = JOINED,
) -> list[Callable[[], None]]:
    """Part every layer whose order is found, in place; what puts each of them back.

    forward: runs the network, and returns its outputs. left: the layers that are tried, as each of the kinds.
    """
    followed = {block.names["queries"] for block in find_heads(model, forward)} if left else set()
    left = [packed for packed in left if packed.name not in followed]
    backs: list[Callable[[], None]] = []
    for kind in kinds if left else ():
        trial = {packed.name: _rebuilding(model.get_submodule(packed.name)) for packed in left}
        try:
            for packed in left:
                _part_(model, packed, kind)
            blocks = find_heads(model, forward)
        except BaseException:
            for back in (*trial.values(), *backs):
                back()
            raise
        found = {block.names["queries"] for block in blocks if block.heads_move or block.dims_move}
        left = [packed for packed in left if f"{packed.name}.q_proj" not in found]
        for packed in left:
            trial.pop(packed.name)()
        backs += trial.values()
    return backs


def _rebuilding(layer: nn.Module) -> Callable[[], None]:
    """As `rebuilding`, with what it consists of."""
    backs = [rebuilding(module) for module in layer.modules()]

    def back() -> None:
        for one in backs:
            one()

    return back


def parted(model: nn.Module) -> dict[str, tuple[Packed, Kind]]:
    """What has been parted, and how, by name."""
    found: dict[str, tuple[Packed, Kind]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, (JoinedLinear, PartedAttention)):
            key_heads = layer.num_key_value_heads if isinstance(layer, JoinedLinear) else layer.num_heads
            found[name] = Packed(name, layer.q_proj.out_features, key_heads, layer.head_dim), type(layer)
    return found


def part_alike_(model: nn.Module, known: Mapping[str, tuple[Packed, Kind]]) -> None:
    """Part the layers of a network of the same kind as another's were."""
    for packed, kind in known.values():
        if not isinstance(model.get_submodule(packed.name), kind):
            _part_(model, packed, kind)


def _part_(model: nn.Module, packed: Packed, kind: Kind) -> None:
    layer: Any = model.get_submodule(packed.name)
    if issubclass(kind, PartedAttention):
        part_attention_(layer)
    else:
        part_(layer, packed.queries, packed.key_heads, packed.head_dim, kind)


def multiheads(model: nn.Module) -> list[Packed]:
    """Every nn.MultiheadAttention that can be parted."""
    tied = _tied(model)
    return [
        Packed(name, layer.embed_dim, layer.num_heads, layer.head_dim)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.MultiheadAttention) and not why_whole(layer) and not tied(layer)
    ]


def _tied(model: nn.Module) -> Callable[[nn.Module], bool]:
    """Is a layer, or one of its parameters, in two places, so that a part of it cannot go alone?"""
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    holders = Counter(id(child) for module in model.modules() for child in module._modules.values())
    return lambda layer: holders[id(layer)] > 1 or any(owners[id(p)] > 1 for p in layer.parameters())


def candidates(model: nn.Module) -> list[Packed]:
    """The layers whose sizes are those of queries, keys and values together."""
    found, tied = [], _tied(model)
    for name, module in model.named_modules():
        for one in PACKED:
            layer: Any = module._modules.get(one)
            if layer is None or tied(layer):
                continue
            if _is_linear(layer) and (packed := _packed(model, name, module, one, layer)) is not None:
                found.append(packed)
    return found


def _is_linear(layer: Any) -> bool:
    """Is it a linear layer, or one of a class of its own that computes, and is saved, the same?"""
    if not isinstance(layer, nn.Linear) or layer._modules or layer._buffers or layer._forward_pre_hooks:
        return False
    if layer._parameters.keys() - {"weight", "bias"} or layer._parameters.get("weight") is None:
        return False
    if type(layer)._save_to_state_dict is not nn.Module._save_to_state_dict:
        return False
    if type(layer).forward is nn.Linear.forward or layer.weight.is_meta:
        return True
    x = torch.randn(2, layer.in_features, generator=torch.Generator().manual_seed(0)).to(layer.weight)
    try:
        with torch.no_grad():
            return torch.allclose(layer.forward(x), F.linear(x, layer.weight, layer.bias), atol=1e-4, rtol=1e-3)
    except Exception:  # whatever a layer of somebody's own needs besides
        return False


def _packed(model: nn.Module, name: str, module: nn.Module, one: str, layer: nn.Linear) -> Packed | None:
    heads = first_number([module, getattr(module, "config", None), getattr(model, "config", None)], HEADS)
    path = f"{name}.{one}" if name else one
    if not heads:
        return None
    for key_heads in (count for count in range(1, heads + 1) if heads % count == 0):
        if layer.out_features % (heads + 2 * key_heads):
            continue
        dim = layer.out_features // (heads + 2 * key_heads)
        if output_of(model, name, module, heads * dim)[1] is not None:
            return Packed(path, heads * dim, key_heads, dim)
    return None
