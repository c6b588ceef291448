"""Token sequences for a language model that came without any: the model writes them itself.

A sequence is a fixed point of x_t = F^-1(u_t | x_<t), with F the distribution that the model gives for the next token
and u_t uniform numbers that stay as they are: after k passes over whole sequences the first k tokens are exact samples
of the model, as after k steps of ordinary generation, and the others are drawn from what the pass before wrote. So the
number of passes does not grow with the length, and a network that takes one length only can be asked too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from intrafusion.running import evaluating, leaves, map_tensors

Run = Callable[[nn.Module, Any], Any]

_PASSES = 48
_TOKENS, _FEWEST, _MOST = 2**14, 16, 500
"""As many sequences as make that many tokens, between the two."""
_LOGITS = 2**25
"""So many numbers a batch's logits are."""


def sequence_count(ids: Tensor) -> int:
    """How many sequences of the length of `ids` [B, T] are drawn."""
    return min(_MOST, max(_FEWEST, _TOKENS // ids.shape[1]))


def token_ids(example: Any) -> Tensor | None:
    """The integers [B, T] of an example that has nothing else but masks of ones; None if there is more, or less."""
    tensors = [leaf for leaf in leaves(example) if isinstance(leaf, Tensor)]
    ids = [t for t in tensors if t.dtype in (torch.int64, torch.int32) and t.dim() == 2 and not _is_mask(t)]
    others = [t for t in tensors if all(t is not found for found in ids)]
    if not ids and len(tensors) == 1 and tensors[0].dtype in (torch.int64, torch.int32) and tensors[0].dim() == 2:
        return tensors[0]  # ones, but no mask of anything
    if len(ids) != 1 or not all(_is_mask(t) and t.shape == ids[0].shape for t in others):
        return None
    return ids[0]


def _is_mask(value: Tensor) -> bool:
    return bool((value == 1).all())


def why_not(model: nn.Module, example: Any, ids: Tensor, run: Run) -> str:
    """Why no sequences can be drawn from a network; '' if it is a language model that reads from left to right."""
    with torch.no_grad(), evaluating(model):
        vocabulary = _vocabulary(model, example, ids, run)
        before = _logits(run(model, example), ids, vocabulary)
        if before is None:
            return "it does not give a score for every token of a vocabulary that it reads"
        if ids.shape[1] < 2:
            return "its example is one token long"
        other = ids.clone()
        other[:, -1] = (other[:, -1] + 1) % vocabulary
        after = _logits(run(model, _with(example, ids, other)), ids, vocabulary)
    assert after is not None
    gap = (after - before)[:, :-1].abs().max()
    if gap > 1e-3 * before.abs().max():
        return "what it says of a token depends on those behind it"
    return ""


def sequences(
    model: nn.Module, example: Any, ids: Tensor, run: Run, *, count: int, generator: torch.Generator, progress: bool
) -> list[Any]:
    """Batches of inputs like the example, with tokens that the model has drawn. The first token is any of them."""
    length = ids.shape[1]
    with torch.no_grad(), evaluating(model):
        vocabulary = _vocabulary(model, example, ids, run)
        each = min(count, max(1, _LOGITS // (length * max(1, vocabulary))))
        starts = range(0, count, each)
        bar = tqdm(total=len(starts), desc="synthetic text", delay=2, leave=False, disable=None if progress else True)
        found = []
        with bar:
            for start in starts:
                size = min(each, count - start)
                tokens = torch.randint(vocabulary, (size, length), generator=generator).to(ids)
                numbers = torch.rand(size, length, generator=generator).to(ids.device)
                for _ in range(min(length - 1, _PASSES)):
                    logits = _logits(run(model, _with(example, ids, tokens)), tokens, vocabulary)
                    assert logits is not None
                    again = torch.cat([tokens[:, :1], _next(logits[:, :-1], numbers[:, 1:]).to(ids)], dim=1)
                    done, tokens = torch.equal(again, tokens), again
                    if done:
                        break
                found.append(_with(example, ids, tokens))
                bar.update()
    return found


def _next(logits: Tensor, numbers: Tensor) -> Tensor:
    """[n, T] the token at which the distribution function of logits [n, T, V] comes to numbers [n, T]."""
    reached = logits.float().softmax(dim=-1).cumsum(dim=-1)
    return torch.searchsorted(reached, (numbers * reached[..., -1])[..., None])[..., 0].clamp(max=logits.shape[-1] - 1)


def _with(example: Any, ids: Tensor, tokens: Tensor) -> Any:
    """The example with other tokens, and masks of ones of their shape."""
    return map_tensors(example, lambda value: tokens if value is ids else value[:1].expand_as(tokens).clone())


def _vocabulary(model: nn.Module, example: Any, ids: Tensor, run: Run) -> int:
    """The size of the embedding that reads the tokens; 0 if none does."""
    sizes: list[int] = []

    def read(layer: Any, args: tuple) -> None:
        if args and isinstance(args[0], Tensor) and args[0].shape == ids.shape and torch.equal(args[0], ids):
            sizes.append(layer.num_embeddings)

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                stack.callback(module.register_forward_pre_hook(read).remove)
        run(model, example)
    return max(sizes, default=0)


def _logits(outputs: Any, ids: Tensor, vocabulary: int) -> Tensor | None:
    shape = (*ids.shape, vocabulary)
    found = (value for value in leaves(outputs) if isinstance(value, Tensor) and value.is_floating_point())
    return next((value for value in found if tuple(value.shape) == shape and vocabulary > 0), None)
