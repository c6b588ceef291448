"""Make a dense network the saved one: everything is checked first, then changed, and put back if that fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from intrafusion.checkpoint.inventory import entry_of, join, tensors_of, unwrap, walk
from intrafusion.checkpoint.manifest import CheckpointError, Manifest, TensorEntry, listed, short
from intrafusion.checkpoint.sizes import changes, disagreement
from intrafusion.groups.snapshot import copy_state, restore_state


@dataclass(frozen=True)
class Change:
    """New tensors, attributes and mode of one module."""

    module: nn.Module
    training: bool
    attributes: dict[str, Any]
    parameters: dict[str, Tensor | None]
    buffers: dict[str, Tensor | None]

    def apply_(self) -> None:
        self.module.training = self.training
        vars(self.module).update(self.attributes)
        for name, parameter in self.parameters.items():
            setattr(self.module, name, parameter)  # an LSTM keeps a second list of its parameters
        self.module._buffers.update(self.buffers)


@dataclass
class _Problems:
    """What differs between a file and a network, by kind, so that all of it is said at once."""

    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, *descriptions: str) -> None:
        self.found.setdefault(kind, []).extend(descriptions)

    def raise_if_any(self, model: nn.Module) -> None:
        lines = [f"{kind}: {listed(names)}" for kind, names in self.found.items() if names]
        if lines:
            raise CheckpointError(f"it does not fit this {type(unwrap(model)).__name__}\n  " + "\n  ".join(lines))


def plan(model: nn.Module, manifest: Manifest, tensors: dict[str, Tensor], device: Any = None) -> list[Change]:
    """The changes that make the dense `model` the saved network; it is not touched yet.

    tensors: the file's. device: where all of them go; None keeps every tensor where the model has it. Raises
    CheckpointError, naming what differs, if the file is for another network or contradicts itself.
    """
    _check_tensors(manifest, tensors)
    modules, own = dict(walk(model)), tensors_of(model)
    entries = {**manifest.tensors, **{alias: manifest.tensors[name] for alias, name in manifest.tied.items()}}
    problems = _Problems()
    _compare_modules(problems, modules, manifest)
    _compare_tensors(problems, own, entries)
    problems.raise_if_any(model)
    attributes = {}
    for name, module in modules.items():
        attributes[name], wrong = changes(module, manifest.modules[name].attributes)
        problems.add("numbers that pruning does not change so", *(f"{short(name)}: {line}" for line in wrong))
        keys = [key for key in (*module._parameters, *module._buffers) if join(name, key) in entries]
        there = {key: entries[join(name, key)] for key in keys}
        shapes = {key: None if entry is None else entry.shape for key, entry in there.items()}
        reason = disagreement(module, attributes[name], shapes)
        problems.add("layers that contradict themselves", *([f"{short(name)}: {reason}"] if reason else []))
    problems.raise_if_any(model)
    make = _maker(manifest, tensors, _placement(own, device))

    def made(prefix: str, keys: Any) -> dict[str, Tensor | None]:
        return {key: make(join(prefix, key)) for key in keys if join(prefix, key) in entries}

    return [
        Change(
            module=module,
            training=manifest.modules[name].training,
            attributes=attributes[name],
            parameters=made(name, module._parameters),
            buffers=made(name, module._buffers),
        )
        for name, module in modules.items()
    ]


def apply_(planned: list[Change]) -> None:
    """Make all changes, or none if one fails."""
    before = [(vars(change.module), copy_state(vars(change.module))) for change in planned]
    try:
        for change in planned:
            change.apply_()
    except BaseException:
        for state, saved in before:
            restore_state(state, saved)
        raise


def _check_tensors(manifest: Manifest, tensors: dict[str, Tensor]) -> None:
    """Raise CheckpointError if the document and the tensors of a file are not about the same network."""
    described = {name: entry for name, entry in manifest.tensors.items() if entry is not None}
    odd = [short(name) for name in described.keys() ^ tensors.keys()]
    for name, entry in described.items():
        there = tensors.get(name)
        if there is None:
            continue
        found = entry_of(entry.kind, there)
        if (entry.dtype, entry.shape) != (found.dtype, found.shape) or (entry.trains and not _is_float(found)):
            odd.append(short(name))
    if odd:
        raise CheckpointError(f"its document and its tensors contradict each other about {listed(sorted(odd))}")


def _compare_modules(problems: _Problems, modules: dict[str, nn.Module], manifest: Manifest) -> None:
    problems.add("modules only in the file", *map(short, (name for name in manifest.modules if name not in modules)))
    for name, module in modules.items():
        entry, kind = manifest.modules.get(name), type(module).__name__
        if entry is None:
            problems.add("modules only in the model", short(name))
        elif entry.type != kind:
            problems.add("other modules", f"{short(name)} is {short(entry.type)} in the file, {kind!r} in the model")


def _compare_tensors(
    problems: _Problems, own: dict[str, tuple[str, Tensor | None]], entries: dict[str, TensorEntry | None]
) -> None:
    for name, entry in entries.items():
        if entry is not None and name not in own:
            problems.add("tensors only in the file", short(name))
    for name, (kind, tensor) in own.items():
        entry = entries.get(name)
        if name not in entries:
            problems.add("tensors only in the model", *([short(name)] if tensor is not None else []))
        elif entry is not None and entry.kind != kind:
            problems.add("tensors of another kind", f"{short(name)} is a {entry.kind} in the file, a {kind} here")
        elif entry is not None and tensor is not None:
            if nn.parameter.is_lazy(tensor):
                problems.add("tensors that are not initialised: run the model once", short(name))
                continue
            here = entry_of(kind, tensor)
            if _is_float(here) != _is_float(entry):
                problems.add("other dtypes", f"{short(name)} is {entry.dtype} in the file, {here.dtype} in the model")
            elif not _is_cut(entry.shape, here.shape):
                text = f"{short(name)} is {list(entry.shape)} in the file, {list(here.shape)} in the model"
                problems.add("shapes that no pruning of the model gives", text)


def _is_cut(shape: tuple[int, ...], dense: tuple[int, ...]) -> bool:
    same = len(shape) == len(dense)
    return same and all(new == old or 1 <= new < old for new, old in zip(shape, dense, strict=True))


def _is_float(entry: TensorEntry) -> bool:
    return entry.dtype.startswith(("float", "bfloat", "complex"))


def _placement(own: dict[str, tuple[str, Tensor | None]], device: Any) -> Callable[[str], torch.device]:
    """Where a tensor goes: to `device`, to where the model has it, or to where the model has its first tensor."""
    if device is not None:
        chosen = torch.device(device)
        return lambda name: chosen
    there = {name: tensor.device for name, (_, tensor) in own.items() if tensor is not None and not tensor.is_meta}
    default = next(iter(there.values()), torch.device("cpu"))
    return lambda name: there.get(name, default)


def _maker(
    manifest: Manifest, tensors: dict[str, Tensor], place: Callable[[str], torch.device]
) -> Callable[[str], Tensor | None]:
    """Gives the new parameter or buffer of a name: one object for all names that are tied."""
    made: dict[str, Tensor] = {}

    def make(name: str) -> Tensor | None:
        name = manifest.tied.get(name, name)
        entry = manifest.tensors[name]
        if entry is None:
            return None
        if name not in made:
            tensor = tensors[name].to(place(name))
            made[name] = nn.Parameter(tensor, requires_grad=entry.trains) if entry.kind == "parameter" else tensor
        return made[name]

    return make
