"""The channels inside attention heads become fewer: what the heads compute is measured, and the layers are rewritten.

Torch-Pruning cuts the same channels of every head of a layer; they are all rewritten before, so that those that stay
carry the best low rank of the head's two circuits (`ot.circuits`). Whole heads are not changed by this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.correct.refit import set_tensor_
from intrafusion.groups.heads import Heads
from intrafusion.groups.layout import at_least_float32
from intrafusion.ot.circuits import low_rank
from intrafusion.running import evaluating

Run = Callable[[nn.Module, Any], Any]


class HeadMoments:
    """Second moments [heads, r, r] of what every block's heads give in a network, on all batches: one pass.

    keys are taken about their mean: what is the same for all keys shifts all logits of a query alike.
    """

    def __init__(self, network: nn.Module, blocks: Sequence[Heads], run: Run, batches: Sequence) -> None:
        self._sums: dict[str, dict[str, _Sums]] = {block.name: {} for block in blocks}
        with ExitStack() as stack, torch.no_grad(), evaluating(network):
            for block in blocks:
                for layer, hook in _hooks(block, self._sums[block.name]):
                    if hook[0] == "gives":
                        stack.callback(network.get_submodule(layer).register_forward_hook(hook[1]).remove)
                    else:
                        stack.callback(network.get_submodule(layer).register_forward_pre_hook(hook[1]).remove)
            for batch in batches:
                run(network, batch)

    def of(self, block: Heads) -> dict[str, Tensor]:
        """queries, keys, read (what the output layer reads): by name."""
        sums = self._sums[block.name]
        return {name: sums[name].moments(centred=name == "keys") for name in sums}


class _Sums:
    def __init__(self) -> None:
        self.n, self.sum, self.products = 0.0, torch.zeros(()), torch.zeros(())

    def add(self, value: Tensor, heads: int) -> None:
        x = value.flatten(0, -2).unflatten(-1, (heads, -1)).movedim(1, 0).to(at_least_float32(value.dtype))
        self.n += x.shape[1]
        self.sum = self.sum.to(x.device) + x.double().sum(dim=1)
        self.products = self.products.to(x.device) + (x.mT @ x).double()

    def moments(self, *, centred: bool) -> Tensor:
        mean = self.sum / self.n
        products = self.products / self.n
        return products - mean[:, :, None] * mean[:, None, :] if centred else products


def _hooks(block: Heads, sums: dict[str, _Sums]) -> list[tuple[str, tuple[str, Callable]]]:
    def told(name: str, value: Tensor, heads: int) -> None:
        sums.setdefault(name, _Sums()).add(value, heads)

    def read(_layer: Any, args: Any) -> None:
        told("read", args[0], block.heads)

    def packed(_layer: Any, _args: Any, output: Tensor) -> None:
        queries, keys, _ = output.chunk(3, dim=-1)
        told("queries", queries, block.heads)
        told("keys", keys, block.heads)

    def queries(_layer: Any, _args: Any, output: Tensor) -> None:
        told("queries", output, block.heads)

    def keys(_layer: Any, _args: Any, output: Tensor) -> None:
        told("keys", output, block.key_heads)

    names = block.names
    found = [(names["output"], ("reads", read))]
    if block.is_packed:
        return [*found, (names["queries"], ("gives", packed))]
    return [*found, (names["queries"], ("gives", queries)), (names["keys"], ("gives", keys))]


@torch.no_grad()
def reduce_(block: Heads, moments: dict[str, Tensor], kept: Tensor, *, rescale: bool) -> dict[str, Tensor]:
    """Rewrite the kept channels of every head of a block, at full size.

    kept: [k] channels inside each head. rescale: whether the logits are divided by the root of the number of channels
    when the network runs, which will be smaller. Returns what the outputs of the block's layers stand for when they
    have been cut: [left, full] by layer name, in terms of what they gave before.
    """
    r, k, shared = block.dim, len(kept), block.shared
    output = block.output.weight.detach().double().unflatten(1, (block.key_heads, shared, r))
    reads = torch.einsum("mgsr,mgst->grt", output, output)
    seen = moments["read"].unflatten(0, (block.key_heads, shared)).sum(dim=1).to(reads.device)
    asked = moments["queries"].unflatten(0, (block.key_heads, shared)).sum(dim=1).to(reads.device)
    shown = moments["keys"].to(reads.device)
    values, columns, keys, queries = ([] for _ in range(4))
    for head in range(block.key_heads):
        value, column = low_rank(seen[head], reads[head], k)
        key, query = low_rank(shown[head], asked[head], k)
        values.append(value)
        columns.append(column)
        keys.append(key)
        queries.append(query * (k / r) ** 0.5 if rescale else query)
    kept = kept.to(reads.device)
    maps = {"queries": (queries, shared), "keys": (keys, 1), "values": (values, 1)}
    found: dict[str, Tensor] = {}
    for number, (name, (small, times)) in enumerate(maps.items()):
        layer: Any = getattr(block, name)
        each = [one for one in small for _ in range(times)]
        start = number * block.heads * r if block.is_packed else 0
        for place, one in enumerate(each):
            rows = slice(start + place * r, start + (place + 1) * r)
            _mix_rows_(layer, rows, kept, one)
        full = torch.block_diag(*each)
        key = block.names[name]
        found[key] = torch.block_diag(found[key], full) if key in found else full
    weight = block.output.weight.detach().clone()
    for place, one in enumerate(one for one in columns for _ in range(shared)):
        columns_at = slice(place * r, (place + 1) * r)
        weight[:, place * r + kept] = (weight[:, columns_at].double() @ one.T).to(weight)
    set_tensor_(block.output, "weight", weight)
    return found


def _mix_rows_(layer: Any, rows: slice, kept: Tensor, weights: Tensor) -> None:
    for name in ("weight", "bias"):
        tensor = getattr(layer, name)
        if tensor is not None:
            new = tensor.detach().clone()
            part = tensor.detach()[rows].double()
            new[rows.start + kept] = (weights @ part).to(new)
            set_tensor_(layer, name, new)
