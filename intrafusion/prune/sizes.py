"""Attributes that hold widths: what a forward pass reads of `self.head_dim` when the layers are narrower by now.

Torch-Pruning changes layers and nothing else; its users set such attributes after pruning. A step that runs the
network cannot wait for that: after a cut, an attribute that equalled a width that changed is set, if the network does
not run as it is, runs with that, and runs with no other choice as well. The rest is the user's (`after_cut`).
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch_pruning.dependency.group import Group

from intrafusion.prune import refusals
from intrafusion.prune.size_options import Option, Width, is_size, one_each, options_of, put
from intrafusion.running import evaluating

_MOST_RUNS = 200
"""So often the network is tried with other attributes after one cut; most of these runs end early."""
_TOGETHER = 3
"""So many attributes of one module are changed at once."""


@dataclass(frozen=True)
class Attribute:
    """One attribute of one module that has been set, with its value before and after."""

    module: str
    name: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.module + '.' if self.module else ''}{self.name}: {self.before} -> {self.after}"


@dataclass(frozen=True)
class Failure:
    """A forward pass that broke off. position: how many calls it got to. modules: those it was in, innermost first.

    where: the line, as text.
    """

    error: Exception
    position: int
    modules: tuple[nn.Module, ...]
    where: str

    def __str__(self) -> str:
        return f"{type(self.error).__name__}: {' '.join(str(self.error).split())}{self.where}"


class Sizes:
    """The attributes of one network while its groups are cut.

    model: the network. run: gives its outputs for its example. heads: `num_heads` of the pruner, which torch-pruning
    changes as heads go. layers: the modules that torch-pruning cuts itself; their attributes are its business.
    """

    def __init__(
        self, model: nn.Module, run: Callable[[], list[Tensor]], heads: Mapping[Any, int], layers: Any
    ) -> None:
        self._model, self._run, self._heads, self._before = model, run, heads, dict(heads)
        self._names = {module: name for name, module in model.named_modules()}
        others = [module for module in self._names if module not in layers or not _has_tensors(module)]
        self._held = [
            (module, name) for module in others for name, value in vars(module).items() if is_size(name, value)
        ]
        self._last = self._values()
        self._shapes = self._outputs() if self._held else None
        self._options: list[Option] = []
        self._roots: dict[nn.Module, list[str]] = {}

    def cutting(self, group: Group) -> Callable[[], None]:
        """To be called before a group is cut; what it returns, after that."""
        shapes, values = _shapes(group), self._values()
        root: Any = group[0]
        for layer, _ in shapes:
            roots = self._roots.setdefault(layer, [])
            name = self._names.get(root.dep.target.module)
            if name is not None and name not in roots and layer is not root.dep.target.module:
                roots.append(name)

        def note() -> None:
            self._options += options_of(values, list(dict.fromkeys(self._changes(shapes, _shapes(group)))))

        return note

    def changed(self) -> tuple[Attribute, ...]:
        """What has been set, by us or by others, since this was last asked."""
        before, self._last = self._last, self._values()
        return tuple(
            Attribute(self._names[module], name, value, self._last[module, name])
            for (module, name), value in before.items()
            if self._last[module, name] != value
        )

    @property
    def is_suspicious(self) -> bool:
        """Is there an attribute that equalled a width that has changed since the network last ran?"""
        return any(option.is_open for option in self._options)

    def settle(self) -> Failure | None:
        """Set what has to be set; None if the network then runs. Otherwise nothing is set, and this is what fails."""
        sure = one_each([option for option in self._options if option.sure and option.is_open])
        failure = self._tried(sure)
        if failure is not None and sure:
            put(sure, back=True)
            failure = self._tried([])
        if failure is None:
            self._options.clear()
        return failure

    def _tried(self, chosen: Sequence[Option]) -> Failure | None:
        """Set `chosen`, and whatever else makes the network run. None if it does; else only `chosen` is set."""
        put(chosen)
        more: list[Option] = []
        left = _MOST_RUNS
        first = failure = self._failure()
        while failure is not None and left > 0:
            better, failure, runs = self._step(failure)
            left -= runs
            if not better:
                break
            put(better)
            more += better
        if failure is not None:
            put(more, back=True)
            return first
        return None

    def _step(self, failure: Failure) -> tuple[Sequence[Option], Failure | None, int]:
        """(the fewest options of one module that get the network farther, how it fails then, how often it was run).

        No options if there are none, or several that get it as far: nobody can know which are meant.
        """
        runs = 0
        inside = [module for module in failure.modules if module in self._names]
        rest = [module for module in dict.fromkeys(o.module for o in self._options) if module not in inside]
        for module in (*inside, *rest):
            most = _TOGETHER if module in inside else 1
            for chosen_sets in self._choices(module, most):
                found: list[tuple[float, Sequence[Option], Failure | None]] = []
                for chosen in chosen_sets:
                    put(chosen)
                    now = self._failure()
                    put(chosen, back=True)
                    runs += 1
                    found.append((float("inf") if now is None else now.position, chosen, now))
                    if runs >= _MOST_RUNS:
                        return (), failure, runs
                best = max((place for place, _, _ in found), default=0)
                if best > failure.position:
                    winners = [(chosen, now) for place, chosen, now in found if place == best]
                    return (*winners[0], runs) if len(winners) == 1 else ((), failure, runs)
        return (), failure, runs

    def _choices(self, module: nn.Module, most: int) -> Iterator[list[tuple[Option, ...]]]:
        """All ways to change one attribute of a module, then all ways to change two, ..."""
        numbers: dict[tuple[str, int | None], list[Option]] = {}
        for option in dict.fromkeys(self._options):
            if option.module is module and option.is_open:
                numbers.setdefault((option.name, option.place), []).append(option)
        for count in range(1, most + 1):
            several = [one for keys in combinations(numbers, count) for one in product(*(numbers[k] for k in keys))]
            if several:
                yield several

    def trouble(self) -> str:
        """Set what has to be set; why the network does not run all the same ('' if it does)."""
        failure = self.settle()
        return "" if failure is None else self.advice(failure)

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """An error of what runs the network becomes one that says what to do, if the network does not run at all."""
        try:
            yield
        except Exception as error:
            failure = self._failure()
            if failure is None:
                raise
            raise RuntimeError(self.advice(failure)) from error

    def advice(self, failure: Failure) -> str:
        """Why the network does not run, and what its user can do."""
        broken = next((module for module in failure.modules if module in self._roots), None)
        if not self.is_suspicious and broken is not None:
            why = refusals.misread(self._names[broken], self._roots[broken])
            return f"the network does not run with its new widths: {failure}. {why}"
        held = [f"{self._told(o)} = {vars(o.module)[o.name]}" for o in self._options if o.is_open]
        listed = ", ".join(list(dict.fromkeys(held))[:6])
        return (
            f"the network does not run with its new widths: {failure}. Attributes that hold sizes are its user's"
            f"{f' ({listed} equalled a width)' if listed else ''}: set them in a function after_cut(model, group), an "
            "argument of the pruner, or after each group.prune() of step(interactive=True)"
        )

    def _told(self, option: Option) -> str:
        name = self._names[option.module]
        return f"{name}.{option.name}" if name else option.name

    def _values(self) -> dict[tuple[nn.Module, str], Any]:
        found = ((module, name, vars(module).get(name)) for module, name in self._held)
        return {(module, name): tuple(value) if isinstance(value, list) else value for module, name, value in found}

    def _changes(self, before: dict, after: dict) -> Iterator[Width]:
        told = {layer for layer, _ in before if layer in self._before}
        heads = {layer: (self._before[layer], self._heads.get(layer, 0)) for layer in told}
        keys = min(heads.values(), default=(0, 0))
        for (layer, name), old in before.items():
            for axis, (a, b) in enumerate(zip(old, after.get((layer, name), old), strict=False)):
                if a != b and axis == 0 and layer in heads:  # heads share its rows
                    yield Width(a, b, layer, heads[layer], keys)
                elif a != b:
                    yield Width(a, b)

    def _outputs(self) -> list[tuple[int, ...]]:
        with torch.no_grad(), evaluating(self._model):
            return [tuple(output.shape) for output in self._run()]

    def _failure(self) -> Failure | None:
        """How a forward pass breaks off; None if it does not."""
        counter = _Counter()
        try:
            with counter:
                shapes = self._outputs()
            if self._shapes is not None and not _are_like(shapes, self._shapes):
                raise RuntimeError(f"its outputs are {shapes}, they were {self._shapes}")
        except Exception as error:
            return Failure(error, counter.calls, *_place(error))
        return None


class _Counter(TorchFunctionMode):
    """Counts the calls that a forward pass makes: how far it gets."""

    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def _shapes(group: Group) -> dict[tuple[nn.Module, str], tuple[int, ...]]:
    """The shape of every parameter of the layers of a group."""
    layers: list[Any] = [item[0].target.module for item in group]
    return {
        (layer, name): tuple(parameter.shape)
        for layer in dict.fromkeys(layer for layer in layers if isinstance(layer, nn.Module))
        for name, parameter in layer._parameters.items()
        if parameter is not None
    }


def _are_like(shapes: list[tuple[int, ...]], before: list[tuple[int, ...]]) -> bool:
    """Are outputs those of as many inputs, on axes that are as long or have become shorter?"""
    return len(shapes) == len(before) and all(
        len(now) == len(old) and now[:1] == old[:1] and all(a <= b for a, b in zip(now, old, strict=True))
        for now, old in zip(shapes, before, strict=True)
    )


def _has_tensors(module: nn.Module) -> bool:
    return any(p is not None for p in module._parameters.values())


def _place(error: Exception) -> tuple[tuple[nn.Module, ...], str]:
    """(the modules whose code was running, innermost first; the last line of theirs that is not torch's, as text)"""
    modules, where = [], ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            modules.append(owner)
            if not frame.f_globals.get("__name__", "").startswith("torch."):
                file, name = frame.f_code.co_filename, frame.f_code.co_name
                text = traceback.FrameSummary(file, line, name).line or ""
                short = file.replace("\\", "/").rpartition("/")[2]
                where = (
                    f", in {type(owner).__name__}.{name}, {short}:{line}: {text}" if text else f", in {short}:{line}"
                )
    return tuple(dict.fromkeys(reversed(modules))), where
