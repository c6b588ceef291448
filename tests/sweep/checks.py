"""One network in one preset: what must hold, measured.

Every check gives a part of a `Row`; none raises.
"""

from __future__ import annotations

import signal
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

import intrafusion
from intrafusion import FusionError, IntraFusionPruner
from tests.sweep.duplicates import Pairs
from tests.sweep.generator import Drawn

PRESETS = ("paper", "barycentre", "data-free", "calibrated")
PARTS = ("step", "duplicates", "state")

# How much worse than the plain cut is still called equal, and what counts as no change.
MARGIN, EXACT = 1.02, 1e-4

# Seconds of one step.
LONGEST = 60

# A warning that says this says that the result is worse than cutting.
_WORSE = ("worse", "discard")

# Exceptions that are raised as sentences; a raw one at the end of a FusionError is a mistake of somebody.
_SENTENCES = (ValueError, TypeError, FusionError)

_Metric = Callable[[Any], "Tensor | None"]


@dataclass
class Row:
    """What came of a network in a preset.

    error: the exception, '' if none; named: does it name a group or layer and a reason; where: the last line of the
    package that it came through; plain: the same of plain torch-pruning. ours, twin: relative errors on held-out inputs
    of the network and of its discarded twin; warned: was there a warning that ours is worse; compared: what the package
    itself measured of both; fused, cut: numbers of
    groups; reasons: why some were only cut. duplicates: the relative error where channels are pairwise equal, None
    where some group was not fused, whose reasons are in `kept_apart`; state: what an error left changed, '' if nothing;
    at: when it was measured.
    """

    seed: int
    preset: str
    error: str = ""
    named: bool = True
    where: str = ""
    plain: str = ""
    ours: float | None = None
    twin: float | None = None
    warned: bool = False
    warnings: list[str] = field(default_factory=list)
    compared: list[str] = field(default_factory=list)
    fused: int = 0
    cut: int = 0
    reasons: list[str] = field(default_factory=list)
    duplicates: float | None = None
    kept_apart: str = ""
    state: str = ""
    seconds: float = 0.0
    at: str = ""

    def faults(self) -> list[str]:
        """What should not be: the kinds of defects, in a word or two each."""
        found = []
        if self.error and not self.named:
            found.append("crash")
        if self.worse and not self.warned:
            found.append("worse without a warning")
        if self.preset != "paper" and self.duplicates is not None and not self.duplicates < EXACT:  # its sums double
            found.append("duplicates not exact")
        if self.state:
            found.append("state changed by an error")
        return found

    @property
    def worse(self) -> bool:
        """Is the network worse than its discarded twin by more than the margin?"""
        if self.ours is None or self.twin is None:
            return False
        return not self.ours <= MARGIN * self.twin + EXACT


def check(drawn: Drawn, preset: str, parts: Collection[str] = PARTS) -> Row:
    """One network in one preset: a step, and what else of `PARTS` is asked for."""
    row, start = Row(drawn.seed, preset, at=time.strftime("%F %T")), time.perf_counter()
    with _recorded():
        row.plain = plain_problem(drawn)
        with _limited():
            _check_step(drawn, row)
        if not row.error and "duplicates" in parts:
            _check_duplicates(drawn, row)
        if not row.error and "state" in parts:
            _check_state(drawn, row)
    row.seconds = round(time.perf_counter() - start, 2)
    return row


def pruner_of(drawn: Drawn, model: nn.Module, preset: str, metric: _Metric | None = None) -> IntraFusionPruner:
    """Our pruner with the settings of the seed."""
    batches = {"calibration": list(drawn.batch(64, part=1).split(32))} if preset == "calibrated" else {}
    return IntraFusionPruner(model, **_settings(drawn, model, metric), fusion=preset, **batches)


def _settings(drawn: Drawn, model: nn.Module, metric: _Metric | None = None) -> dict[str, Any]:
    return {
        "example_inputs": (drawn.batch(2, part=2),),
        "importance": metric or tp.importance.GroupMagnitudeImportance(p=1),
        "pruning_ratio": drawn.ratio,
        "global_pruning": drawn.global_pruning,
        "ignored_layers": drawn.ignored(model),
    }


@lru_cache(maxsize=2)
def plain_problem(drawn: Drawn) -> str:
    """Why torch-pruning itself does not prune this network to one that runs ('' if it does)."""
    model = drawn.model()
    try:
        with _recorded(), _limited():
            tp.pruner.BasePruner(model, **_settings(drawn, model)).step()
            outputs(model, drawn.batch(2, part=2))
    except Exception as error:
        return _said(error)
    return ""


def _check_step(drawn: Drawn, row: Row) -> None:
    """One step, beside the same channels only cut."""
    dense, model = drawn.model(), drawn.model()
    before = state_of(model)
    try:
        with _recorded() as caught:
            pruner = pruner_of(drawn, model, row.preset)
            pruner.step()
            row.warnings = [str(warning.message) for warning in caught]
            history = pruner.pruning_history()
            row.fused = len(pruner.report.fused)
            row.cut = len([group for group in pruner.report.groups if group.merged == "selection"])
            row.compared = [str(one) for one in pruner.report.comparisons]
            row.reasons = sorted({group.reason for group in pruner.report.groups if group.reason})
    except Exception as error:
        _failed(row, error, dense)
        row.state = changes(before, state_of(model))
        return
    try:
        _compare(drawn, row, dense, model, history)
    except Exception as error:
        _failed(row, error, dense)
        row.error = f"the pruned network does not run: {row.error}"
        row.named = any("does not run" in warning for warning in row.warnings)


def _compare(drawn: Drawn, row: Row, dense: nn.Module, model: nn.Module, history: list) -> None:
    held_out = drawn.batch(64, part=3)
    wanted = outputs(dense, held_out)
    row.ours = relative_error(outputs(model, held_out), wanted)
    twin = drawn.model()
    with _recorded():
        pruner_of(drawn, twin, "discard").DG.load_pruning_history(history)
    row.twin = relative_error(outputs(twin, held_out), wanted)
    row.warned = any(all(word in warning.lower() for word in _WORSE) for warning in row.warnings)
    model.train()
    outputs(model, held_out).square().mean().backward()


def _check_duplicates(drawn: Drawn, row: Row) -> None:
    """Channels in equal pairs, one of each kept: the output stays, where every group is fused."""
    model, pairs = drawn.model(), Pairs()
    try:
        with _recorded():
            pruner = pruner_of(replace(drawn, ratio=0.5, global_pruning=False), model, row.preset, pairs)
            pairs.make_(pruner, equal_columns=row.preset == "barycentre" or drawn.seed % 2 == 0)
            drawn.settle_(model)
            held_out = drawn.batch(64, part=3)
            wanted = outputs(model, held_out)
            pruner.step()
            groups = [group for group in pruner.report.groups if group.merged == "selection"]
            apart = [f"{group.name}: {group.reason or group.merged}" for group in groups]
            error = relative_error(outputs(model, held_out), wanted)
    except Exception as error:
        row.kept_apart = _said(error)
        return
    row.kept_apart = "; ".join(apart) or pairs.problem(model)
    if not row.kept_apart or error < EXACT:
        row.duplicates = error


def _check_state(drawn: Drawn, row: Row) -> None:
    """An error on the way, late and early, leaves the network as it was."""
    calls = _Counter()
    with _recorded():
        model = drawn.model()
        pruner = pruner_of(drawn, model, row.preset, calls.metric)
        with calls.attached(model.get_submodule(drawn.heads[0])):
            pruner.step()
    for share in (0.5, 1.0):
        last = max(1, round(share * calls.seen))
        model = drawn.model()
        model.train(drawn.seed % 2 == 0)
        raising = _Counter(last)
        try:
            with _recorded():
                pruner = pruner_of(drawn, model, row.preset, raising.metric)
                before = state_of(model)
                with raising.attached(model.get_submodule(drawn.heads[0])):
                    pruner.step()
        except Exception as error:
            changed = changes(before, state_of(model))
            if changed:
                row.state = f"at call {last} of {calls.seen} ({_said(error)}): {changed}"
            elif "torn" not in str(error):
                row.state = f"at call {last} of {calls.seen} another error is raised: {_said(error)}"


class _Counter:
    """Counts the calls of a layer and of a metric, and raises at number `last`."""

    def __init__(self, last: int | None = None):
        self.seen, self.last, self._score = 0, last, tp.importance.GroupMagnitudeImportance(p=1)

    def count(self, *_: Any) -> None:
        self.seen += 1
        if self.seen == self.last:
            raise OverflowError("torn on purpose")

    def metric(self, group: Any) -> Tensor | None:
        self.count()
        return self._score(group)

    @contextmanager
    def attached(self, layer: nn.Module) -> Iterator[None]:
        hook = layer.register_forward_pre_hook(self.count)
        try:
            yield
        finally:
            hook.remove()


def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """[N, everything] what the network gives."""
    out = model(inputs)
    return torch.cat([one.flatten(1) for one in (out if isinstance(out, tuple) else (out,))], dim=1)


def relative_error(after: Tensor, before: Tensor) -> float:
    """The norm of the difference as a part of the norm of what was."""
    return ((after - before).norm() / before.norm()).item()


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that a step must give back after an error."""
    state: dict[str, Any] = {f"tensor {name}": value.clone() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        state[f"requires_grad {name}"] = parameter.requires_grad
        state[f"parameter {name}"] = id(parameter)
    for name, module in model.named_modules():
        state[f"mode {name}"] = module.training
        state[f"attributes {name}"] = module.extra_repr()
        state[f"hooks {name}"] = len(module._forward_hooks), len(module._forward_pre_hooks)
        state[f"plain {name}"] = {key: v for key, v in vars(module).items() if isinstance(v, int | float | str | tuple)}
    return state


def changes(before: dict[str, Any], after: dict[str, Any]) -> str:
    """What differs, by name."""
    found = [name for name in sorted(before.keys() | after.keys()) if not _same(before.get(name), after.get(name))]
    return ", ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return type(a) is type(b) and a == b


@contextmanager
def _recorded() -> Iterator[list[warnings.WarningMessage]]:
    """The warnings, all of them; none is shown."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


@contextmanager
def _limited() -> Iterator[None]:
    """TimeoutError after a time that no small network takes: torch-pruning's lists of indices may grow without end."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"no end after {LONGEST} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LONGEST)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _failed(row: Row, error: Exception, dense: nn.Module) -> None:
    row.error, row.where = _said(error), _place(error)
    cause = error.__cause__
    raw = cause is not None and not _is_ours(cause) and str(error).endswith(str(cause))
    plain = isinstance(error, _SENTENCES) and _is_ours(error) and not raw
    names = [name for name, _ in [*dense.named_modules(), *dense.named_parameters()] if name]
    row.named = plain and any(f"'{name}'" in str(error) or f"{name}:" in str(error) for name in names)


def _said(error: Exception) -> str:
    wrapped = f" <- {type(error.__cause__).__name__}" if error.__cause__ is not None else ""
    return f"{type(error).__name__}{wrapped}: {error}"


def _is_ours(error: BaseException) -> bool:
    """Was it raised by the package itself, and not by what it calls?"""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.startswith(str(Path(intrafusion.__file__).parent))


def _place(error: BaseException) -> str:
    """The innermost line of the package or of torch-pruning that the first cause came through."""
    while error.__cause__ is not None:
        error = error.__cause__
    homes = {str(Path(module.__file__ or "").parent): module.__name__ for module in (intrafusion, tp)}
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        for home, name in homes.items():
            if frame.filename.startswith(home):
                return f"{name}{frame.filename.removeprefix(home)}:{frame.lineno} {frame.name}"
    return ""
