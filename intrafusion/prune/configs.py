"""The config of a `transformers` network follows the cut: `save_pretrained` and `from_pretrained` go on working.

Nobody says which field of a config holds which width. A network of the config's own class is built without memory, and
its shapes are compared with those of the pruned one: fields that held a width take what it has become, as long as that
brings the shapes nearer, until they are the same. Biases are given to a layer only where some flag of the config has
them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from intrafusion.groups.heads import DIMS, HEADS, KEY_HEADS
from intrafusion.groups.joined import JoinedLinear
from intrafusion.prune.sizes import Attribute

_NO_WIDTHS = ("token_id", "num_hidden_layers", "num_layers", "n_layer", "vocab_size", "max_position", "n_positions")
_ROUNDS = 12
_NO_CONFIG = (
    "no config of {} describes the pruned network ({}): save it with intrafusion.save, or prune all layers by the same "
    "ratio (no global pruning)"
)
_LEFT_OPEN = ("n_inner", "intermediate_size", "ffn_dim", "d_ff")
"""Widths that a config may leave to be computed."""

Shapes = dict[str, tuple[int, ...]]


def has_config(model: nn.Module) -> bool:
    """Is this a network that a config describes, as those of `transformers`?"""
    return hasattr(model, "save_pretrained") and hasattr(getattr(model, "config", None), "to_dict")


def without_bias(model: nn.Module) -> frozenset[str]:
    """Names of the layers that have no bias and must not get one: no flag of the config would let them be loaded."""
    if not has_config(model):
        return frozenset()
    config: Any = copy.deepcopy(model.config)
    for holder, name in _flags(config):
        setattr(holder, name, True)
    shapes = _shapes(model, config) or {}
    layers = (name for name, layer in model.named_modules() if getattr(layer, "bias", False) is None)
    return frozenset(name for name in layers if f"{name}.bias" not in shapes)


def follow(model: nn.Module, heads: Sequence[tuple[int, int, int]] = ()) -> tuple[list[Attribute], str]:
    """Set the fields of the network's config to what its layers have become.

    heads: (heads, heads of keys and values, width of a head) of every attention block.

    Returns what was set, and what stands in the way of saving it ('' if nothing does). Nothing is set if no config
    describes the network.
    Where a flag gives several layers a bias and some have none, they get one of zeros.
    """
    if not has_config(model):
        return [], ""
    want: Shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    config: Any = copy.deepcopy(model.config)
    _untie(model, config)
    if _shapes(model, config) is None:
        return [], ""  # it takes more than a config to make such a network
    if not _say_heads(config, heads):
        return [], _NO_CONFIG.format(type(model).__name__, "its layers have different numbers of heads")
    have = _shapes(model, config) or {}
    wrong = _wrong(have, want)
    for _ in range(_ROUNDS):
        if not wrong:
            break
        best = None
        for holder, name, value in _options(config, have, want):
            before = getattr(holder, name)
            setattr(holder, name, value)
            shapes = _shapes(model, config)
            setattr(holder, name, before)
            count = len(want) + 1 if shapes is None else len(_wrong(shapes, want))
            if shapes is not None and (best is None or count < best[0]):
                best = (count, holder, name, value, shapes)
        if best is None or best[0] >= len(wrong):
            break
        _, holder, name, value, have = best
        setattr(holder, name, value)
        wrong = _wrong(have, want)
    if wrong:
        told = [f"{name} {have.get(name, 'absent')}, pruned {want.get(name, 'absent')}" for name in wrong[:3]]
        return [], _NO_CONFIG.format(type(model).__name__, ", ".join(told))
    config = _without_spare_width(model, config, have)
    trouble = _refused(config)
    for name in sorted(have.keys() - want.keys()):
        layer: Any = model.get_submodule(name.rpartition(".")[0])
        for part in layer.parts if isinstance(layer, JoinedLinear) else (layer,):
            part.bias = nn.Parameter(part.weight.new_zeros(part.out_features), requires_grad=part.weight.requires_grad)
    return list(_taken_over(model.config, config)), trouble


def _shapes(model: nn.Module, config: Any) -> Shapes | None:
    try:
        with torch.device("meta"):
            made = type(model)(config)
    except Exception:  # whatever a foreign constructor raises for numbers that do not fit
        return None
    return {name: tuple(value.shape) for name, value in made.state_dict().items()}


def _say_heads(config: Any, heads: Sequence[tuple[int, int, int]]) -> bool:
    """Set the fields that hold numbers of heads, which shapes alone do not tell; False if the layers differ in them.

    heads: (heads, heads of keys and values, width) of every attention block. The width is said where it was left to be
    computed: it stays when heads go.
    """
    if not heads:
        return True
    if len(set(heads)) > 1:
        return False
    for names, value in zip((HEADS, KEY_HEADS, DIMS), heads[0], strict=True):
        for holder in _holders(config):
            for name in names:
                if type(getattr(holder, name, None)) is int and not _is_computed(holder, name):
                    setattr(holder, name, value)
    if getattr(config, "head_dim", None) is None and not _is_computed(config, "head_dim"):
        config.head_dim = heads[0][2]
    return True


def _is_computed(config: Any, name: str) -> bool:
    """Is it a field that a config makes of others, as Falcon's `head_dim`?"""
    return isinstance(getattr(type(config), name, None), property)


def _without_spare_width(model: Any, config: Any, have: Shapes) -> Any:
    """The config without a width of its heads, if it had none before and computes the same."""
    if getattr(model.config, "head_dim", None) is not None or getattr(config, "head_dim", None) is None:
        return config
    spare = copy.deepcopy(config)
    if hasattr(model.config, "head_dim"):
        spare.head_dim = None
    else:
        del spare.head_dim
    return spare if (_shapes(model, spare) or {}) == have else config


def _refused(config: Any) -> str:
    """What the config's own class has against its values, if it checks them; '' if nothing."""
    try:
        getattr(config, "validate", lambda: None)()
    except Exception as error:  # whatever a foreign class raises
        why = " ".join(str(error).split())
        return (
            f"the pruned network's config is refused by its own class ({why}), so that save_pretrained fails: prune to "
            "widths that it allows (round_to=...), or save the network with intrafusion.save"
        )
    return ""


def _wrong(have: Shapes, want: Shapes) -> list[str]:
    """Tensors that differ; a bias that only the config's network has can be zeros."""
    return [
        name
        for name in sorted(have.keys() | want.keys())
        if have.get(name) != want.get(name) and not (name not in want and name.endswith(".bias"))
    ]


def _untie(model: Any, config: Any) -> None:
    """Embeddings that were cut into two tensors are no longer tied."""
    names = ("get_input_embeddings", "get_output_embeddings")
    ends: list[Any] = [getattr(model, name, lambda: None)() for name in names]
    if None not in ends and ends[0].weight is not ends[1].weight and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False


def _holders(config: Any) -> list[Any]:
    """The config, and those inside of it."""
    return [config, *(value for value in vars(config).values() if hasattr(value, "to_dict"))]


def _flags(config: Any) -> Iterator[tuple[Any, str]]:
    for holder in _holders(config):
        yield from ((holder, name) for name, value in vars(holder).items() if value is False and "bias" in name)


def _options(config: Any, have: Shapes, want: Shapes) -> Iterator[tuple[Any, str, Any]]:
    """(config, field, value) that may bring the shapes nearer."""
    changes = {
        (old, new)
        for name in have.keys() & want.keys()
        for old, new in zip(have[name], want[name], strict=False)
        if old != new
    }
    for holder in _holders(config):
        for name, value in vars(holder).items():
            if value is None and name in _LEFT_OPEN:
                yield from ((holder, name, new) for new in sorted({new for _, new in changes}, reverse=True))
            if type(value) is not int or value < 2 or any(part in name for part in _NO_WIDTHS):
                continue
            if name in (*HEADS, *KEY_HEADS, *DIMS):
                continue
            for new in sorted({new for old, new in changes if old == value}, reverse=True):
                yield holder, name, new
    if any(name.endswith(".bias") and name not in have for name in want):
        yield from ((holder, name, True) for holder, name in _flags(config))


def _taken_over(config: Any, new: Any) -> Iterator[Attribute]:
    for number, (old, one) in enumerate(zip(_holders(config), _holders(new), strict=True)):
        where = "config" if number == 0 else f"config ({type(old).__name__})"
        for name, value in vars(one).items():
            before = vars(old).get(name)
            if isinstance(value, (int, bool)) and value != before:
                setattr(old, name, value)
                yield Attribute(where, name, before, value)
