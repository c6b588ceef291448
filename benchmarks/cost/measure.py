"""Measure one row: this process does nothing else, so that its peak memory is the row's own."""

from __future__ import annotations

import json
import resource
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.cost.rows import PLAN_ONLY, TORCH_PRUNING, Row, batches, build, inputs_read, pruning

_PASSES = 3


def measure(row: Row, device: str, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Everything that the table says about a row; `report` is given what is known by then, for a row that is stopped.

    Keys: `seconds`, `reference` (torch-pruning, as many turns), `passes` (one pass of the dense network over the
    inputs), lists of [wall, cpu] each; `inputs`; `peak_gb`, the most memory in use up to the end of the first turn.
    """
    found: dict[str, Any] = {"row": row.name, "device": device, "threads": torch.get_num_threads()}
    found |= {"seconds": [], "reference": [], "passes": [], "inputs": 0}
    counted = row.method not in (TORCH_PRUNING, *PLAN_ONLY)
    images = batches(row, row.images, device) if row.images else []
    report(found)
    if counted:
        found |= _dense_passes(row, device)
        report(found)
        found["reference"].append(_timed(_prepared(replace(row, method=TORCH_PRUNING), device), device))
        report(found)
    for _ in range(row.turns):
        found["seconds"].append(_timed(_prepared(row, device, images), device))
        found.setdefault("peak_gb", _peak_gb(device))
        report(found)
        if not counted and row.method != TORCH_PRUNING:
            found["reference"].append(_timed(_prepared(replace(row, method=TORCH_PRUNING), device), device))
            report(found)
    return found


def _prepared(row: Row, device: str, images: Any = ()) -> Callable[[], Any]:
    return pruning(row, build(row).to(device), list(images), device)


@torch.no_grad()
def _dense_passes(row: Row, device: str) -> dict[str, Any]:
    model = build(row).to(device)
    count = inputs_read(row, model, torch.zeros(1, 3, row.size, row.size, device=device))
    inputs = batches(row, count, device)
    model(inputs[0][:1])
    passes = [_timed(lambda: [model(batch) for batch in inputs], device) for _ in range(_PASSES)]
    return {"inputs": count, "passes": passes}


def _timed(call: Callable[[], Any], device: str) -> list[float]:
    """[wall, cpu] seconds of a call, with the work that it leaves to a GPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # groups that are only cut are no matter of this table
        call()
    if device != "cpu":
        torch.cuda.synchronize()
    return [time.perf_counter() - wall, time.process_time() - cpu]


def _peak_gb(device: str) -> float:
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main(row: Row, device: str) -> None:
    """Print what is known of a row as lines of JSON, each one more complete than the one before."""
    found = measure(row, device, lambda known: print(json.dumps(known | {"over": True}), flush=True))
    print(json.dumps(found), flush=True)
