"""Which kinds of width of a network are cut, each by its own ratio; and the layers that nobody wants to be cut.

feed_forward  channels between two linear layers: the hidden units of a transformer's feed-forward layers
heads         whole attention heads; where several share one key and value, as many of each of these
head_dim      channels inside all heads of a layer
stream        a residual stream that attention or norms read, and all that reads and writes it
channels      everything else: convolutions

What no layer reads, such as scores of classes, is no width: it is what the network gives.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch_pruning.dependency.group import Group

from intrafusion.groups.kinds.normalisation import LayerNorm, RMSNorm
from intrafusion.prune import attention

KINDS = ("feed_forward", "heads", "head_dim", "stream", "channels")
_LABELS = ("classifier", "score", "qa_outputs", "head", "classification_head")


def checked(widths: Any) -> dict[str, float] | None:
    """As given. Raises ValueError or TypeError for kinds that do not exist and ratios outside [0, 1)."""
    if widths is None:
        return None
    if not isinstance(widths, Mapping):
        raise TypeError(f"widths is {widths!r}: give a dictionary from a kind of width to a ratio, as {{'heads': 0.3}}")
    for kind, ratio in widths.items():
        if kind not in KINDS:
            raise ValueError(f"widths names {kind!r}: choose among {', '.join(map(repr, KINDS))}")
        number = isinstance(ratio, (int, float)) and not isinstance(ratio, bool)
        if not number or not 0 <= ratio < 1:
            raise ValueError(f"widths[{kind!r}] is {ratio!r}: it must be in [0, 1)")
    return dict(widths)


def asks_for_heads(widths: Mapping[str, float] | None, given: Mapping[str, Any]) -> bool:
    """Shall heads, or channels inside them, be cut as such? given: a pruner's arguments, for where there are no widths.

    Torch-Pruning's `prune_head_dims` says nothing: that is its default, and it cuts an nn.MultiheadAttention with the
    stream.
    """
    if widths is None:
        return bool(given.get("prune_num_heads"))
    return any(widths.get(kind) for kind in ("heads", "head_dim"))


def output_layers(model: Any) -> list[nn.Module]:
    """The layers that make scores of tokens or classes, where a network of `transformers` or `timm` says which."""
    found = []
    for name in ("get_output_embeddings", "get_classifier"):
        method = getattr(model, name, None)
        if callable(method):
            try:
                found.append(method())
            except Exception:  # a network that has no such layer may say so by any error
                continue
    config: Any = getattr(model, "config", None)
    if hasattr(config, "num_labels"):
        heads = (getattr(model, name, None) for name in _LABELS)
        found += [layer for layer in heads if getattr(layer, "out_features", 0) == config.num_labels]
    return [layer for layer in found if isinstance(layer, nn.Module) and any(True for _ in layer.parameters())]


class Asked:
    """The kinds of width that a pruner was asked to cut, and those of them that no step has cut yet."""

    def __init__(self, pruner: Any, widths: Mapping[str, float] | None) -> None:
        """Leave alone every group of another kind, and give the others their ratio.

        Raises ValueError for a kind that the network has none of, or that must not be cut there.
        """
        self._widths = dict(widths or {})
        self._kinds = {} if widths is None else _restrict_(pruner, widths)
        self._waiting = {kind for kind, ratio in self._widths.items() if ratio}

    def begin_(self, pruner: Any) -> None:
        """A step begins."""
        if self._kinds:
            _pace_heads_(pruner)

    def see(self, pruner: Any, group: Group) -> None:
        """Torch-Pruning has chosen to cut a group."""
        if pruner.is_trying:
            return
        root = group[0].dep
        kinds = {self._kinds.get((root.target.module, pruner.DG.is_out_channel_pruning_fn(root.handler)))}
        if kinds == {"heads"}:
            layers, now = {item[0].target.module for item in group}, attention.present(pruner)
            gone = any(block.heads > now[block.name].heads for block in pruner.heads if block.output in layers)
            kinds = ({"heads"} if gone else set()) | ({"head_dim"} if pruner.prune_head_dims else set())
        self._waiting = self._waiting - kinds

    def warn(self, pruner: Any) -> None:
        """The last step is over: tell of which kinds nothing was cut."""
        if pruner.current_step != pruner.iterative_steps or pruner.is_trying:
            return
        allocated = pruner.report.allocation is not None  # ratios of 0 are what was found best
        waiting = self._waiting & {"heads", "head_dim", "stream"} if allocated else self._waiting
        if waiting:
            listed = ", ".join(f"{kind!r} by {self._widths[kind]}" for kind in sorted(waiting))
            warnings.warn(
                f"nothing was cut of {listed}: torch-pruning rounds up what goes, and leaves a width alone that would "
                "go as a whole; or something else keeps it (round_to, max_pruning_ratio, ignored_layers, an importance "
                "without scores)",
                stacklevel=5,
            )


def _restrict_(pruner: Any, widths: Mapping[str, float]) -> dict[tuple[Any, bool], str]:
    """Leave alone every group of another kind, and give the others their ratio.

    Returns their kinds, by the layers that may be their roots and by whether it is what these give, not what they read.
    """
    found: set[str] = set()
    kinds: dict[tuple[Any, bool], str] = {}
    for group in list(pruner.all_groups()):
        kind = kind_of_group(pruner, group)
        found.add(kind)
        ratios = [widths.get(k, 0) for k in (("heads", "head_dim") if kind == "heads" else (kind,))]
        layers = [item.dep.target.module for item in group if pruner.DG.is_out_channel_pruning_fn(item.dep.handler)]
        if not any(ratios):
            pruner.ignored_layers.extend(layer for layer in layers if isinstance(layer, nn.Module))
            continue
        kinds.update({(layer, True): kind for layer in layers})
        if kind == "heads":  # torch-pruning takes the layer that reads them for their root, but its ratio is another's
            kinds.update({(layer, False): kind for layer in _readers(pruner, group)})
        for layer in layers:
            set_ratio_(pruner, layer, max(ratios) if kind == "heads" and not widths.get("head_dim") else ratios[-1])
    _set_heads(pruner, widths)
    there = found - {"output"} | ({"head_dim"} if "heads" in found else set())
    missing = [kind for kind, ratio in widths.items() if ratio and kind not in there]
    if missing:
        known = ", ".join(sorted(there)) or "nothing"
        raise ValueError(f"widths names {', '.join(map(repr, missing))}, but this network has {known} to cut")
    return kinds


def kind_of_group(pruner: Any, group: Group) -> str:
    """One of `KINDS`, "heads" also stands for "head_dim"; "output" if no layer reads the channels."""
    if pruner.is_attention(group):
        return "heads"
    layers = {id(item.dep.target.module) for item in group}
    reading = [item.dep.target.module for item in group if pruner.DG.is_in_channel_pruning_fn(item.dep.handler)]
    if any(id(layer) in layers for block in pruner.heads for layer in block.projections) or any(
        layer in pruner.num_heads for layer in reading
    ):
        return "stream"
    slots = pruner.table(group).slots
    if not any(slot.reads for slot in slots):
        return "output"
    if any(isinstance(slot.kind, (LayerNorm, RMSNorm)) for slot in slots) and sum(s.makes_channels for s in slots) > 1:
        return "stream"
    making = [item.dep.target.module for item in group if pruner.DG.is_out_channel_pruning_fn(item.dep.handler)]
    made = [layer for layer in making if any(True for _ in _parameters(layer))]
    return "feed_forward" if made and all(isinstance(layer, nn.Linear) for layer in made) else "channels"


def _parameters(layer: Any) -> Iterable[nn.Parameter]:
    return layer.parameters() if isinstance(layer, nn.Module) else ()


def _readers(pruner: Any, group: Group) -> list[nn.Module]:
    return [
        item.dep.target.module
        for item in group
        if pruner.DG.is_in_channel_pruning_fn(item.dep.handler) and isinstance(item.dep.target.module, nn.Linear)
    ]


def set_ratio_(pruner: Any, layer: Any, ratio: float) -> None:
    """Give a layer its ratio as torch-pruning's `pruning_ratio_dict` does."""
    if isinstance(layer, nn.Module):
        schedule = pruner.iterative_pruning_ratio_scheduler(ratio, pruner.iterative_steps)
        pruner.pruning_ratio_dict[layer] = schedule
        pruner._layer_to_scope.setdefault(layer, (f"width_{len(pruner._layer_to_scope)}", [layer]))


def _set_heads(pruner: Any, widths: Mapping[str, float]) -> None:
    stuck = [block.name for block in pruner.heads if not block.dims_move]
    if widths.get("head_dim") and stuck:
        raise ValueError(
            f"widths['head_dim']: the channels inside the heads of {stuck[0]!r} are told apart by something else "
            "(rotary positions, a norm inside the heads), so that their number cannot change: cut heads instead"
        )
    fixed = [block.name for block in pruner.heads if not block.heads_move]
    if widths.get("heads") and fixed:
        raise ValueError(
            f"widths['heads']: the heads of {fixed[0]!r} are told apart by something else (a table of positions for "
            "each head, slopes), or their number is read from the config of all layers: cut other widths, as head_dim"
        )
    pruner.prune_num_heads = bool(widths.get("heads"))
    pruner.prune_head_dims = bool(widths.get("head_dim"))
    pruner.head_pruning_ratio = widths.get("heads", 0.0)
    pruner.per_step_head_pruning_ratio = pruner.iterative_pruning_ratio_scheduler(
        pruner.head_pruning_ratio, pruner.iterative_steps
    )


def _pace_heads_(pruner: Any) -> None:
    """Before a step: torch-pruning takes its ratio of the heads that are left, where it is meant of those at first."""
    if pruner.global_pruning or not pruner.prune_num_heads:
        return
    wanted = pruner.per_step_head_pruning_ratio[min(pruner.current_step, pruner.iterative_steps)]
    for block in attention.present(pruner).values():
        first = pruner.init_num_heads.get(block.queries, block.heads)
        ratio = max(0.0, 1 - first * (1 - wanted) / block.heads - 1e-9)  # it rounds up, rounding errors too
        schedule = [ratio] * (pruner.iterative_steps + 1)
        pruner.head_pruning_ratio_dict.update(dict.fromkeys(block.projections, schedule))
