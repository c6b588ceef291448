"""Measure one row: prune the network beside its discarded twin, and try everything that a user does next."""

from __future__ import annotations

import importlib.util
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

import intrafusion
from benchmarks.zoo import duplicates
from benchmarks.zoo.dense import (
    CALIBRATION,
    JUDGES,
    SETTLING,
    dense_network,
    heads_of,
    in_double,
    left_alone,
    run,
    settle_,
)
from benchmarks.zoo.rows import EXACT, Row
from intrafusion import Fusion, FusionError, IntraFusionPruner
from intrafusion.groups.permutation_check import class_permutation, is_output, reordered
from intrafusion.running import copy_of

RATIO = 0.5
INPUTS = 64
"""Calibration inputs, in two batches; half as many judge."""
PATIENCE = 40
"""Processor seconds that pruning may have taken if the duplicates, which take as long again, are to be tried."""
ONNX_IN = "calibrated"
"""The preset whose network is exported: the one that adds most to it (biases)."""
_FOR_USERS = (ValueError, TypeError, NotImplementedError)
"""Errors that a user is meant to read, where our own code raises them."""

Found = dict[str, Any]


class Measurement:
    """What is known of a row so far. `report` is given that before each stage, for a row that is stopped."""

    def __init__(self, row: Row, report: Callable[[Found], None]) -> None:
        self.row, self.entry = row, row.entry
        self.found: Found = {"row": row.name, "model": row.entry.name, "preset": row.preset, "errors": {}}
        self._report = report
        self.dense: nn.Module = nn.Identity()
        self.ignored: list[str] = []

    def stage(self, name: str, action: Callable[[], Any]) -> Any:
        """What `action` returns; None if it raises, which is noted under the stage's name and nothing else."""
        self.found["stage"] = name
        self._report(self.found)
        try:
            return action()
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            text, file = f"{type(error).__name__}: {_one_line(error)}", Path(place.filename)
            ours = isinstance(error, _FOR_USERS) and "intrafusion" in file.parts
            if not (ours or isinstance(error, FusionError)):
                self.found.setdefault("raw", []).append(name)
                text = f"{text} [{file.name}:{place.lineno} {place.name}]"
            self.found["errors"][name] = text
            return None

    def measure(self) -> Found:
        """Everything that the table says about the row."""
        if self.stage("build", self._build) is None:
            return self.found
        self.stage("output", self._find_output)
        fusion = Fusion.preset(self.row.preset)
        if self.row.preset == "discard":
            self.stage("permute", self._permute)
            twin = self.stage("torch-pruning", self._plain)
        else:
            twin = self.stage("twin", lambda: self._pruned(fusion.discarded(), None)[0])
        self.found["twin"] = self._error_of(twin, "the twin runs")
        pruned = self.stage("prune", lambda: self._reported(fusion))
        if pruned is not None:
            self.found["error"] = self._error_of(pruned, "forward")
            if twin is not None and self.row.preset == "discard":
                self.found["as torch-pruning"] = self.stage("compare", lambda: _same(twin, pruned))
            if self.found["error"] is not None:
                self._used(pruned)
            if self.row.preset in EXACT and self.found["seconds"] <= PATIENCE:
                self.stage("duplicates", lambda: self._duplicates(fusion))
        self.found["stage"] = "over"
        return self.found

    def _build(self) -> bool:
        self.dense = dense_network(self.entry)
        self.inputs = self.entry.inputs(INPUTS // 2, JUDGES)
        self.example = self.entry.inputs(2, JUDGES)
        with torch.no_grad():
            self.expected = run(self.dense, self.inputs)
        self.found["parameters"] = sum(p.numel() for p in self.dense.parameters())
        return True

    def _find_output(self) -> None:
        """Name the layers that make the output: none if torch-pruning cannot follow the network at all."""
        names = {module: name for name, module in self.dense.named_modules()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.ignored = [names[m] for m in left_alone(self.dense, self.example) if m in names]
        self.found["left alone"] = self.ignored

    def _arguments(self, model: nn.Module) -> dict[str, Any]:
        return {
            "pruning_ratio": RATIO,
            "ignored_layers": [model.get_submodule(name) for name in self.ignored],
            "num_heads": heads_of(model),
        }

    def _pruner(
        self, model: nn.Module, fusion: Fusion, importance: Any = None, cast: Callable[[Any], Any] = lambda value: value
    ) -> IntraFusionPruner:
        calibration = None
        if fusion.correct == "calibrated":
            calibration = [cast(self.entry.inputs(INPUTS // 2, CALIBRATION + 10 * batch)) for batch in (0, 1)]
        importance = importance or tp.importance.GroupMagnitudeImportance(p=1)
        pruner = IntraFusionPruner(
            model, cast(self.example), importance, **self._arguments(model), fusion=fusion, calibration=calibration
        )
        pruner.progress = False
        return pruner

    def _pruned(self, fusion: Fusion, importance: Any) -> tuple[nn.Module, IntraFusionPruner]:
        model = copy_of(self.dense)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner = self._pruner(model, fusion, importance)
            pruner.step()
        return model, pruner

    def _plain(self) -> nn.Module:
        """The same by torch-pruning itself; then its user sets the attributes that hold numbers of heads."""
        model = copy_of(self.dense)
        start = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner = tp.pruner.BasePruner(
                model, self.example, tp.importance.GroupMagnitudeImportance(p=1), **self._arguments(model)
            )
            pruner.step()
        self.found["torch-pruning seconds"] = time.process_time() - start
        return model

    def _reported(self, fusion: Fusion) -> nn.Module:
        """Prune, and keep what was said about it."""
        model = copy_of(self.dense)
        start = time.process_time()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                pruner = self._pruner(model, fusion)
                pruner.step()
            finally:
                self.found["seconds"] = time.process_time() - start
                self.found["warnings"] = list(dict.fromkeys(_one_line(warning.message) for warning in caught))
        groups = pruner.report.groups
        cut = [group for group in groups if group.merged == "selection"]
        self.found |= {
            "groups": len([group for group in groups if group.merged != "untouched"]),
            "fused": len(pruner.report.fused),
            "cut": len(cut),
            "why": dict(Counter(group.reason for group in cut if group.reason)),
            "untouched": dict(Counter(group.reason for group in groups if group.merged == "untouched")),
            "left": sum(p.numel() for p in model.parameters()),
        }
        self._only_cut = {group.name for group in cut}
        return model

    def _error_of(self, model: nn.Module | None, stage: str) -> float | None:
        return None if model is None else self.stage(stage, lambda: relative_error(self.expected, model, self.inputs))

    def _permute(self) -> None:
        """How far the output moves when the channels of all groups change places within their classes."""
        model = copy_of(self.dense)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner = self._pruner(model, Fusion.preset("discard"))
            groups = pruner.DG.get_all_groups(pruner.ignored_layers, pruner.root_module_types)
            tables = [pruner.table(group) for group in groups if not pruner.is_attention(group)]
            wrong = pruner.inconsistent_groups()
        generator = torch.Generator().manual_seed(0)
        movable = [t for t in tables if not t.unsupported and t.name not in wrong and not is_output(pruner.DG, t)]
        with reordered(*((table, class_permutation(table.classes, generator)) for table in movable)):
            self.found["permutation"] = relative_error(self.expected, model, self.inputs)
        self.found["misdescribed"] = sorted(wrong)

    def _duplicates(self, fusion: Fusion) -> None:
        """How far the output moves when exact duplicates are pruned away, of groups that can be fused.

        In double precision: a deep network of random weights makes a hundred times as much of a rounding error.
        """
        model = copy_of(self.dense)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner = self._pruner(model, Fusion.preset("discard"))
        model, keep = duplicates.duplicated(pruner, self._only_cut)
        self.found["duplicated groups"] = len(keep)
        if not keep:
            return
        model, inputs = model.double(), in_double(self.inputs)
        settle_(model, in_double(self.entry.inputs(INPUTS, SETTLING)))
        with torch.no_grad():
            expected = run(model, inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pruner = self._pruner(model, fusion, duplicates.Keep(keep, model), in_double)
            pruner.step()
        self.found["duplicates cut only"] = [g.name for g in pruner.report.groups if g.merged == "selection"]
        self.found["duplicates"] = relative_error(expected, model, inputs)

    def _used(self, model: nn.Module) -> None:
        """A training step, save and load, ONNX."""
        self.stage("save and load", lambda: self._saved(model))
        if self.row.preset == ONNX_IN and importlib.util.find_spec("onnxruntime"):
            self.stage("ONNX", lambda: self._exported(model))
        self.stage("training", lambda: self._trained(copy_of(model)))

    def _saved(self, model: nn.Module) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "pruned.safetensors"
            intrafusion.save(model, path)
            again = intrafusion.load(path, self.entry.build())
        self.found["saved"] = _same(again.eval(), model, self.inputs)

    def _exported(self, model: nn.Module) -> None:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = intrafusion.export(model, Path(folder) / "pruned.onnx", self.example)
        self.found["onnx"] = float(exported.difference)

    def _trained(self, model: nn.Module) -> None:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        sum(out.float().square().mean() for out in run(model, self.inputs)).backward()  # type: ignore[union-attr]
        optimizer.step()
        bad = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
        if bad:
            raise RuntimeError(f"not finite after one step: {', '.join(bad[:3])}")
        with torch.no_grad():
            run(model.eval(), self.inputs)
        self.found["trained"] = True


@torch.no_grad()
def relative_error(expected: list[Tensor], model: nn.Module, inputs: Any) -> float:
    """|output - expected| / |expected| over everything that the network returns; features in between that are narrower
    by now are left out.

    Raises RuntimeError if there is nothing to compare, or the output is not finite.
    """
    outputs = run(model.eval(), inputs)
    pairs = [(o, e) for o, e in zip(outputs, expected, strict=True) if o.shape == e.shape]
    if not pairs or any(o.shape[:1] != e.shape[:1] for o, e in zip(outputs, expected, strict=True)):
        raise RuntimeError(f"the output is {[tuple(o.shape) for o in outputs]}")
    after, before = (
        torch.cat([tensor.double().flatten() for tensor in several]) for several in zip(*pairs, strict=True)
    )
    error = float((after - before).norm() / before.norm())
    if error != error:
        raise RuntimeError("the output is not finite")
    return error


def _same(first: nn.Module, second: nn.Module, inputs: Any = None) -> bool:
    """Are all tensors (and, on inputs, all outputs) of two networks the same, bit for bit?"""
    states = first.state_dict(), second.state_dict()
    same = states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    if inputs is None or not same:
        return same
    with torch.no_grad():
        return all(
            torch.equal(a, b) for a, b in zip(run(first.eval(), inputs), run(second.eval(), inputs), strict=True)
        )


def _one_line(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 600 else text[:600] + " ..."
