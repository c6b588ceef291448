"""Keep a pruned network: weights, and what pruning changed about the modules, in one file without pickles.

>>> intrafusion.save(model, "pruned.safetensors", source="torchvision:resnet50", num_classes=1000)
>>> model = intrafusion.load("pruned.safetensors")                 # in any process
>>> model = intrafusion.load("mine.safetensors", MyNetwork())      # a network of your own: the dense becomes the pruned
"""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.checkpoint import container, inventory, rebuilt, restore, sizes
from intrafusion.checkpoint.manifest import CheckpointError, Kept, Manifest, short
from intrafusion.models import LIBRARIES, UnknownModelError, named_model

__all__ = ["CheckpointError", "describe", "load", "save"]

_PACKAGES = ("intrafusion", "torch", "torch-pruning", "torchvision", "timm")


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    source: str | None = None,
    num_classes: int | None = None,
    recipe: Any = None,
    pruner: Any = None,
) -> None:
    """Write a pruned network to a file that `load` makes the same network from.

    All parameters and buffers (those that are not in the state dict too), the sizes and factors of every module, which
    parameters are frozen or tied, and the mode of every module are kept. Optimizer state, hooks and attributes that
    are neither numbers nor tensors of a module are not.

    model: the network, on any device, also inside DataParallel, DistributedDataParallel or torch.compile.
    source, num_classes: where `load` gets the dense network if it is given none: `torchvision:NAME`, `timm:NAME` or a
    network of `intrafusion.models`, and its number of outputs. recipe: what else is worth knowing, as text or
    anything that JSON can hold. pruner: the torch-pruning pruner that cut the network, for the channels it kept.

    Raises CheckpointError for a network that the format cannot hold, OSError if the file cannot be written; what was
    at `path` is then still there.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")
    if (source is None) != (num_classes is None):
        raise ValueError("source and num_classes go together: the dense network cannot be built from one of them")
    inventory.check_can_be_saved(model)
    sizes.check_agreement(model)
    named = inventory.tensors_of(model)
    tied = inventory.shared(named)
    first = {name: found for name, found in named.items() if name not in tied}
    document = Manifest(
        modules=inventory.modules_of(model),
        tensors={name: inventory.entry_of(kind, t) if t is not None else None for name, (kind, t) in first.items()},
        tied=tied,
        source=source,
        num_classes=num_classes,
        recipe=recipe,
        packages=_versions(),
        kept=_kept(pruner, model) if pruner is not None else {},
    )
    container.write(Path(path), document, {name: _plain(t) for name, (_, t) in first.items() if t is not None})


def load(
    path: str | os.PathLike[str], model: nn.Module | None = None, *, device: torch.device | str | None = None
) -> nn.Module:
    """The network that `save` wrote: `model`, the dense network of the same architecture, changed in place.

    The result is the saved network bit for bit: weights and buffers in their dtypes, sizes, modes, frozen and tied
    parameters. Nothing is traced and no code of the file is run. Parameters are new objects, so make the optimizer (and
    wrap in DistributedDataParallel) afterwards.

    model: None builds it from the source that the file names; a model on the meta device is filled on the CPU.
    device: where the network goes; None leaves every tensor on the device where `model` has it.

    Raises CheckpointError naming what differs if the file is damaged, foreign, of a newer format or for another
    network, OSError if it cannot be read; the model is then as it was.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise TypeError("load into the network itself, then wrap it: DistributedDataParallel keeps its old parameters")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")
    try:
        document, tensors = container.read(Path(path))
        dense = _build(document) if model is None else model
        undo = rebuilt.rebuild_(dense, document)
        try:
            planned = restore.plan(dense, document, tensors, device)
        except BaseException:
            undo()
            raise
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error.__cause__
    try:
        restore.apply_(planned)
    except BaseException:
        undo()
        raise
    return dense


def describe(path: str | os.PathLike[str]) -> Manifest:
    """What a checkpoint says about its network, without building it. Raises CheckpointError or OSError like `load`."""
    try:
        return container.read(Path(path))[0]
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error.__cause__


def _build(document: Manifest) -> nn.Module:
    """The dense network that a file names, on the CPU; the random state is left alone."""
    name, outputs = document.source, document.num_classes
    if name is None or outputs is None:
        raise CheckpointError("it does not name its dense network: give load(path, model=<the dense network>)")
    library, colon, _ = name.partition(":")
    if colon and library not in LIBRARIES:
        raise CheckpointError(
            f"its dense network comes from {short(name)}; no code that a file names is run: build it, "
            "then load(path, model=<the dense network>)"
        )
    widest = max((size for entry in document.tensors.values() if entry for size in entry.shape), default=0)
    if not 1 <= outputs <= widest:
        raise CheckpointError(f"it says that the network has {outputs} outputs, and has no tensor of that size")
    try:
        with torch.random.fork_rng(devices=[]):
            return named_model(name, outputs)
    except UnknownModelError as error:
        raise CheckpointError(f"its dense network cannot be built: {error}") from error
    except Exception as error:
        raise CheckpointError(f"its dense network {short(name)} cannot be built: {error}") from error


def _plain(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, and alone in its memory."""
    plain = tensor.detach().cpu().contiguous()
    return plain if plain.untyped_storage().nbytes() == plain.nbytes else plain.clone()


def _kept(pruner: Any, model: nn.Module) -> dict[str, Kept]:
    """The channels that stay of every layer whose cuts are all in the pruner's history."""
    layers = dict(inventory.walk(model))
    channels: dict[tuple[str, str], list[int]] = {}
    widths: dict[tuple[str, str], int] = {}
    for name, is_out, removed in pruner.pruning_history():
        side, gone = ("out" if is_out else "in"), {int(i) for i in removed}
        initial = pruner.layer_init_out_ch if is_out else pruner.layer_init_in_ch
        key, layer = (name, side), layers.get(name)
        if layer not in initial:
            continue
        widths[key] = int(initial[layer])
        before = channels.get(key, list(range(widths[key])))
        channels[key] = [channel for place, channel in enumerate(before) if place not in gone]
    present = {"out": pruner.DG.get_out_channels, "in": pruner.DG.get_in_channels}
    return {
        name: Kept(side, widths[name, side], tuple(stay))
        for (name, side), stay in channels.items()
        if present[side](layers[name]) == len(stay)
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
