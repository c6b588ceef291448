"""Token sequences for a language model that came without any: the model writes them itself.

A model that can `generate` (those of transformers) does that: it remembers what it has read, so that all of its text
costs about as much as one pass. Of any other one, a sequence is a fixed point of x_t = F^-1(u_t | x_<t), with F the
distribution that the model gives for the next token and u_t uniform numbers that stay as they are: after k passes over
whole sequences the first k tokens behind the first are exact samples of the model, and the others are not (a model
is surprised by them: 4.0 nats where its own text has 1.4). So such sequences are as long as there are passes, if the
network takes shorter ones than its example.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from intrafusion.running import evaluating, leaves, map_tensors, repeatable

Run = Callable[[nn.Module, Any], Any]

_PASSES = 48
_TOKENS, _FEWEST, _MOST = 2**14, 16, 500
"""As many sequences as make that many tokens, between the two."""
_ENOUGH = 2**17
"""Beside so many tokens of the user's own a model writes none."""
_LOGITS = 2**25
"""So many numbers a batch's logits are."""
_OPENINGS, _TOGETHER = 2**12, 2**9
"""As many sequences of one token, so many at once."""
_NEVER = -1
"""The token that ends a text is one like others: another one may begin behind it."""


def sequence_count(ids: Tensor) -> int:
    """How many sequences of the length of `ids` [B, T] are drawn."""
    return min(_MOST, max(_FEWEST, _TOKENS // ids.shape[1]))


def count_beside(model: nn.Module, ids: Tensor, batches: Sequence) -> int:
    """How many sequences like `ids` a model writes beside the user's own text: as many tokens as that, or `_TOKENS`.

    What the model has learnt is wider than a text of one kind, and a correction holds for what it has seen. None where
    there is text enough, or the model cannot `generate`, so that writing costs more than a pass.
    """
    given = [leaf for batch in batches for leaf in leaves(batch) if isinstance(leaf, Tensor) and _may_be_ids(leaf)]
    own = sum(tokens.numel() for tokens in given if not _is_mask(tokens))
    return min(own, _TOKENS) // ids.shape[1] if own < _ENOUGH and _can_generate(model) else 0


def token_ids(example: Any) -> Tensor | None:
    """The integers [B, T] of an example that has nothing else but masks of ones; None if there is more, or less."""
    tensors = [leaf for leaf in leaves(example) if isinstance(leaf, Tensor)]
    ids = [t for t in tensors if _may_be_ids(t) and not _is_mask(t)]
    others = [t for t in tensors if all(t is not found for found in ids)]
    if not ids and len(tensors) == 1 and _may_be_ids(tensors[0]):
        return tensors[0]  # ones, but no mask of anything
    if len(ids) != 1 or not all(_is_mask(t) and t.shape == ids[0].shape for t in others):
        return None
    return ids[0]


def _may_be_ids(value: Tensor) -> bool:
    return value.dtype in (torch.int64, torch.int32) and value.dim() == 2


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
    """Batches of inputs like the example, with tokens that the model has drawn. The first token is any of them.

    count: of sequences as long as the example's; as many tokens in more of them, where they have to be shorter.
    """
    length = ids.shape[1]
    with torch.no_grad(), evaluating(model):
        vocabulary = _vocabulary(model, example, ids, run)
        tokens = torch.randint(vocabulary, (count, length), generator=generator).to(ids)
        each = min(count, max(1, _LOGITS // (length * max(1, vocabulary))))
        written = _generated(model, tokens)
        if written is not None:
            return [_with(example, ids, some) for some in written.split(each)]
        shown = partial(_shown, model, example, ids, run)
        exact = _exact(shown, tokens, vocabulary)
        pieces = length // exact
        tokens = tokens[:, : pieces * exact].reshape(-1, exact)
        parts = tokens.split(each * pieces)
        bar = tqdm(parts, desc="synthetic text", delay=2, leave=False, disable=None if progress else True)
        return [_with(example, ids, _drawn(shown, part, vocabulary, generator)) for part in bar]


def openings(
    model: nn.Module, example: Any, run: Run, own: Sequence, drawn: Sequence, *, generator: torch.Generator
) -> list[Any]:
    """The tokens of some sequences, each as the first of one: inputs like the example, one token long.

    own, drawn: the user's batches and those that the model wrote.

    Many models make something else of a first token than of all others (SmolLM2: 250 times as large), and all others
    rest their attention on it; of a hundred sequences there are only a hundred. None for what is no language model
    (`why_not`), or takes no such inputs, and where most of the user's begin with the same token, which then is enough.
    """
    found = [tokens for batch in (*own, *drawn) if (tokens := token_ids(batch)) is not None]
    if token_ids(example) is None or len(found) < max(1, len(own) + len(drawn)):
        return []
    example = map_tensors(example, lambda value: value[:1])
    ids = token_ids(example)
    assert ids is not None
    firsts = torch.cat([tokens[:, 0] for tokens in found[: len(own) or None]])
    if 2 * int(firsts.unique(return_counts=True)[1].max()) > len(firsts) > 1:
        return []
    every = torch.cat([tokens.flatten() for tokens in found]).unique()
    with torch.no_grad(), evaluating(model):
        vocabulary = _vocabulary(model, example, ids, run)
        try:
            alone = _logits(run(model, _with(example, ids, ids[:, :1])), ids[:, :1], vocabulary)
        except Exception:  # it takes one length only
            return []
        before = _logits(run(model, example), ids, vocabulary)
    if alone is None or before is None or (alone - before[:, :1]).abs().max() > 1e-3 * before.abs().max():
        return []
    order = torch.randperm(len(every), generator=generator)[:_OPENINGS].to(every.device)
    return [_with(example, ids, some[:, None]) for some in every[order].split(_TOGETHER)]


def scores_of(model: nn.Module, example: Any, run: Run) -> Callable[[Any], Tensor] | None:
    """What finds a score for every token of a vocabulary, [B, T, V], among a network's outputs; None if there is none.

    example: inputs like those that the outputs will come from.
    """
    ids = token_ids(example)
    if ids is None:
        return None
    with torch.no_grad(), evaluating(model):
        vocabulary = _vocabulary(model, example, ids, run)
        if _logits(run(model, example), ids, vocabulary) is None:
            return None

    return lambda outputs: next(o for o in leaves(outputs) if isinstance(o, Tensor) and o.shape[2:] == (vocabulary,))


def _shown(model: nn.Module, example: Any, ids: Tensor, run: Run, tokens: Tensor) -> Any:
    return run(model, _with(example, ids, tokens))


def _generated(model: Any, tokens: Tensor) -> Tensor | None:
    """Sequences [n, T] that begin as `tokens` do, by the model's own `generate`; None if it has none, or fails."""
    if not _can_generate(model):
        return None
    start, more = tokens[:, :1].long(), tokens.shape[1] - 1
    try:
        with repeatable(tokens):
            written = model.generate(
                start, attention_mask=torch.ones_like(start), do_sample=True, num_beams=1, temperature=1.0, top_k=0,
                top_p=1.0, repetition_penalty=1.0, max_new_tokens=more, eos_token_id=_NEVER, pad_token_id=0,
                use_cache=True,
            )  # fmt: skip
    except Exception:  # whatever its config or its cache does not allow
        return None
    return written.to(tokens) if isinstance(written, Tensor) and written.shape == tokens.shape else None


def _can_generate(model: Any) -> bool:
    return callable(getattr(model, "generate", None)) and bool(getattr(model, "can_generate", bool)())


def _exact(logits_of: Callable[[Tensor], Any], tokens: Tensor, vocabulary: int) -> int:
    """How long sequences are all of whose tokens can be drawn from the model; as long as `tokens`, if it must be."""
    length = tokens.shape[1]
    if length > _PASSES + 1:
        try:
            short = tokens[:1, : _PASSES + 1]
            if _logits(logits_of(short), short, vocabulary) is not None:
                return _PASSES + 1
        except Exception:  # it takes one length only
            pass
    return length


def _drawn(logits_of: Callable[[Tensor], Any], tokens: Tensor, vocabulary: int, generator: torch.Generator) -> Tensor:
    """The same for any model, in at most `_PASSES` passes over whole sequences."""
    numbers = torch.rand(tokens.shape, generator=generator).to(tokens.device)
    for _ in range(min(tokens.shape[1] - 1, _PASSES)):
        logits = _logits(logits_of(tokens), tokens, vocabulary)
        assert logits is not None
        again = torch.cat([tokens[:, :1], _next(logits[:, :-1], numbers[:, 1:]).to(tokens)], dim=1)
        done, tokens = torch.equal(again, tokens), again
        if done:
            break
    return tokens


def _next(logits: Tensor, numbers: Tensor) -> Tensor:
    """[n, T] the token at which the distribution function of logits [n, T, V] comes to numbers [n, T]."""
    reached = logits.float().softmax(dim=-1).cumsum(dim=-1)
    return torch.searchsorted(reached, (numbers * reached[..., -1])[..., None])[..., 0].clamp(max=logits.shape[-1] - 1)


def _with(example: Any, ids: Tensor, tokens: Tensor) -> Any:
    """The example with other tokens, and masks of ones of their shape."""

    def other(value: Tensor) -> Tensor:
        return tokens if value is ids else value[:1, : tokens.shape[1]].expand_as(tokens).clone()

    return map_tensors(example, other)


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
