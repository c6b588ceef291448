"""The channels inside attention heads become fewer: what the heads compute is measured, and the layers are rewritten.

Torch-Pruning cuts the same channels of every head of a layer; they are all rewritten before, so that those that stay
carry the best low rank of the head's two circuits (`ot.circuits`). Whole heads are not changed by this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from intrafusion.correct.refit import set_tensor_
from intrafusion.correct.survey import Run
from intrafusion.groups.heads import Heads
from intrafusion.groups.layout import at_least_float32, from_channels, mix_, to_channels
from intrafusion.groups.table import GroupTable
from intrafusion.ot.circuits import low_rank
from intrafusion.ot.regression import Moments
from intrafusion.running import evaluating


class HeadMoments:
    """Second moments [heads, r, r] of what every block's heads give in a network, on all batches: one pass.

    Keys are taken about their mean: what is the same for all keys shifts all logits of a query alike.
    """

    def __init__(self, network: nn.Module, blocks: Sequence[Heads], run: Run, batches: Sequence) -> None:
        self._sums: dict[tuple[str, str], Moments] = {}
        with ExitStack() as stack, torch.no_grad(), evaluating(network):
            for block in blocks:
                layers = {key: network.get_submodule(name) for key, name in block.names.items()}
                stack.callback(layers["output"].register_forward_pre_hook(self._reads(block)).remove)
                for key in ("queries",) if block.is_packed else ("queries", "keys"):
                    stack.callback(layers[key].register_forward_hook(self._gives(block, key)).remove)
            for batch in batches:
                run(network, batch)

    def of(self, block: Heads) -> dict[str, Tensor]:
        """queries, keys, read (what the output layer reads): by name."""
        found = {key: sums for (name, key), sums in self._sums.items() if name == block.name}
        return {key: (sums.centred()[0] if key == "keys" else sums.xx) / sums.n for key, sums in found.items()}

    def _reads(self, block: Heads) -> Callable:
        return lambda _layer, args: self._add(block, "read", args[0], block.heads)

    def _gives(self, block: Heads, key: str) -> Callable:
        def hook(_layer: nn.Module, _args: Any, output: Tensor) -> None:
            if block.is_packed:
                queries, keys, _ = output.chunk(3, dim=-1)
                self._add(block, "queries", queries, block.heads)
                self._add(block, "keys", keys, block.heads)
            else:
                self._add(block, key, output, block.heads if key == "queries" else block.key_heads)

        return hook

    def _add(self, block: Heads, key: str, value: Tensor, heads: int) -> None:
        x = value.flatten(0, -2).unflatten(-1, (heads, -1)).movedim(1, 0)
        x = x.to(at_least_float32(x.dtype))
        more, known = Moments.of(x, x[..., :0]), self._sums.get((block.name, key))
        self._sums[block.name, key] = more if known is None else known + more


class Reduction:
    """The channels inside the heads of a block, before some are cut (a `groups.apply.Rewrite`).

    moments: of `HeadMoments`. kept: [k] channels inside each head. The logits keep their scale where that is made of
    the number of channels when the network runs, which will be smaller.
    """

    def __init__(self, block: Heads, moments: Mapping[str, Tensor], kept: Tensor) -> None:
        self.names, self._kept, self._block = block.names, kept, block
        r, k, shape = block.dim, len(kept), (block.key_heads, block.shared)
        output = block.output.weight.detach().double().unflatten(1, (*shape, r))
        reads = torch.einsum("mgsr,mgst->grt", output, output)
        seen, asked = (moments[key].unflatten(0, shape).sum(dim=1).to(reads.device) for key in ("read", "queries"))
        shown, scale = moments["keys"].to(reads.device), (k / r) ** 0.5 if block.scaled else 1.0
        found: dict[str, list[Tensor]] = {"queries": [], "keys": [], "values": [], "output": []}
        for head in range(block.key_heads):
            value, column = low_rank(seen[head], reads[head], k)
            key, query = self.logits(shown[head], asked[head], k)
            found["keys"].append(key)
            found["values"].append(value)
            found["queries"] += [query * scale] * block.shared
            found["output"] += [column] * block.shared
        self._maps = found
        self._moments = {"queries": asked, "keys": shown, "values": seen}

    def logits(self, keys: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """[k, r] each: what the keys and queries of a head become, of second moments [r, r]."""
        return low_rank(keys, queries, k)

    def before_(self, graph: tp.DependencyGraph, table: GroupTable, change: Any = None) -> None:
        """Rewrite the channels that stay, at full size."""
        model, r = graph.model, self._block.dim
        for number, key in enumerate(("queries", "keys", "values")):
            layer: Any = model.get_submodule(self.names[key])
            start = number * self._block.width if self._block.is_packed else 0
            maps = self._maps[key]
            for head, small in enumerate(maps):
                rows = torch.arange(r) + start + head * r
                moment = self._moments[key][head * self._block.key_heads // len(maps)]
                for name in ("weight", "bias"):
                    self._mix_(layer, name, 0, rows, small, _reading(small, moment), change)
        output: Any = model.get_submodule(self.names["output"])
        values = [value for value in self._maps["values"] for _ in range(self._block.shared)]
        for head, (small, value) in enumerate(zip(self._maps["output"], values, strict=True)):
            self._mix_(output, "weight", 1, torch.arange(r) + head * r, small, value, change)

    def after_(self, graph: tp.DependencyGraph, table: GroupTable) -> None:
        """Nothing is left to do."""

    def stands_for(self, whole: Tensor) -> dict[str, Tensor]:
        """[left, full] what the outputs of the layers are when they have been cut, of what they gave, by layer name.

        whole: the heads that are left.
        """
        found: dict[str, Tensor] = {}
        for key in ("queries", "keys", "values"):
            every = self._maps[key]
            left = set(range(len(every)) if key != "queries" and self._block.shared > 1 else whole.tolist())
            maps = torch.block_diag(*(m if head in left else m[:0] for head, m in enumerate(every)))
            known = found.get(self.names[key])
            found[self.names[key]] = maps if known is None else torch.block_diag(known, maps)
        return found

    def _mix_(self, layer: Any, name: str, axis: int, at: Tensor, by: Tensor, carried: Tensor, change: Any) -> None:
        """Of channels `at` [r] of a tensor, those that stay become `by` [k, r] of all of them, gradients `carried`."""
        tensor = getattr(layer, name)
        if tensor is None:
            return
        matrix = to_channels(tensor.detach().double(), axis).clone()
        mix_(matrix, at[:, None].to(matrix.device), by.to(matrix.device), self._kept.to(matrix.device))
        set_tensor_(layer, name, from_channels(matrix, tensor, axis))
        if change is not None:
            change.mixes(layer, name, axis, at, self._kept, carried)


def _reading(small: Tensor, moment: Tensor) -> Tensor:
    """[k, r] transposed: what reads old channels, of second moment [r, r], off the new ones, small [k, r] of them."""
    seen = small @ moment
    return torch.linalg.pinv(seen @ small.T, hermitian=True) @ seen
