"""Which attributes of a module pruning may change, and what they must agree with.

A checkpoint's numbers end up as attributes of the user's modules, so a file may only do what pruning does: sizes shrink
and stay what the tensors say, factors stay finite. Anything else means that the file is for another network.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from intrafusion.checkpoint.inventory import numbers_of, walk
from intrafusion.checkpoint.manifest import CheckpointError, listed

_SIZES = frozenset({
    "in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "normalized_shape",
    "num_channels", "num_groups", "num_parameters", "embedding_dim", "embed_dim", "kdim", "vdim", "num_heads",
    "head_dim", "hidden_size", "input_size",
})  # fmt: skip
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
_LAYER_NORMS = (nn.LayerNorm, nn.RMSNorm)

Shape = tuple[int, ...]


def changes(module: nn.Module, saved: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(the attributes that have to be set, those that no pruning sets like this) to make `module` the saved one.

    Attributes that the module does not have are left out: they differ between versions of a library.
    """
    new, wrong = {}, []
    for name, now in numbers_of(module).items():
        value = saved.get(name, now)
        kind = type(now)
        if isinstance(now, (tuple, list)) and isinstance(value, list):
            value = kind(value)
        if type(value) is kind and value == now:
            continue
        if type(value) is not kind or not _may_become(module, name, now, value):
            wrong.append(f"{name} is {value} in the file, {now} in the model")
        else:
            new[name] = value
    return new, wrong


def disagreement(module: nn.Module, attributes: dict[str, Any], shapes: dict[str, Shape | None]) -> str:
    """What is wrong with a module of torch.nn that would have these attributes and tensors; empty if it is sound.

    shapes: of the module's own tensors, None for one that it does without.
    """
    if not _is_torchs(module):
        return ""
    sizes = {**numbers_of(module), **attributes}
    try:
        expected, required = _expected_shapes(module, sizes)
    except KeyError as error:
        return f"its {error.args[0]} is not a number"
    except ValueError as error:
        return str(error)
    for name, shape in expected.items():
        there = shapes.get(name, shape)
        if there is None and name in required:
            return f"its {name} is missing"
        if there is not None and there != shape:
            return f"its {name} is {list(there)}, its sizes ask for {list(shape)}"
    return ""


def check_agreement(model: nn.Module) -> None:
    """Raise CheckpointError if a layer's attributes are not the sizes of its tensors: `load` would not take it."""
    wrong = []
    for name, module in walk(model):
        own = {**module._parameters, **module._buffers}
        shapes = {key: None if tensor is None else tuple(tensor.shape) for key, tensor in own.items()}
        reason = disagreement(module, {}, shapes)
        wrong += [f"{name} ({reason})"] if reason else []
    if wrong:
        raise CheckpointError(f"layers whose attributes are not the sizes of their tensors: {listed(wrong)}")


def _is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.modules.")


def _may_become(module: nn.Module, name: str, now: Any, value: Any) -> bool:
    if isinstance(now, float):
        return True
    if _is_torchs(module) and name not in _SIZES:
        return False
    if isinstance(now, int):
        return 1 <= value <= now
    return len(value) == len(now) and all(new == old or 1 <= new <= old for new, old in zip(value, now, strict=True))


def _expected_shapes(module: nn.Module, sizes: dict[str, Any]) -> tuple[dict[str, Shape], frozenset[str]]:
    """(shapes of a module's tensors, names of those it cannot do without)"""
    weight, nothing = frozenset({"weight"}), frozenset()
    if isinstance(module, nn.Linear):
        return {"weight": (sizes["out_features"], sizes["in_features"]), "bias": (sizes["out_features"],)}, weight
    if isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED)):
        rows, columns, groups = sizes["out_channels"], sizes["in_channels"], sizes["groups"]
        first, second = (columns, rows) if isinstance(module, _TRANSPOSED) else (rows, columns)
        _check_divides(groups, rows, columns)
        return {"weight": (first, second // groups, *sizes["kernel_size"]), "bias": (rows,)}, weight
    if isinstance(module, _NORMS):
        names = ("weight", "bias", "running_mean", "running_var")
        return dict.fromkeys(names, (sizes["num_features"],)), nothing
    if isinstance(module, _LAYER_NORMS):
        return dict.fromkeys(("weight", "bias"), tuple(sizes["normalized_shape"])), nothing
    if isinstance(module, nn.GroupNorm):
        _check_divides(sizes["num_groups"], sizes["num_channels"])
        return dict.fromkeys(("weight", "bias"), (sizes["num_channels"],)), nothing
    if isinstance(module, nn.PReLU):
        return {"weight": (sizes["num_parameters"],)}, weight
    if isinstance(module, nn.Embedding):
        return {"weight": (sizes["num_embeddings"], sizes["embedding_dim"])}, weight
    if isinstance(module, nn.MultiheadAttention):
        width = sizes["embed_dim"]
        _check_divides(sizes["num_heads"], width)
        return {"in_proj_weight": (3 * width, width), "in_proj_bias": (3 * width,)}, nothing
    return {}, nothing


def _check_divides(groups: int, *widths: int) -> None:
    if any(width % groups for width in widths):
        raise ValueError(f"{groups} groups of {', '.join(map(str, widths))} channels")
